"""What ends an assistant's turn, learned from a template by rendering a small conversation."""

from __future__ import annotations

import re

from llmpipe.data.examples import Messages
from llmpipe.data.formats import Rejected
from llmpipe.data.template.rendering import OTHER, Template, any_of
from llmpipe.data.tokenizer import Tokenizer
from llmpipe.errors import UserError


def small_talk(turns: int) -> Messages:
    """A conversation of the words turn0, turn1, ..., begun by the user."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": f"turn{i}"} for i in range(turns)]


def learn_ends(template: Template, tokenizer: Tokenizer) -> list[str]:
    """What ends the assistant's turns, the last turn first: added tokens behind its words.

    Most often one token; Cohere writes two without a space, and the last of them stops a
    generation. Raises UserError when there is none.
    """
    token = re.compile(any_of(tokenizer.added_tokens()))
    text = _rendered(template)
    words = [text.find(f"turn{i}") for i in range(4)]
    if min(words) < 0:
        raise UserError("the chat template leaves out turns of a conversation", OTHER)
    ends = [_end_of_the_last_turn(text, words[3], token)]
    between = token.findall(text, words[1], words[2])
    # gpt-oss ends inner turns with another token; one token alone would be the next turn's header.
    if len(between) > 1 and not "".join(between).startswith(ends[0]):
        ends.append(between[0])
    return ends


def _rendered(template: Template) -> str:
    try:
        text, _ = template.render(small_talk(4))
    except Rejected as error:
        problem = f"the chat template cannot render a conversation: {error.detail}"
        raise UserError(problem, OTHER) from None
    return text


def _end_of_the_last_turn(text: str, words: int, token: re.Pattern[str]) -> str:
    tokens = re.compile(f"(?:{token.pattern})+").search(text, words)
    if not tokens:
        problem = "no end-of-turn token after the assistant: a model would never learn to stop"
        hint = "end the assistant's turn with {{ eos_token }}, or set data.template: chatml"
        raise UserError(f"the chat template writes {problem}", hint)
    first = token.match(text, tokens.start())
    if first and token.sub("", text[tokens.end() :]).strip():
        # Llama 3's first template always goes on with the next header: only the first token ends
        # the turn.
        return first.group()
    return tokens.group()
