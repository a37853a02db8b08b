"""Rows -> tokens and labels: what a worker process does with a chunk of rows.

A token is learned when it overlaps a span of the assistant's (labels elsewhere are -100); labels come from spans, never
from a comparison with pad, so that pad == eos does no harm. Nothing here draws a random number or depends on how many
processes there are.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from llmpipe.data import template
from llmpipe.data.formats import (
    Completion,
    Conversation,
    Document,
    Example,
    Preference,
    Rejected,
    convert,
    prompt_and_reference,
    question,
    taught_bytes,
)
from llmpipe.data.formats.examples import Messages, Tools
from llmpipe.data.pack import COLUMNS, IGNORED, Piece
from llmpipe.data.sources import Row, parse
from llmpipe.data.tokenizer import Tokenizer

# One row per piece of a kept row: the columns of pack.COLUMNS for the kind of data, and these. Equal rows have equal
# hashes, and so have pairs with equal prompts; `asks` is `hash_of` what the row asks, `bytes` the size of what it
# teaches; `first` is true for the first piece of a row.
ABOUT = {"hash": pa.uint64(), "asks": pa.uint64(), "bytes": pa.uint32(), "first": pa.bool_()}


def schema_of(kind: str) -> pa.Schema:
    return pa.schema(COLUMNS[kind] | ABOUT)


class Batch(NamedTuple):
    """A chunk's result: `pieces` of `schema_of` and in source order, prepare's COUNTS, and (row, reason, detail)."""

    pieces: pa.RecordBatch
    counts: Counter[str]
    rejected: list[tuple[int, str, str]]


def hash_of(content: bytes, key: bytes = b"") -> int:
    """64 bits of a content."""
    return int.from_bytes(hashlib.blake2b(content, key=key, digest_size=8).digest(), "little")


class Encoder:
    """The saved `tokenizer/` folder of one preparation, since what is published has to be what tokenized.

    `ends` and `kwargs` as in template.Template; `eos` ends a plain text.
    """

    def __init__(
        self, folder: Path, ends: list[str], kwargs: dict, eos: str, max_length: int, loss: str, seed: int,
        kind: str = "rows",
    ):  # fmt: skip
        self.tokenizer = tokenizer = Tokenizer(folder)
        self.template = tokenizer.template and template.Template(
            tokenizer.template, tokenizer.special, kwargs, ends
        )
        self.ends = {tokenizer.ids(end)[-1] for end in ends}
        self.bos = [] if tokenizer.bos is None else [tokenizer.bos]
        self.eos_text, self.eos = eos, tokenizer.backend.token_to_id(eos)
        self.max_length, self.learn_all = max_length, loss == "all"
        self.key, self.kind = seed.to_bytes(8, "little"), kind
        self.schema, self.columns = schema_of(kind), list(COLUMNS[kind])

    def batch(self, rows: list[Row], format: str, columns: dict[str, str]) -> Batch:
        """Rows of one file -> tokens. A row's own mistakes end up in `rejected`; nothing is raised for them."""
        pieces: list[dict[str, Any]] = []  # of the schema
        rejected: list[tuple[int, str, str]] = []
        counts = Counter(read=len(rows))
        for number, payload in rows:
            try:
                raw = parse(payload)
                example = convert(raw, format, columns)
                if self.kind == "prompts":
                    rest = {name: value for name, value in raw.items() if name not in columns}
                    row, truncated = self.prompt(example, rest)
                elif isinstance(example, Preference):
                    row, truncated = self.pair(example)
                else:
                    row, truncated = self.row(example)
            except Rejected as error:
                rejected.append((number, error.reason, error.detail))
                continue
            whole = b"".join(
                piece[0].tobytes() for piece in row
            )  # of a pair the prompt: it is held out or it is not
            asks = hash_of(question(example).encode())
            about = {"hash": hash_of(whole, self.key), "asks": asks, "bytes": taught_bytes(example)}
            pieces += [
                {**dict(zip(self.columns, piece, strict=True)), "first": not i, **about}
                for i, piece in enumerate(row)
            ]
            counts.update(kept=1, truncated=truncated, split=len(row) > 1, pieces=len(row) - 1)
        return Batch(pa.RecordBatch.from_pylist(pieces, self.schema), counts, rejected)

    def row(self, example: Example) -> tuple[list[Piece], bool]:
        """An example -> its pieces, and whether it was truncated. Raises Rejected."""
        if isinstance(example, Conversation):
            return self._chat(example)
        if isinstance(example, Completion):
            prompt, rest = example.prompt, example.completion
        else:
            assert isinstance(example, Document)
            prompt, rest = "", example.text
        numbers = self.tokenizer.ids(prompt + rest.removesuffix(self.eos_text))
        if not numbers:
            raise Rejected("nothing to learn", "the text has no token")
        ids = np.array([*self.bos, *numbers, self.eos], np.int32)
        if isinstance(example, Document):
            pieces = [ids[i : i + self.max_length] for i in range(0, len(ids), self.max_length)]
            return [(piece, piece) for piece in pieces], False
        if len(ids) > self.max_length:
            raise Rejected("too long", f"{len(ids):,} tokens, {self.max_length:,} fit")
        labels = ids.copy()
        if (
            not self.learn_all
        ):  # as TRL does: what is learned begins where prompt and prompt + completion differ
            labels[: len(self.bos) + template.shared(self.tokenizer.ids(prompt), numbers)] = IGNORED
        return [(ids, labels)], False

    def pair(self, example: Preference) -> tuple[list[Piece], bool]:
        """A preference -> [(prompt, chosen, rejected, margin)], and whether an answer was truncated. Raises Rejected.

        As in TRL, an answer begins where its rendering and the prompt's part, the same for both; as in `row`, it ends
        with its end-of-turn token. `margin` is a number, or empty.
        """
        prompt, tools = example.prompt, example.tools
        sides = [
            self.answered(prompt, answer, tools) for answer in (example.chosen, example.rejected)
        ]
        before = self._asked(prompt, tools)
        begin = min(template.shared(before, ids) for ids in sides)
        if begin >= self.max_length:
            raise Rejected(
                "too long",
                f"the prompt has {begin:,} tokens, {self.max_length:,} fit with an answer",
            )
        cut = [np.array(ids[begin : self.max_length], np.int32) for ids in sides]
        truncated = any(len(ids) > self.max_length for ids in sides)
        if min(map(len, cut)) == 0:
            raise Rejected("nothing to learn", "an answer has no token of its own")
        if np.array_equal(*cut):
            raise Rejected(
                "cut to the same text" if truncated else "chosen equals rejected", "in tokens"
            )
        margin = np.array([] if example.margin is None else [example.margin], np.float32)
        return [(np.array(sides[0][:begin], np.int32), *cut, margin)], truncated

    def prompt(self, example: Example, columns: dict[str, Any]) -> tuple[list[Piece], bool]:
        """A row that asks something -> [(tokens, row)]: up to where an answer begins, and, as JSON in UTF-8, the prompt
        (text or messages), tools, the answer that the row has, and its other `columns`. Raises Rejected."""
        prompt, reference = prompt_and_reference(example)
        tools = None if isinstance(example, Document | Completion) else example.tools
        ids = self._asked(prompt, tools)
        if len(ids) > self.max_length:
            raise Rejected(
                "too long", f"the prompt has {len(ids):,} tokens, {self.max_length:,} fit"
            )
        if not ids:
            raise Rejected("empty text", "the prompt has no token")
        row = {
            "prompt": prompt,
            "tools": tools,
            "reference": reference,
            "columns": columns,
        }
        text = json.dumps(row, default=str).encode()
        return [(np.array(ids, np.int32), np.frombuffer(text, np.uint8))], False

    def _asked(self, prompt: str | list[dict], tools: list[dict] | None) -> list[int]:
        """Tokens of a prompt, up to where an answer would begin."""
        if isinstance(prompt, str):
            return [*self.bos, *self.tokenizer.ids(prompt)]
        if not self.template:
            raise Rejected("template refuses", "there is no chat template")
        with template.bounded():
            text, _ = self.template.render(template.clean(prompt), tools, True)
        return self.tokenizer.ids(text)

    def answered(
        self, prompt: str | Messages, answer: str | Messages, tools: Tools = None
    ) -> list[int]:
        """Tokens of a prompt with an answer to it, to the end of its last turn. Raises Rejected.

        Both are texts, or both are messages.
        """
        if isinstance(prompt, str):
            assert isinstance(answer, str)
            return [
                *self.bos,
                *self.tokenizer.ids(prompt + answer.removesuffix(self.eos_text)),
                self.eos,
            ]
        if not self.template:
            raise Rejected("template refuses", "there is no chat template")
        with template.bounded():
            text, spans = self.template.turns([*prompt, *answer], tools, len(prompt))
        encoding = self.tokenizer.backend.encode(text, add_special_tokens=False)
        return encoding.ids[: _behind(encoding, spans[-1][1])]

    def _chat(self, example: Conversation) -> tuple[list[Piece], bool]:
        if not self.template:
            raise Rejected("template refuses", "there is no chat template")
        with template.bounded():
            text, spans = self.template.turns(example.messages, example.tools, example.first)
        encoding = self.tokenizer.backend.encode(text, add_special_tokens=False)
        numbers = encoding.ids
        if numbers[:2] == [self.tokenizer.id("bos_token")] * 2:
            raise Rejected("doubled BOS", "the conversation begins with the first token twice")
        # A token that covers the last character before a span and the first of it counts as the assistant's.
        ranges = []
        for start, end in ((start, end) for start, end in spans if start < end):
            ranges.append((_token_at(encoding, start), _behind(encoding, end)))
        if not any(start < stop for start, stop in ranges):
            raise Rejected("nothing to learn", "no token is the assistant's")
        stops = [stop for _, stop in ranges if numbers[stop - 1] in self.ends]
        if not stops:
            raise Rejected(
                "end of turn not supervised", "no assistant turn ends with the end-of-turn token"
            )
        total = len(numbers)
        if total > self.max_length:
            total = max((stop for stop in stops if stop <= self.max_length), default=0)
            if not total:
                detail = f"{len(numbers):,} tokens, and no assistant turn ends within {self.max_length:,}"
                raise Rejected("too long", detail)
        ids = np.array(numbers[:total], np.int32)
        labels = ids.copy() if self.learn_all else np.full(total, IGNORED, np.int32)
        for start, stop in ranges:
            labels[start:stop] = ids[start:stop]
        return [(ids, labels)], total < len(numbers)


def _token_at(encoding: Any, char: int) -> int:
    """The first token at or after a character; some tokenizers drop whitespace, which then has no token."""
    token = encoding.char_to_token(char)
    if token is None:
        offsets = encoding.offsets
        token = next((i for i, (_, end) in enumerate(offsets) if end > char), len(offsets))
    return token


def _behind(encoding: Any, char: int) -> int:
    """The first token behind a character that ends a span; one that holds the span's last character belongs to it."""
    last = encoding.char_to_token(char - 1)
    return max(_token_at(encoding, char), 0 if last is None else last + 1)


_encoder: Encoder


def start_worker(*spec: Any) -> None:
    """Pool initializer. Ctrl-C belongs to the parent, and a worker does not outlive it."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    _encoder = Encoder(*spec)


def work(rows: list[Row], format: str, columns: dict[str, str]) -> Batch:
    return _encoder.batch(rows, format, columns)
