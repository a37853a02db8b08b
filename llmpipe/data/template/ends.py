"""What ends an assistant's turn, learned from a template by rendering small conversations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from llmpipe.data.examples import Messages
from llmpipe.data.formats import Rejected
from llmpipe.data.template.rendering import OTHER, Template, any_of
from llmpipe.data.template.sandbox import bounded
from llmpipe.data.tokenizer import Tokenizer
from llmpipe.errors import UserError

# What the turns of small conversations say: whatever stands behind all of these ends a turn.
SAYINGS = ("turn{}", "Turn {}:\n\n- one line,\n- and another", 'Is "{}" the last?')
SHOWN = 40  # characters of what a template writes, in a message


def small_talk(turns: int, saying: str = SAYINGS[0]) -> Messages:
    """A conversation of the words turn0, turn1, ..., or of another saying, begun by the user."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": saying.format(i)} for i in range(turns)]


def learn_ends(template: Template, tokenizer: Tokenizer) -> list[str]:
    """What ends the assistant's turns, the last turn first: special tokens behind its words.

    Most often one token; Cohere writes two without a space, and the last of them stops a
    generation. A token that ordinary text may hold, such as a newline, ends no turn. Raises
    UserError when there is none, and for a template that is refused.
    """
    special = re.compile(any_of(tokenizer.special_tokens()))
    behind = _behind_words(template)
    opening = set(special.findall(_opening(template)))
    last = _closing(behind.last, special, opening)
    if not last:
        raise _never_ends(behind.last)
    _check_is_read(tokenizer, behind, last[0])
    inner = _run(behind.inner, special, opening)
    both = _beginning(last, inner)
    if both:
        return ["".join(both)]
    ends = ["".join(last)]
    # gpt-oss ends inner turns with another token; one token alone would be the next turn's header.
    if inner and inner[0] not in opening and len(special.findall(behind.inner)) > 1:
        ends.append(inner[0])
    return ends


@dataclass(frozen=True)
class _Behind:
    """What a template writes behind the words of assistants' turns, whatever these say."""

    inner: str
    """Up to the words of the next turn."""
    last: str
    """Up to the end of the conversation."""
    texts: list[tuple[str, int]]
    """Every conversation as it is written, and where its last words end."""


def _behind_words(template: Template) -> _Behind:
    inner, last, texts = [], [], []
    for saying in SAYINGS:
        text = rendered(template, small_talk(4, saying))
        ends = [0]
        starts = []
        for message in small_talk(4, saying):
            starts.append(text.find(message["content"], ends[-1]))
            ends.append(starts[-1] + len(message["content"]))
            if starts[-1] < 0:
                problem = f"the chat template leaves out turns of a conversation: {text[:SHOWN]!r}"
                raise UserError(f"{problem} does not say {message['content']!r}", OTHER)
        inner.append(text[ends[2] : starts[2]])
        last.append(text[ends[4] :])
        texts.append((text, ends[4]))
    return _Behind("".join(_beginning(*inner)), "".join(_beginning(*last)), texts)


def _beginning(*texts: Sequence[str]) -> list[str]:
    """What all of them begin with, item by item."""
    same = takewhile(lambda items: len(set(items)) == 1, zip(*texts, strict=False))
    return [items[0] for items in same]


def rendered(template: Template, messages: Messages, open_turn: bool = False) -> str:
    """A small conversation within the sandbox's limits. Raises UserError."""
    try:
        with bounded():
            return template.render(messages, open_turn=open_turn)[0]
    except Rejected as error:
        problem = f"the chat template cannot render a conversation: {error.detail}"
        raise UserError(problem, OTHER) from None


def _opening(template: Template) -> str:
    """What an assistant's turn begins with; empty where the template does not say."""
    try:
        with bounded():
            closed = template.attempt(small_talk(1)) or ""
            opened = template.attempt(small_talk(1), open_turn=True) or ""
    except Rejected as error:
        raise UserError(f"the chat template is refused: {error.detail}", OTHER) from None
    return opened.removeprefix(closed) if opened.startswith(closed) else ""


def _run(behind: str, special: re.Pattern[str], opening: set[str]) -> list[str]:
    """The first special tokens behind a turn's words, without text between them, up to those that
    open a turn.
    """
    first = special.search(behind)
    run: list[str] = []
    place = first.start() if first else len(behind)
    while token := special.match(behind, place):
        if run and token.group() in opening:
            break
        run.append(token.group())
        place = token.end()
    return run


def _closing(behind: str, special: re.Pattern[str], opening: set[str]) -> list[str]:
    """The special tokens that end a conversation's last turn."""
    run = _run(behind, special, opening)
    if run and special.sub("", behind.partition("".join(run))[2]).strip():
        # Llama 3's first template always goes on with the next header: only the first token ends
        # the turn.
        return run[:1]
    return run


def _never_ends(behind: str) -> UserError:
    problem = "the chat template writes no end-of-turn token after the assistant"
    if behind:
        problem += f", only {behind[:SHOWN]!r}, which is no special token"
    hint = "end the assistant's turn with {{ eos_token }}, or set data.template: chatml"
    return UserError(f"{problem}: a model would never learn to stop", hint)


def _check_is_read(tokenizer: Tokenizer, behind: _Behind, end: str) -> None:
    """The tokenizer has to make a token of what ends a turn, right behind words, too."""
    for text, words_end in behind.texts:
        encoding = tokenizer.backend.encode(text, add_special_tokens=False)
        token = encoding.char_to_token(text.index(end, words_end))
        if token is None or encoding.ids[token] != tokenizer.backend.token_to_id(end):
            problem = f"the chat template ends turns with {end}, which the tokenizer reads as text"
            raise UserError(f"{problem} behind words: a model would never learn to stop", OTHER)
