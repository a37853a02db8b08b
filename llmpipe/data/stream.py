"""Documents -> blocks of tokens while they are trained on: for data that is larger than the disk.

The blocks are those of `kinds.blocks`, in the order of sources, files and rows, epoch after epoch
without a seam; nothing is shuffled, and nothing is kept. Where a block begins is known, so training
goes on from there after a stop: the rows before it are read again, not tokenized.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmpipe.data.encode import Encoding
from llmpipe.data.intake import rejected_lines
from llmpipe.data.kinds.blocks import BLOCKS
from llmpipe.data.pack import EndToEnd, Piece, Sequence
from llmpipe.data.sources import Origin
from llmpipe.data.template import choose
from llmpipe.data.tokenize import COUNTS, Batch, Task, pieces_of, tokenized
from llmpipe.errors import NUMERIC, UserError
from llmpipe.files.writing import cut_back, to_write
from llmpipe.recipe.sections import Prepared

ENOUGH = 1000  # rows, from which on the share of rejected ones says something
REJECTED = "rejected: "  # before a reason, as a key of a position's counts


@dataclass(frozen=True)
class Position:
    """Where a block begins; a part of a checkpoint's state."""

    epoch: int = 0
    chunk: int = 0
    before: dict[str, int] = field(default_factory=dict)
    """Counts of the first epoch's rows in front of the chunk: COUNTS, and rejected ones by
    reason."""
    rejected_bytes: int | None = None
    """Of rejected.jsonl in front of the chunk; None at the very start."""
    rows: dict[str, int] = field(default_factory=dict)
    """`before`, with the chunk."""
    tokens: int = 0
    """Of the chunk that belong to earlier blocks."""


class Stream:
    """`stream[i]` is block i of `length`, as a trainer takes it.

    i only rises, and what lies between is left out.
    """

    def __init__(
        self,
        data: Prepared,
        prepared: Path,
        length: int,
        batch: int,
        *,
        seed: int,
        pinned: dict[str, str],
        processes: int,
    ):
        """`prepared`: folder with the tokenizer; positions are kept for every `batch`-th block."""
        preparation = data.preparation
        self.length = length
        self.batch = batch
        self.processes = processes
        self.max_length = preparation.max_length
        self.packing = preparation.packing
        self.max_rejected = data.max_rejected
        self.origins = [Origin(source, pinned, stream=True) for source in data.train]
        choice = choose(prepared / "tokenizer", "auto", {})
        encoding = Encoding(prepared / "tokenizer", choice.ends, choice.text_eos, preparation)
        self.task = Task(BLOCKS, encoding, seed)
        self.rejected: Path | None = None
        """Where the main process lists rows that cannot be used."""
        self._rejected_before = prepared / "rejected.jsonl"
        self.go(0, Position())

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        while self.next < index:
            self._advance()
        parts = self._advance()
        block: dict[str, Any] = {
            "input_ids": [int(token) for ids, _ in parts for token in ids],
            "labels": [int(label) for _, labels in parts for label in labels],
        }
        if self.packing:
            block["seq_lengths"] = [len(ids) for ids, _ in parts]
        return block

    def go(self, index: int, position: Position) -> None:
        """Set where block `index` begins."""
        self.next = index
        self.positions = {index: position}
        self._blocks = self._read(position)

    def position(self, index: int) -> Position:
        """Where block `index` begins; those before it are not asked for any more."""
        while self.next < index:
            self._advance()
        self.positions = {i: position for i, position in self.positions.items() if i >= index}
        return self.positions[index]

    def _advance(self) -> Sequence:
        parts, position = next(self._blocks)
        self.next += 1
        if self.next % self.batch == 0:
            self.positions[self.next] = position
        return parts

    def _read(self, start: Position) -> Iterator[tuple[Sequence, Position]]:
        """Every block from a position on, each with the position behind it."""
        layout = EndToEnd(self.max_length)
        rows = Counter(start.before)
        rejected_bytes = self._open_rejected(start.rejected_bytes)
        epoch, first_chunk, skip = start.epoch, start.chunk, start.tokens
        while True:
            taught: set[int] = set()
            for origin in self.origins:
                origin.open(BLOCKS.shapes)
            chunks = tokenized(self.origins, self.task, self.processes, first_chunk)
            for number, (source, chunk, batch) in enumerate(chunks, first_chunk):
                before = dict(rows)
                bytes_before = rejected_bytes
                if epoch == 0:
                    rows += _counts(batch)
                    rejected_bytes += self._reject(self.origins[source], chunk.file, batch)
                    self._check_rejected(rows, ENOUGH)
                position = Position(epoch, number, before, bytes_before, dict(rows))
                begin = skip - layout.carried
                pieces = list(pieces_of(batch.pieces, BLOCKS))
                sequences = layout(list(_behind(pieces, skip)), False)
                for count, parts in enumerate(sequences, 1):
                    yield parts, replace(position, tokens=begin + count * self.max_length)
                if pieces:
                    taught.add(source)
                skip = 0
            self._check_rejected(rows, 0)
            if not first_chunk:
                self._refuse_untaught(taught)
            epoch += 1
            first_chunk = 0

    def _open_rejected(self, size: int | None) -> int:
        """rejected.jsonl as it was at a position: at the start it holds what `prepare` rejected."""
        if self.rejected is None:
            return size or 0
        if size is None:
            with to_write(self.rejected, "wb") as file:
                file.write(self._rejected_before.read_bytes())
            return self.rejected.stat().st_size
        cut_back(self.rejected, size)
        return size

    def _reject(self, origin: Origin, file: int, batch: Batch) -> int:
        """Note rows that cannot be used; the bytes that took."""
        lines = rejected_lines(origin, file, batch.rejected)
        text = "".join(json.dumps(line._asdict()) + "\n" for line in lines)
        if self.rejected and text:
            with to_write(self.rejected, "a") as out:
                out.write(text)
        return len(text)

    def _check_rejected(self, rows: Counter[str], least: int) -> None:
        """Refuse to go on when too many of the rows so far, at least `least`, cannot be used."""
        reasons = _reasons(rows)
        count = reasons.total()
        if count > self.max_rejected * max(rows["read"], least):
            words = ", ".join(f"{number:,} {reason}" for reason, number in reasons.items())
            problem = f"{count:,} of {rows['read']:,} rows so far cannot be used: {words}"
            raise UserError(problem, "see rejected.jsonl; mend them, or raise data.max_rejected")

    def _refuse_untaught(self, taught: set[int]) -> None:
        """Raise UserError after an epoch that left a source, or all of them, out."""
        if not taught:
            problem = "no row is left to train on: there would be nothing to learn"
            raise UserError(problem, code=NUMERIC)
        for number, origin in enumerate(self.origins):
            if number not in taught:
                problem = f"{origin.source.path}: no row is left to train on: none can be used"
                hint = "see rejected.jsonl; mend its rows, or take the source out of the recipe"
                raise UserError(problem, hint)


def _counts(batch: Batch) -> Counter[str]:
    """Counts of a chunk's rows, as a position has them."""
    return batch.counts + Counter(REJECTED + row.reason for row in batch.rejected)


def _reasons(rows: dict[str, int]) -> Counter[str]:
    """Rejected rows of a position's counts, by reason."""
    named = ((name.removeprefix(REJECTED), name) for name in rows if name.startswith(REJECTED))
    return Counter({reason: rows[name] for reason, name in named})


def _behind(pieces: list[Piece], skip: int) -> Iterator[Piece]:
    """Pieces without their first `skip` tokens."""
    for ids, labels in pieces:
        cut = min(skip, len(ids))
        skip -= cut
        if cut < len(ids):
            yield ids[cut:], labels[cut:]


def counted(rows: dict[str, int], prepared: dict[str, Any]) -> dict[str, Any]:
    """A position's counts as a manifest has them, with those of the rows that were `prepared` to
    evaluate on."""
    reasons = Counter(prepared["rejected_by_reason"]) + _reasons(rows)
    counts = {name: prepared[name] + rows.get(name, 0) for name in COUNTS}
    return {
        **prepared,
        **counts,
        "rejected": reasons.total(),
        "rejected_by_reason": dict(sorted(reasons.items())),
        "train": rows["kept"],
    }
