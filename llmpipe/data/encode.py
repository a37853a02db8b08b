"""Rows -> tokens and labels: what a worker process does with a chunk of rows.

A token is learned when it overlaps a span of the assistant's (labels elsewhere are -100); labels come from spans, never
from a comparison with pad, so that pad == eos does no harm. Nothing here draws a random number or depends on how many
processes there are.
"""

from __future__ import annotations

import ctypes
import hashlib
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from llmpipe.data import templates
from llmpipe.data.formats import Rejected, convert, question, taught_bytes
from llmpipe.data.pack import IGNORED, lists
from llmpipe.data.sources import Row, parse
from llmpipe.data.tokenizer import Tokenizer

COUNTS = ("read", "kept", "truncated", "split", "pieces")
LIST = pa.list_(pa.int32())
# One row per piece of a kept row. Equal rows have equal hashes; `asks` is `hash_of` what the row asks, `bytes` the size
# of what it teaches; `first` is true for the first piece of a row.
SCHEMA = pa.schema(
    {"ids": LIST, "labels": LIST, "hash": pa.uint64(), "asks": pa.uint64(), "bytes": pa.uint32(), "first": pa.bool_()}
)

Piece = tuple[np.ndarray, np.ndarray]  # ids and labels, int32 (n,) each, 0 < n <= max_length


class Batch(NamedTuple):
    """A chunk's result: `pieces` in SCHEMA and in source order, counts of rows, and (row, reason, detail)."""

    pieces: pa.RecordBatch
    counts: dict[str, int]
    rejected: list[tuple[int, str, str]]


def hash_of(content: bytes, key: bytes = b"") -> int:
    """64 bits of a content."""
    return int.from_bytes(hashlib.blake2b(content, key=key, digest_size=8).digest(), "little")


class Encoder:
    """The saved `tokenizer/` folder of one preparation, since what is published has to be what tokenized.

    `ends` and `kwargs` as in templates.Template; `text_eos` ends a plain text.
    """

    def __init__(
        self, folder: Path, ends: list[str], kwargs: dict, text_eos: str, max_length: int, loss: str, seed: int
    ):
        self.tokenizer = tokenizer = Tokenizer(folder)
        self.template = tokenizer.template and templates.Template(tokenizer.template, tokenizer.special, kwargs, ends)
        self.ends = {tokenizer.ids(end)[-1] for end in ends}
        self.bos = [] if tokenizer.bos is None else [tokenizer.bos]
        self.eos_text, self.eos = text_eos, tokenizer.backend.token_to_id(text_eos)
        self.max_length, self.learn_all = max_length, loss == "all"
        self.key = seed.to_bytes(8, "little")

    def batch(self, rows: list[Row], format: str, columns: dict[str, str]) -> Batch:
        """Rows of one file -> tokens. A row's own mistakes end up in `rejected`; nothing is raised for them."""
        counts = dict.fromkeys(COUNTS, 0) | {"read": len(rows)}
        rejected: list[tuple[int, str, str]] = []
        pieces: list[Piece] = []
        hashes: list[int] = []
        asks: list[int] = []
        sizes: list[int] = []
        first: list[bool] = []
        for number, payload in rows:
            try:
                example = convert(parse(payload), format, columns)
                row, truncated = self.row(example)
            except Rejected as error:
                rejected.append((number, error.reason, error.detail))
                continue
            hashes += [hash_of(b"".join(ids.tobytes() for ids, _ in row), self.key)] * len(row)
            asks += [hash_of(question(example).encode())] * len(row)
            sizes += [taught_bytes(example)] * len(row)
            first += [True, *[False] * (len(row) - 1)]
            pieces += row
            counts["kept"] += 1
            counts["truncated"] += truncated
            counts["split"] += len(row) > 1
            counts["pieces"] += len(row) - 1
        lengths = [len(ids) for ids, _ in pieces]
        flat = (np.concatenate([piece[side] for piece in pieces] or [np.empty(0, np.int32)]) for side in (0, 1))
        ids, labels = (lists(lengths, values) for values in flat)
        table = {"ids": ids, "labels": labels, "hash": hashes, "asks": asks, "bytes": sizes, "first": first}
        return Batch(pa.RecordBatch.from_pydict(table, SCHEMA), counts, rejected)

    def row(self, example: dict[str, Any]) -> tuple[list[Piece], bool]:
        """An example of formats.convert -> its pieces, and whether it was truncated. Raises Rejected."""
        if "messages" in example:
            return self._chat(example)
        if "completion" in example:
            return [self._pair(example["prompt"], example["completion"])], False
        numbers = self.tokenizer.ids(example["text"].removesuffix(self.eos_text))
        if not numbers:
            raise Rejected("nothing to learn", "the text has no token")
        ids = np.array([*self.bos, *numbers, self.eos], np.int32)
        pieces = [ids[i : i + self.max_length] for i in range(0, len(ids), self.max_length)]
        return [(piece, piece) for piece in pieces], False

    def _chat(self, example: dict[str, Any]) -> tuple[list[Piece], bool]:
        if not self.template:
            raise Rejected("template refuses", "there is no chat template")
        with templates.bounded():
            text, spans = self.template.turns(example["messages"], example["tools"], example.get("first", 0))
        encoding = self.tokenizer.backend.encode(text, add_special_tokens=False)
        numbers, total = encoding.ids, len(encoding)
        if numbers[:2] == [self.tokenizer.id("bos_token")] * 2:
            raise Rejected("doubled BOS", "the conversation begins with the first token twice")
        # A token that covers the last character before a span and the first of it counts as the assistant's.
        ranges = []
        for start, end in ((start, end) for start, end in spans if start < end):
            last = encoding.char_to_token(end - 1)
            stop = max(_token_at(encoding, end), 0 if last is None else last + 1)
            ranges.append((_token_at(encoding, start), stop))
        if not any(start < stop for start, stop in ranges):
            raise Rejected("nothing to learn", "no token is the assistant's")
        stops = [stop for _, stop in ranges if numbers[stop - 1] in self.ends]
        if not stops:
            raise Rejected("end of turn not supervised", "no assistant turn ends with the end-of-turn token")
        truncated = total > self.max_length
        if truncated:
            total = max((stop for stop in stops if stop <= self.max_length), default=0)
            if not total:
                detail = f"{len(encoding):,} tokens, and no assistant turn ends within {self.max_length:,}"
                raise Rejected("too long", detail)
        ids = np.array(numbers[:total], np.int32)
        labels = ids.copy() if self.learn_all else np.full(total, IGNORED, np.int32)
        for start, stop in ranges:
            labels[start:stop] = ids[start:stop]
        return [(ids, labels)], truncated

    def _pair(self, prompt: str, completion: str) -> Piece:
        """As TRL does: the completion begins where prompt and prompt + completion stop being alike."""
        whole = self.tokenizer.ids(prompt + completion.removesuffix(self.eos_text))
        ids = np.array([*self.bos, *whole, self.eos], np.int32)
        if len(ids) > self.max_length:
            raise Rejected("too long", f"{len(ids):,} tokens, {self.max_length:,} fit")
        labels = ids.copy()
        if not self.learn_all:
            labels[: len(self.bos) + templates.shared(self.tokenizer.ids(prompt), whole)] = IGNORED
        return ids, labels


def _token_at(encoding: Any, char: int) -> int:
    """The first token at or after a character; some tokenizers drop whitespace, which then has no token."""
    token = encoding.char_to_token(char)
    if token is None:
        offsets = encoding.offsets
        token = next((i for i, (_, end) in enumerate(offsets) if end > char), len(offsets))
    return token


# --- in a worker process ---------------------------------------------------------------------------------------------

_encoder: Encoder


def start_worker(spec: dict[str, Any]) -> None:
    """Pool initializer. Ctrl-C belongs to the parent, and a worker does not outlive it."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    _encoder = Encoder(**spec)


def work(rows: list[Row], format: str, columns: dict[str, str]) -> Batch:
    return _encoder.batch(rows, format, columns)
