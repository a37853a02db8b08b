"""Rows -> tokens and labels: what a worker process does with a chunk of rows.

A token is learned when it overlaps a span of the assistant's (labels elsewhere are -100); labels come from spans, never
from a comparison with pad, so that pad == eos does no harm. Nothing here draws a random number or depends on how many
processes there are.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmpipe.data import templates
from llmpipe.data.formats import Rejected, convert
from llmpipe.data.sources import Bad, parse
from llmpipe.data.tokenizer import Tokenizer

IGNORED = -100


class Encoded(NamedTuple):
    """One row's tokens: pieces of at most max_length, and which of them are learned."""

    ids: list[np.ndarray]  # int32 (n,)
    labels: list[np.ndarray]  # int32 (n,), -100 where not learned
    truncated: bool


@dataclass
class Batch:
    """A chunk's result, flat so that it crosses a process border cheaply. Rows and pieces are in source order."""

    ids: np.ndarray  # int32, all pieces after one another
    labels: np.ndarray  # int32, the same
    lengths: np.ndarray  # int32, one per piece
    pieces: np.ndarray  # int32, one per kept row
    hashes: np.ndarray  # uint64, one per kept row: equal tokens, equal hash
    read: int = 0
    truncated: int = 0
    split: int = 0
    rejected: list[tuple[int, str, str]] = field(default_factory=list)  # row, reason, detail


class Encoder:
    """Tokenizer and template of one preparation; `batch` turns rows into a Batch."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: templates.Template | None,
        text_eos: str,
        *,
        max_length: int,
        loss: str,
        seed: int,
    ):
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.learn_all = loss == "all"
        self.key = seed.to_bytes(8, "little")
        backend = self.tokenizer.backend
        self.bos = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        self.bos_id = self.tokenizer.id("bos_token")
        self.eos_text = text_eos
        self.eos = backend.token_to_id(text_eos)
        ends = self.template.ends if self.template else ()
        self.ends = {tokenizer.ids(end)[-1] for end in ends}

    def batch(self, rows: list[tuple[int, Any]], format: str, columns: dict[str, str]) -> Batch:
        """Rows of one file -> tokens. A row's own mistakes end up in `rejected`; nothing is raised for them."""
        rejected: list[tuple[int, str, str]] = []
        jobs: list[tuple[int, tuple]] = []  # row number, what `_finish` needs
        texts: list[str] = []
        with templates.bounded() as tick:
            for number, payload in rows:
                try:
                    if isinstance(payload, bytes):
                        payload = parse(payload)
                    if isinstance(payload, Bad):
                        raise Rejected(*payload)
                    tick()
                    job = self._texts(convert(payload, format, columns))
                except Rejected as error:
                    rejected.append((number, error.reason, error.detail))
                    continue
                jobs.append((number, (len(texts), *job[1:])))
                texts += job[0]
        encodings = self.tokenizer.backend.encode_batch(texts, add_special_tokens=False)
        ids, labels, lengths, pieces, hashes = [], [], [], [], []
        truncated = split = 0
        for number, job in jobs:
            try:
                row = self._finish(encodings, *job)
            except Rejected as error:
                rejected.append((number, error.reason, error.detail))
                continue
            digest = hashlib.blake2b(key=self.key, digest_size=8)
            for piece in row.ids:
                digest.update(piece)
                lengths.append(len(piece))
            hashes.append(int.from_bytes(digest.digest(), "little"))
            pieces.append(len(row.ids))
            ids += row.ids
            labels += row.labels
            truncated += row.truncated
            split += len(row.ids) > 1
        none = [np.empty(0, np.int32)]
        return Batch(
            np.concatenate(ids or none), np.concatenate(labels or none), np.array(lengths, np.int32),
            np.array(pieces, np.int32), np.array(hashes, np.uint64), len(rows), truncated, split, sorted(rejected),
        )  # fmt: skip

    def _texts(self, example: dict[str, Any]) -> tuple[list[str], str, Any]:
        """An example -> (texts to tokenize, which kind it is, its spans)."""
        if "messages" in example:
            if self.template is None:
                raise Rejected("template refuses", "there is no chat template")
            text, spans = self.template.turns(example["messages"], example["tools"], example.get("first", 0))
            return [text], "chat", spans
        if "completion" in example:
            whole = example["prompt"] + example["completion"].removesuffix(self.eos_text)
            return [example["prompt"], whole], "pair", None
        return [example["text"].removesuffix(self.eos_text)], "text", None

    def _finish(self, encodings: list, at: int, kind: str, spans: Any) -> Encoded:
        if kind == "chat":
            return self._chat(encodings[at], spans)
        if kind == "text":
            return self._text(encodings[at].ids)
        return self._pair(encodings[at].ids, encodings[at + 1].ids)

    def _chat(self, encoding: Any, spans: list[templates.Span]) -> Encoded:
        numbers, total = encoding.ids, len(encoding)
        if self.bos_id is not None and numbers[:2] == [self.bos_id, self.bos_id]:
            raise Rejected("doubled BOS", "the conversation begins with the first token twice")
        # A token that covers the last character before a span and the first of it counts as the assistant's.
        ranges = []
        for start, end in spans:
            if end > start:
                last = encoding.char_to_token(end - 1)
                stop = _token_at(encoding, end)
                ranges.append((_token_at(encoding, start), max(stop, last + 1 if last is not None else 0)))
        if not any(start < stop for start, stop in ranges):
            raise Rejected("nothing to learn", "no token is the assistant's")
        ended = [(start, stop) for start, stop in ranges if numbers[stop - 1] in self.ends]
        if not ended:
            raise Rejected("end of turn not supervised", "no assistant turn ends with the end-of-turn token")
        truncated = total > self.max_length
        if truncated:
            total = max((stop for _, stop in ended if stop <= self.max_length), default=0)
            if not total:
                raise Rejected(
                    "too long", f"{len(encoding):,} tokens, and no assistant turn ends within {self.max_length:,}"
                )
        ids = np.array(numbers[:total], np.int32)
        if self.learn_all:
            return Encoded([ids], [ids], truncated)
        labels = np.full(total, IGNORED, np.int32)
        for start, stop in ranges:
            labels[start : min(stop, total)] = ids[start : min(stop, total)]
        return Encoded([ids], [labels], truncated)

    def _text(self, numbers: list[int]) -> Encoded:
        if not numbers:
            raise Rejected("nothing to learn", "the text has no token")
        ids = np.array([*self.bos, *numbers, self.eos], np.int32)
        if len(ids) <= self.max_length:
            return Encoded([ids], [ids], False)
        pieces = [ids[i : i + self.max_length] for i in range(0, len(ids), self.max_length)]
        return Encoded(pieces, pieces, False)

    def _pair(self, prompt: list[int], whole: list[int]) -> Encoded:
        """As TRL does: the completion begins where prompt and prompt + completion stop being alike."""
        ids = np.array([*self.bos, *whole, self.eos], np.int32)
        if len(ids) > self.max_length:
            raise Rejected("too long", f"{len(ids):,} tokens, {self.max_length:,} fit")
        if self.learn_all:
            return Encoded([ids], [ids], False)
        labels = ids.copy()
        labels[: len(self.bos) + templates.shared(prompt, whole)] = IGNORED
        return Encoded([ids], [labels], False)


def _token_at(encoding: Any, char: int) -> int:
    """The first token at or after a character; some tokenizers drop whitespace, which then has no token."""
    token = encoding.char_to_token(char)
    if token is None:
        offsets = encoding.offsets
        token = next((i for i, (_, end) in enumerate(offsets) if end > char), len(offsets))
    return token


# --- in a worker process ---------------------------------------------------------------------------------------------

_encoder: Encoder | None = None


def load(folder: str, ends: list[str], kwargs: dict[str, Any], text_eos: str, **how: Any) -> Encoder:
    """The encoder of a saved `tokenizer/` folder: what is published is what tokenized."""
    tokenizer = Tokenizer(Path(folder))
    text = tokenizer.template
    template = None if text is None else templates.Template(text, tokenizer.special, kwargs, tuple(ends))
    return Encoder(tokenizer, template, text_eos, **how)


def start_worker(spec: dict[str, Any]) -> None:
    """Pool initializer. Ctrl-C belongs to the parent, and a worker does not outlive it."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    _encoder = load(**spec)


def work(rows: list[tuple[int, Any]], format: str, columns: dict[str, str]) -> Batch:
    if _encoder is None:
        raise RuntimeError("start_worker did not run")
    return _encoder.batch(rows, format, columns)
