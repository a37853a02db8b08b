"""How pieces of rows share the sequences that a trainer sees.

Packing is best fit (Ding et al., 2404.10830; TRL's "bfd") within windows of the stream, so that
memory does not grow. Only long rows go by length; short ones fill the gaps in random order, since
rows of one length are often of one kind, and steps would swing between kinds. No document is split
or dropped here, but for blocks, which cut where they are full.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable

import numpy as np
import pyarrow as pa

IGNORED = -100
"""The label of a token that is not learned."""
LIST = pa.list_(pa.int32())

Piece = tuple[np.ndarray, ...]
"""The columns of one example: ids and labels, int32 (n,) each; or what another kind has."""
Sequence = list[Piece]
"""The pieces, or parts of pieces, that share one sequence."""
Layout = Callable[[list[Piece], bool], list[Sequence]]
"""The pieces of a window, and whether no more will follow -> sequences."""


def one_each(pieces: list[Piece], last: bool) -> list[Sequence]:
    """Every piece as a sequence of its own."""
    return [[piece] for piece in pieces]


class BestFit:
    """Pieces in sequences of at most `size` tokens, each in the fullest one that takes it."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, pieces: list[Piece], last: bool) -> list[Sequence]:
        lengths = [len(ids) for ids, *_ in pieces]
        bins = best_fit(lengths, self.size)
        return [[pieces[index] for index in members] for members in bins]


class EndToEnd:
    """Pieces laid end to end and cut into sequences of exactly `size` tokens.

    Only the very last sequence is shorter.
    """

    def __init__(self, size: int):
        self.size = size
        self._unfinished: Sequence = []

    @property
    def carried(self) -> int:
        """Tokens of the sequence that the next pieces go on with."""
        return sum(len(ids) for ids, *_ in self._unfinished)

    def __call__(self, pieces: list[Piece], last: bool) -> list[Sequence]:
        sequences: list[Sequence] = []
        free = 0
        for ids, labels in [*self._unfinished, *pieces]:
            while len(ids):
                if not free:
                    sequences.append([])
                    free = self.size
                sequences[-1].append((ids[:free], labels[:free]))
                rest = ids[free:]
                labels = labels[free:]
                free = max(free - len(ids), 0)
                ids = rest
        self._unfinished = sequences.pop() if free and not last else []
        return sequences


def best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """Indices of `lengths` -> bins of at most `size` in sum, each into the fullest that takes it.

    Rows above a quarter of `size` come first, longest first; the others follow, shuffled by a
    fixed seed.
    """
    bins: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free, bin) of the bins that are not full, ascending
    shuffled = np.random.default_rng(0).permutation(len(lengths)).tolist()

    def longest_first(index: int) -> int:
        return -lengths[index] if 4 * lengths[index] > size else 0

    for index in sorted(shuffled, key=longest_first):
        length = lengths[index]
        tightest = bisect_left(spaces, (length, 0))
        if tightest < len(spaces):
            space, chosen = spaces.pop(tightest)
        else:
            space, chosen = size, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if space > length:
            insort(spaces, (space - length, chosen))
    return bins
