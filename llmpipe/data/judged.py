"""Answers as a judge sees them: without the thought in front.

`ppo` and `grpo` have a reward model score what follows a block of thought, and nothing where that
never ended (`rollout.think`). What teaches or tests a reward model shows it the same.
"""

from __future__ import annotations

from dataclasses import replace

from llmpipe.data.examples import Message, Messages, Preference
from llmpipe.data.template.texts import THOUGHTS
from llmpipe.scores.thinking import CLOSING, TAG, behind_thought

LEFT_OUT = "thoughts in front of answers are left out: a reward model is asked without them"
EMPTY = "answers that are a thought alone are read as empty, as a reward model is asked"


def judged(pair: Preference) -> Preference:
    """A pair as a judge sees it."""
    return replace(pair, chosen=answer(pair.chosen), rejected=answer(pair.rejected))


def answer(given: str | Messages) -> str | Messages:
    """An answer as a judge sees it: a text, or turns."""
    return _text(given) if isinstance(given, str) else [_turn(message) for message in given]


def notes_on(pair: Preference, shown: Preference) -> set[str]:
    """What has to be said of a pair that a judge sees so."""
    if pair == shown:
        return set()
    empty = any(_is_empty(each) for each in (shown.chosen, shown.rejected))
    return {LEFT_OUT, EMPTY} if empty else {LEFT_OUT}


def _text(text: str) -> str:
    """A text, of which the opening tag may be in the prompt."""
    thinks = CLOSING in text or text.lstrip().startswith(TAG)
    return behind_thought(text) if thinks else text


def _turn(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    said = {name: value for name, value in message.items() if name not in THOUGHTS}
    return said | {"content": _text(message["content"])}


def _is_empty(given: str | Messages) -> bool:
    if isinstance(given, str):
        return not given
    return not given[-1]["content"] and not given[-1].get("tool_calls")
