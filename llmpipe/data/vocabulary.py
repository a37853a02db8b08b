"""A tokenizer.json: the tokens it has, those that are added to it, and its text with these.

Read once in a process as long as somebody holds it: one of 262,144 pieces takes two seconds.
"""

from __future__ import annotations

import weakref
from typing import Any

import tokenizers

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.faults import is_panic, misread

_latest: weakref.ReferenceType[Vocabulary] | None = None


class Vocabulary:
    """The tokenizer of a tokenizer.json. Raises UserError (code 3) where the text is none."""

    raw: str
    """The text, with the tokens that were added."""
    backend: tokenizers.Tokenizer
    """Without what the text asks for beside tokens. A post-processor adds special tokens, which are
    never asked for, and trims offsets, which would leave gaps in the masks."""
    first: int | None
    """The token that the post-processor writes before a text, or the text's first."""

    def __init__(self, raw: str):
        self.raw = raw
        self.shared = False
        self._read()

    @classmethod
    def of(cls, raw: str) -> Vocabulary:
        """The one that was made last, where it has this text, or a new one."""
        global _latest
        latest = _latest() if _latest else None
        if latest is not None and latest.raw == raw:
            latest.shared = True
            return latest
        vocabulary = cls(raw)
        _latest = weakref.ref(vocabulary)
        return vocabulary

    def _read(self) -> None:
        try:
            self.backend = tokenizers.Tokenizer.from_str(self.raw)
            self.first = next(iter(self.backend.encode("a").ids), None)
        except BaseException as error:
            # the library raises plain Exception, or panics
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise misread(error, "tokenizer.json of the model", "a tokenizer") from None
        self._post_processor: Any = self.backend.post_processor
        self._truncation: dict[str, Any] | None = self.backend.truncation
        self._padding: dict[str, Any] | None = self.backend.padding
        self._set_aside()

    def _set_aside(self) -> None:
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.post_processor = None

    def _rewrite(self) -> None:
        """Bring `raw` up to date."""
        self.backend.post_processor = self._post_processor
        if self._truncation is not None:
            self.backend.enable_truncation(**self._truncation)
        if self._padding is not None:
            self.backend.enable_padding(**self._padding)
        self.raw = self.backend.to_str()
        self._set_aside()

    def added(self) -> dict[int, tokenizers.AddedToken]:
        """The tokens that are found in a text before it is split into words, by their numbers."""
        added: dict[int, tokenizers.AddedToken] = self.backend.get_added_tokens_decoder()
        return added

    def with_tokens(self, tokens: list[tokenizers.AddedToken]) -> Vocabulary:
        """One that has these tokens, and flags them so; this one is no more to be used.

        Raises UserError where two tokens would have one number.
        """
        own = Vocabulary(self.raw) if self.shared else self
        own._check_room(sum(self.backend.token_to_id(token.content) is None for token in tokens))
        for token in tokens:
            if token.special:
                own.backend.add_special_tokens([token])
            else:
                own.backend.add_tokens([token])
        own._rewrite()
        if max(own.added(), default=0) >= own.backend.get_vocab_size():
            # The numbers have holes, and whoever reads the file puts new tokens into these.
            own._read()
            own._rewrite()
            numbers = own.backend.get_vocab().values()
            if len(set(numbers)) < len(numbers):
                raise _holes("two tokens would have one")
        return own

    def beginning_with(self, first: tuple[str, int] | None) -> Vocabulary:
        """One whose post-processor begins a text with this token, or with none."""
        own = Vocabulary(self.raw) if self.shared else self
        template: dict[str, Any] = {"single": "$A", "pair": "$A $B:1"}
        if first is not None:
            token = first[0]
            pair = f"{token} $A {token}:1 $B:1"
            template = {"single": f"{token} $A", "pair": pair, "special_tokens": [first]}
        own._post_processor = tokenizers.processors.TemplateProcessing(**template)
        own.first = first[1] if first else next(iter(own.backend.encode("a").ids), None)
        own._rewrite()
        return own

    def _check_room(self, count: int) -> None:
        """The numbers of new tokens follow those of added ones; in a vocabulary with holes they
        may be taken.
        """
        size = self.backend.get_vocab_size(with_added_tokens=False)
        highest = max(self.added(), default=-1)
        first = highest + 1 if highest >= size else size
        for number in range(first, first + count):
            if (token := self.backend.id_to_token(number)) is not None:
                raise _holes(f"the next, {number}, is that of {token!r}")


def _holes(problem: str) -> UserError:
    problem = f"no token can be added to the tokenizer: its numbers have holes, and {problem}"
    return UserError(problem, "data.template names one whose tokens it has", INTEGRITY)
