"""`preference`: a prompt with a better and a worse answer, in any of the ways the Hub has.

texts       {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
messages    {"prompt": [...], "chosen": [...], "rejected": [...]}
no prompt   {"chosen": [question, good], "rejected": [question, bad]}, what both share is the prompt
both        {"prompt": "question", "chosen": [question, good], ...}, as UltraFeedback
"""

from __future__ import annotations

from llmpipe.data.conversation import (
    answer_messages,
    given,
    is_of_a_chat,
    prompt_messages,
    text_column,
    tools_of,
    with_system,
)
from llmpipe.data.examples import Messages, Preference, is_learned
from llmpipe.data.fields import Rejected, Values, optional_number, optional_text, text_of
from llmpipe.data.format import Format

_NAMES = ("prompt", "chosen", "rejected")


def example_of(values: Values) -> Preference:
    if values["chosen"] == values["rejected"]:
        raise Rejected("chosen equals rejected")
    if more := optional_text(values, "prompt_input"):
        values["prompt"] = f"{text_column(values, 'prompt')}\n\n{more}"
    margin = optional_number(values, "margin")
    if _are_texts(values):
        prompt, chosen, rejected = (text_of(values[name], name) for name in _NAMES)
        return Preference(prompt, chosen, rejected, margin=margin)
    return _of_messages(values, margin)


def _are_texts(values: Values) -> bool:
    are_texts = all(isinstance(given(values, name), str) for name in _NAMES)
    return are_texts and not is_of_a_chat(values)


def _of_messages(values: Values, margin: float | None) -> Preference:
    chosen = answer_messages(values, "chosen")
    rejected = answer_messages(values, "rejected")
    prompt, repeated = _prompt(values, chosen, rejected)
    chosen = chosen[repeated:]
    rejected = rejected[repeated:]
    _check_answers(chosen, rejected)
    return Preference(prompt, chosen, rejected, tools_of(values), margin)


def _prompt(values: Values, chosen: Messages, rejected: Messages) -> tuple[Messages, int]:
    """The prompt, and how many of its messages both answers repeat before they answer."""
    if values.get("prompt"):
        prompt = prompt_messages(values)
        count = len(prompt)
        repeated = count if chosen[:count] == rejected[:count] == prompt else 0
        return with_system(values, prompt), repeated
    pairs = enumerate(zip(chosen, rejected, strict=False))
    parting = next((i for i, (better, worse) in pairs if better != worse), 0)
    if not parting:
        problem = "chosen and rejected do not begin alike, and no column is the prompt"
        raise Rejected("no common prompt", problem)
    return with_system(values, chosen[:parting]), parting


def _check_answers(chosen: Messages, rejected: Messages) -> None:
    """What is left of each behind the prompt has to be an answer, and another one."""
    if chosen == rejected:
        raise Rejected("chosen equals rejected")
    if not chosen or not rejected:
        raise Rejected("no assistant turn", "an answer is no longer than the prompt")
    begins = (chosen[0]["role"], rejected[0]["role"])
    if "system" in begins:
        raise Rejected("system turn not first", "in an answer")
    if "user" in begins:
        raise Rejected("no common prompt", "chosen and rejected differ in what is asked")
    spoken = (turn for turn in (*chosen, *rejected) if turn["role"] == "assistant")
    if not all(map(is_learned, spoken)):
        raise Rejected("loss of a turn", "a part of an answer is not to be learned; all of it is")


FORMAT = Format(
    name="preference",
    precedence=70,
    required=("chosen", "rejected"),
    optional=("prompt", "prompt_input", "system", "tools", "margin"),
    shape=Preference,
    example_of=example_of,
    synonyms=(
        {"conversations": "prompt", "chosen": "chosen", "rejected": "rejected"},
        {"question": "prompt", "chosen": "chosen", "rejected": "rejected"},
        {"instruction": "prompt", "chosen": "chosen", "rejected": "rejected"},
        {
            "instruction": "prompt",
            "input": "prompt_input",
            "chosen": "chosen",
            "rejected": "rejected",
        },
    ),
)
