"""Texts and conversations -> tokens, for every kind of data.

Nothing here draws a random number or depends on how many processes there are. Labels come from
the spans in which the assistant speaks, never from a comparison with pad, so that pad == eos does
no harm.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from llmpipe.data import template
from llmpipe.data.examples import Messages, Tools
from llmpipe.data.formats import Rejected
from llmpipe.data.tokenizer import Tokenizer
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.recipe.sections import Preparation
from llmpipe.scores.thinking import CLOSING, OPENING, TAG, opening_of

SECONDS = 6.0
"""That a template may take in any case."""

SECONDS_PER_ROW = 0.25
"""And that, of every row; one takes some milliseconds."""

SECONDS_PER_CHARACTER = 1e-5
"""Or that, of every character; the proofs that go with one take a tenth."""

NO_TOKEN = "texts hold characters that the tokenizer has no token for, and these are lost"

CANNOT_APPEND = "the chat template cannot append a turn"
SAYINGS = ("So it is.", f"{OPENING}Let me see.\n{CLOSING}\n\nSo it is.")
"""Stand for what a policy says: without a thought, and with one."""
ASKING: Messages = [{"role": "user", "content": "Is it so?"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def hash_of(content: bytes, key: bytes = b"") -> int:
    """64 bits of a content."""
    return int.from_bytes(hashlib.blake2b(content, key=key, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Encoding:
    """What an Encoder is made of. It is sent to worker processes."""

    tokenizer: Path
    """A saved folder of one preparation, since what is published has to be what tokenized."""
    ends: list[str]
    """What ends an assistant's turn, as in `template.Template`."""
    text_eos: str
    """What ends a plain text."""
    preparation: Preparation


class Rendered:
    """A rendered conversation as tokens, and where the assistant speaks."""

    def __init__(self, encoding: Any, spans: list[tuple[int, int]]):
        """`encoding`: a `tokenizers.Encoding`; `spans`: characters, [start, end) each."""
        self.ids: list[int] = encoding.ids
        self.spans = spans
        self._encoding = encoding

    def from_char(self, char: int) -> int:
        """The first token at or after a character.

        Some tokenizers drop whitespace, which then has no token.
        """
        token: int | None = self._encoding.char_to_token(char)
        if token is not None:
            return token
        offsets = self._encoding.offsets
        return next((i for i, (_, end) in enumerate(offsets) if end > char), len(offsets))

    def behind(self, char: int) -> int:
        """The first token behind a character that ends a span.

        A token that holds the span's last character belongs to it.
        """
        last: int | None = self._encoding.char_to_token(char - 1)
        return max(self.from_char(char), 0 if last is None else last + 1)

    def spoken(self) -> list[tuple[int, int]]:
        """Tokens [start, end) of every span that is not empty.

        A token that covers the last character before a span and the first of it is the assistant's.
        """
        spans = ((start, end) for start, end in self.spans if start < end)
        return [(self.from_char(start), self.behind(end)) for start, end in spans]


class Answered(NamedTuple):
    """A prompt with an answer, as tokens."""

    ids: list[int]
    gaps: list[tuple[int, int]]
    """Tokens [start, end) between the assistant's turns: what users and tools say there, which is
    not learned."""

    def learned(self, begin: int) -> list[bool]:
        """Of each token, whether it is the assistant's; the answer's first is number `begin`."""
        learned = [i >= begin for i in range(len(self.ids))]
        for start, end in self.gaps:
            learned[start:end] = [False] * (end - start)
        return learned

    def context(self, begin: int, end: int) -> list[int]:
        """Which tokens of those from `begin` to `end` are in gaps, counted from `begin`."""
        inside = (i for gap in self.gaps for i in range(*gap))
        return [i - begin for i in inside if begin <= i < end]


class Reply(NamedTuple):
    """What follows an answer when somebody replies to it, as tokens."""

    end: int
    """The last token of what ends the answer."""
    ids: list[int]
    """Behind that, up to where the next answer would begin."""


class Encoder:
    """Tokens as one preparation makes them. A row's own mistakes raise Rejected.

    `noted` holds sentences on what was done with rows that nobody would expect of them; whoever
    counts them by row clears it before each.
    """

    def __init__(self, encoding: Encoding):
        self.noted: set[str] = set()
        self.at = ""
        """File and line of the row, as a message names it."""
        self.seconds = 0.0
        """Of the processor, for templates; in that time `rows` with `rendered` characters."""
        self.rows = self.rendered = 0
        self.tokenizer = tokenizer = Tokenizer(encoding.tokenizer)
        self.template: template.Template | None = None
        if tokenizer.template:
            self.template = template.Template(
                tokenizer.template,
                tokenizer.special,
                encoding.preparation.template_kwargs,
                encoding.ends,
            )
        self.ends = {tokenizer.ids(end)[-1] for end in encoding.ends}
        self.bos = [] if tokenizer.bos is None else [tokenizer.bos]
        self.text_eos = encoding.text_eos
        eos = tokenizer.backend.token_to_id(encoding.text_eos)
        assert eos is not None  # `Choice` took it from this tokenizer
        self.eos = eos
        control = [*tokenizer.special.values(), *map(tokenizer.last, encoding.ends)]
        self._spelled = template.Spelled(tokenizer.special_tokens(), control)
        self.max_length = encoding.preparation.max_length
        self.learn_all = encoding.preparation.learn_all

    def conversation(
        self, messages: Messages, tools: Tools, first: int = 0, *, proven: bool = True
    ) -> Rendered:
        """A rendered conversation; its spans are the assistant's from message `first` on.

        Unless `proven`, it holds what a model answered, whatever that is.
        """
        renderer = self._renderer()
        with self._timed():
            reading = template.turns(renderer, messages, tools, first, proven=proven)
        self.rendered += len(reading.text)
        if proven:
            self.noted |= self._spelled.check(reading, messages, tools)
            self._check_tokens(reading.texts)
        self.noted |= reading.notes
        encoding = self.tokenizer.backend.encode(reading.text, add_special_tokens=False)
        return Rendered(encoding, reading.spans)

    def spoken(self, messages: Messages, tools: Tools, first: int = 0) -> str:
        """The text of the spans of `conversation`, one behind the other."""
        renderer = self._renderer()
        with self._timed():
            reading = template.turns(renderer, messages, tools, first)
        self.rendered += len(reading.text)
        return "".join(reading.text[start:end] for start, end in reading.spans)

    def prompt(self, prompt: str | Messages, tools: Tools, *, think: bool = False) -> list[int]:
        """Tokens of a prompt, up to where an answer would begin. To `think`, a text ends in the tag
        that opens a block of thought; a template has it itself. Raises Rejected."""
        if isinstance(prompt, str):
            return [*self.bos, *self.text(_to_think(prompt) if think else prompt)]
        renderer = self._renderer()
        with self._timed():
            reading = template.prompt(renderer, prompt, tools)
        self.rendered += len(reading.text)
        self.noted |= reading.notes | self._spelled.check(reading, prompt, tools)
        self._check_tokens(reading.texts)
        return self.tokenizer.ids(reading.text)

    def answered(
        self,
        prompt: str | Messages,
        answer: str | Messages,
        tools: Tools = None,
        *,
        proven: bool = True,
    ) -> Answered:
        """A prompt with an answer, to the end of its last turn.

        Both are texts, or both are messages. Unless `proven`, a model gave the answer.
        """
        if isinstance(prompt, str):
            assert isinstance(answer, str)
            text = prompt + answer.removesuffix(self.text_eos)
            return Answered([*self.bos, *self.text(text), self.eos], [])
        conversation = self.conversation([*prompt, *answer], tools, len(prompt), proven=proven)
        spoken = conversation.spoken()
        gaps = [(end, start) for (_, end), (start, _) in pairwise(spoken) if end < start]
        _, end = conversation.spans[-1]
        return Answered(conversation.ids[: conversation.behind(end)], gaps)

    def reply(self, prompt: Messages, replies: list[Messages], tools: Tools = None) -> Reply:
        """What a template writes between an answer and the next when the last of these replies
        stands there; `replies`: all so far, each to an answer. Raises Rejected.

        Answers stand as they were drawn and are never rendered again. So the template has to write
        behind an answer without touching what it wrote before: of answers that stand for any, with
        a thought and without, that is proven each time, and with it, reply by reply, that the whole
        is what the template renders of the conversation.
        """
        end, text = self._behind_answer(prompt, replies, tools, SAYINGS[0])
        if (end, text) != self._behind_answer(prompt, replies, tools, SAYINGS[1]):
            raise Rejected(CANNOT_APPEND, "what it writes behind an answer depends on the answer")
        before, ids = self.tokenizer.ids(end), self.tokenizer.ids(end + text)
        if ids[: len(before)] != before:
            raise Rejected(CANNOT_APPEND, f"the tokenizer joins {end} and what follows it")
        return Reply(before[-1], ids[len(before) :])

    def _behind_answer(
        self, prompt: Messages, replies: list[Messages], tools: Tools, saying: str
    ) -> tuple[str, str]:
        """What ends an answer, and the text behind it, where each answer is `saying`."""
        renderer, answer = self._renderer(), {"role": "assistant", "content": saying}
        *earlier, reply = replies
        before = [*prompt, *(turn for each in earlier for turn in (answer, *each))]
        messages = [*before, answer, *reply]
        with self._timed():
            sent = template.prompt(renderer, before, tools).text
            reading = template.prompt(renderer, messages, tools)
        self._spelled.check(reading, messages, tools)
        self._check_tokens(reading.texts)
        end = None
        if reading.text.startswith(sent + saying):
            end = renderer.end.match(reading.text, len(sent + saying))
        if end is None:
            detail = "a reply changes what it writes of the turns before"
            if opening_of(sent):
                detail = "it opens a block of thought where an answer begins, not in earlier turns"
            elif saying != SAYINGS[0]:
                detail += ", such as one that leaves out what they think"
            raise Rejected(CANNOT_APPEND, detail)
        return end.group(), reading.text[end.end() :]

    def check_time(self, row: int) -> None:
        """Raise UserError (3) where the template takes longer than an honest one could, over all
        the rows so far, of which `row` is the last."""
        self.rows += 1
        slow = max(self.rows * SECONDS_PER_ROW, self.rendered * SECONDS_PER_CHARACTER, SECONDS)
        if self.seconds > slow:
            problem = f"{self.seconds:.1f} s for {self.rows:,} rows, of which row {row} is the last"
            hint = "data.template names another one"
            raise UserError(f"the chat template takes too long: {problem}", hint, INTEGRITY)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Bounded, and counted."""
        begun = time.process_time()
        try:
            with template.bounded():
                yield
        finally:
            self.seconds += time.process_time() - begun

    def text(self, text: str) -> list[int]:
        """Tokens of a plain text. What is spelled like a token becomes it: people write templates
        and the borders of documents by hand; but it is noted."""
        if token := self._spelled.in_text(text):
            self.noted.add(f"texts hold {token}, which is read as that token")
        if not self.tokenizer.has_all and self._lost(text):
            self.noted.add(NO_TOKEN)
        return self.tokenizer.ids(text)

    def _check_tokens(self, texts: list[template.Text]) -> None:
        """Raises Rejected for a character without a token. A template's own words are its own."""
        if self.tokenizer.has_all:
            return
        for _, _, value in texts:
            if isinstance(value, str) and (lost := self._lost(value)):
                raise Rejected("no token", f"the tokenizer has none for {lost!r}")

    def _lost(self, text: str) -> str | None:
        encoding = self.tokenizer.backend.encode(text, add_special_tokens=False)
        return self.tokenizer.lost(text, encoding)

    def _renderer(self) -> template.Template:
        if self.template is None:
            raise Rejected("template refuses", "there is no chat template")
        return self.template


def encoder_of(folder: Path, kwargs: dict[str, Any]) -> Encoder:
    """What encodes conversations as training does, uncut, by the tokenizer in a folder and its
    template; `kwargs`: the template's."""
    choice = template.choose(folder, "auto", kwargs)
    uncut = Preparation(max_length=1 << 40, template_kwargs=kwargs)
    return Encoder(Encoding(folder, choice.ends, choice.text_eos, uncut))


def refuse_no_reply(encoder: Encoder) -> None:
    """Raise UserError (2) where the template can append neither a user's turn nor a tool's: answers
    that end, and so are replied to, may come late in a training."""
    refusals = []
    for role, tools in (("user", None), ("tool", [TOOL])):
        try:
            encoder.reply(ASKING, [[{"role": role, "content": "Look."}]], tools)
        except Rejected as refusal:
            refusals.append(refusal)
    if len(refusals) == 2:
        problem = f"data.template: the environment takes turns, and {refusals[0]}"
        raise UserError(problem, "name another template; chatml can")


def _to_think(prompt: str) -> str:
    """A text that ends in the tag that opens a block of thought."""
    return prompt if prompt.rstrip().endswith(TAG) else prompt + OPENING
