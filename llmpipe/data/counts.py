"""How many rows, tokens and sequences were prepared. Without pydantic: `show` reads them."""

from __future__ import annotations

from dataclasses import dataclass


def in_rows(count: int) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} row" if count == 1 else f"{count:,} rows"


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows that were read."""

    read: int
    kept: int
    truncated: int
    split: int
    pieces: int
    rejected: int
    rejected_by_reason: dict[str, int]
    duplicates: int
    """Rows to train on that another one equals."""
    unseen: int
    """Rows that a source's weight leaves out."""
    overlap: int
    """Rows to evaluate on that are trained on as well."""
    train: int
    eval: int


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of the rows that are kept, and those of them that are learned or scored."""

    train: int
    train_supervised: int
    eval: int
    eval_supervised: int
    eval_bytes: int
    """Bytes of the text that the evaluated rows teach."""


@dataclass(frozen=True)
class SequenceCounts:
    """Sequences that were written."""

    train: int
    eval: int


@dataclass(frozen=True)
class Lengths:
    """Tokens of a row to train on, before packing."""

    p50: int
    p95: int
    max: int
