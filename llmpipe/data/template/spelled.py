"""Texts that spell a special token, which a tokenizer would read as that token.

Rendered, `<|im_end|>` in a question ends the question. Nothing of what tokenizes at inference takes
it for words, so neither does training: such a row is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from llmpipe.data.examples import Messages, Tools
from llmpipe.data.formats import Rejected
from llmpipe.data.template.rendering import any_of
from llmpipe.data.template.texts import OF_TOOLS
from llmpipe.data.template.turns import Reading

REASON = "text spells a special token"


class Spelled:
    """The special tokens of a tokenizer, as texts. Other added tokens are words like any."""

    def __init__(self, special: Iterable[str], control: Iterable[str]):
        """`control`: those that begin, end or fill texts, whatever a template writes."""
        self._special = re.compile(any_of(special))
        self._control = set(control)

    def check(self, reading: Reading, messages: Messages, tools: Tools) -> set[str]:
        """What has to be noted of a conversation's texts. Raises Rejected.

        The assistant may write tokens that the template leaves to it, such as Llama 3.1's
        <|python_tag|>. Tags of thinking in front of its answer are no part of these texts.
        """
        notes = set()
        for turn, _, value in reading.texts:
            token = self.in_text(value) if isinstance(value, str) else None
            if token is None or turn == OF_TOOLS:
                continue
            if messages[turn]["role"] != "assistant" or self._is_control(token, reading):
                problem = f"turn {turn + 1} holds {token}, which the tokenizer reads as a token"
                raise Rejected(REASON, problem)
            notes.add(f"the assistant's turns hold {token}, which is learned as a token")
        if tools and (token := self.in_text(repr(tools))):
            raise Rejected(REASON, f"tools hold {token}, which the tokenizer reads as a token")
        return notes

    def in_text(self, text: str) -> str | None:
        """The first special token that a text spells."""
        spelled = self._special.search(text)
        return spelled[0] if spelled else None

    def _is_control(self, token: str, reading: Reading) -> bool:
        """Whether a token is a part of the conversation's frame."""
        texts = (text.value for text in reading.texts if isinstance(text.value, str))
        by_row = sum(text.count(token) for text in texts)
        return token in self._control or reading.text.count(token) > by_row
