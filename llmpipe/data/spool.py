"""Tokenized rows on disk, until it is known which of them are held out and how often each is seen.

Of each row 8 bytes of hash stay in memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa

from llmpipe.faults import reading


class Spool:
    """Batches of pieces in a file; a context while they are added."""

    def __init__(self, path: Path, schema: pa.Schema, train_sources: int):
        """`train_sources`: how many sources, the first ones, are trained on; others evaluate."""
        self.path = path
        self.train_sources = train_sources
        self._sources: list[int] = []  # of each batch
        self._train_hashes = array("Q")
        self._eval_hashes = array("Q")
        self._file = pa.ipc.new_stream(str(path), schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, source: int, pieces: pa.RecordBatch) -> None:
        """Pieces of the source with this number, as `tokenize` makes them."""
        first = pieces["first"].to_numpy(zero_copy_only=False)
        hashes = pieces["hash"].to_numpy()[first]
        seen = self._train_hashes if source < self.train_sources else self._eval_hashes
        seen.frombytes(hashes.tobytes())
        self._file.write_batch(pieces)
        self._sources.append(source)

    def batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Every batch with the number of its source, in order."""
        with (
            reading(self.path, "Arrow"),
            pa.OSFile(str(self.path)) as file,
            pa.ipc.open_stream(file) as reader,
        ):
            yield from zip(self._sources, reader, strict=True)

    @cached_property
    def train_hashes(self) -> np.ndarray:
        """Of the rows of the sources to train on: uint64 (rows,), sorted."""
        return np.sort(np.asarray(self._train_hashes))

    @property
    def eval_hashes(self) -> np.ndarray:
        """Of the rows of the sources to evaluate on: uint64 (rows,)."""
        return np.asarray(self._eval_hashes)


class Share(NamedTuple):
    """Where the pieces of a batch go."""

    held_out: np.ndarray
    """bool (pieces,)"""
    copies: np.ndarray
    """int (pieces,): how often a piece is written; 1 for what is held out."""


@dataclass(frozen=True)
class Division:
    """Which rows are held out, and how often the others are trained on."""

    cut: np.uint64
    """A row of a source to train on is held out when its hash is below."""
    weights: list[float]
    """Of the sources to train on; what is not among them is held out."""
    seed: int

    def share(self, source: int, hashes: np.ndarray) -> Share:
        """`hashes`: uint64 (pieces,), of a batch of the source with this number."""
        if source >= len(self.weights):
            return Share(np.full(len(hashes), True), np.ones(len(hashes), np.int64))
        held_out = hashes < self.cut
        return Share(held_out, np.where(held_out, 1, self._copies(source, hashes)))

    def _copies(self, source: int, hashes: np.ndarray) -> np.ndarray:
        """How often each piece is trained on: 1.5 is once, and twice for a half drawn by hash."""
        # the hash chose the held-out rows already, so it is mixed anew for the weight
        mixed = hashes ^ np.uint64(self.seed * 2654435761 + source)
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        uniform = (mixed >> np.uint64(11)) / 2.0**53
        weight = self.weights[source]
        always = int(weight)
        return always + (uniform < weight - always)


def held_out_cut(hashes: np.ndarray, share: float) -> np.uint64:
    """The number below which a row's hash means that it is held out; 0 for none.

    `hashes`: uint64 (rows,), sorted. Equal rows stay together: the cut falls between two different
    hashes, at or before the number of rows that `share` asks for.
    """
    if not share or not len(hashes) or hashes[0] == hashes[-1]:
        return np.uint64(0)
    rows = max(1, round(share * len(hashes)))
    cut: np.uint64 = hashes[min(rows, len(hashes) - 1)]
    if cut == hashes[0]:
        cut = hashes[np.searchsorted(hashes, cut, "right")]
    return cut
