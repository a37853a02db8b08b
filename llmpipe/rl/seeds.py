"""Random numbers that have no state to keep.

A generator's seed is made of the recipe's seed, what the numbers are for, and the place that they
are for: an update, an episode. So a resumed run draws what the straight one would have drawn, and
neither batches nor processes change what an episode gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch


class Use(IntEnum):
    """What random numbers are for."""

    ORDER = 0
    """The order of the prompts."""
    DRAW = 1
    """The tokens of a response."""
    SHUFFLE = 2
    """Which episodes are a minibatch."""
    HELD_OUT = 3
    """The tokens of a response to a held-out prompt."""
    MIXTURE = 4
    """The order of the rows that are mixed in."""
    PROBE = 5
    """The tokens that two engines are compared by."""
    SOLVED = 6
    """The tokens of a response of the pass that says which prompts are learned from."""
    SAMPLE = 7
    """The tokens of a response that `sample` draws."""


class Place(NamedTuple):
    """Whose random numbers."""

    use: Use
    update: int
    episode: int
    turn: int = 0

    @property
    def key(self) -> tuple[int, ...]:
        """What tells it from all others; that of a first turn is the episode's own."""
        return self if self.turn else self[:-1]


def number(seed: int, use: int, *place: int) -> int:
    """A seed of its own for each seed, use and place, of 64 bits.

    NumPy's SeedSequence mixes them, which is made for this (O'Neill 2015).
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(use, *place))
    (mixed,) = sequence.generate_state(1, np.uint64)
    return int(mixed)


def generator(seed: int, use: int, *place: int) -> torch.Generator:
    """A generator of its own for each seed, use and place: an update, an episode of it."""
    return torch.Generator().manual_seed(number(seed, use, *place))


def shuffled(count: int, numbers: torch.Generator) -> list[int]:
    """So many places in a random order."""
    order: list[int] = torch.randperm(count, generator=numbers).tolist()
    return order


class Shuffled:
    """Rows in an endless sequence of shuffled epochs, the same for a seed and a `use`."""

    def __init__(self, rows: Sequence[dict[str, Any]], seed: int, use: Use):
        self.rows = rows
        self.seed = seed
        self.use = use
        self.epoch = -1
        self.order: list[int] = []

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch, i = divmod(position, len(self.rows))
        if self.epoch != epoch:
            self.order = shuffled(len(self.rows), generator(self.seed, self.use, epoch))
            self.epoch = epoch
        return self.rows[self.order[i]]
