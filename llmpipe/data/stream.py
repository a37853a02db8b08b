"""Documents -> blocks of tokens while they are trained on: for data that is larger than the disk.

The blocks are those of `pack.Blocks`, in the order of sources, files and rows, epoch after epoch without a seam;
nothing is shuffled, and nothing is kept. Where a block begins is known, so training goes on from there after a stop:
the rows before it are read again, not tokenized.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmpipe.data.pack import Blocks, Piece
from llmpipe.data.prepare import COUNTS, encoded
from llmpipe.data.sources import Origin
from llmpipe.data.template import Choice
from llmpipe.errors import NUMERIC, UserError

START = {"epoch": 0, "chunk": 0, "tokens": 0, "before": {}, "rows": {}, "rejected_bytes": None}
ENOUGH = 1000  # rows, from which on the share of rejected ones says something


class Stream:
    """`stream[i]` is block i of `length`, as a trainer takes it; i only rises, and what lies between is left out.

    A position is {"epoch", "chunk", "tokens" of that chunk that belong to earlier blocks, "rows": counts of the first
    epoch up to and with the chunk, "before": without it, "rejected_bytes": of rejected.jsonl before it}.
    """

    def __init__(
        self,
        data: Any,
        prepared: Path,
        length: int,
        batch: int,
        *,
        seed: int,
        pinned: dict,
        processes: int,
    ):
        """`prepared`: folder with the tokenizer; positions are kept for every `batch`-th block."""
        self.data, self.prepared, self.length, self.batch, self.processes = (
            data,
            prepared,
            length,
            batch,
            processes,
        )
        self.origins = [Origin(source, pinned, stream=True) for source in data.train]
        choice = Choice(prepared / "tokenizer", "auto", {})
        self.spec = (
            prepared / "tokenizer",
            choice.ends,
            {},
            choice.text_eos,
            data.max_length,
            data.loss,
            seed,
        )
        self.rejected: Path | None = None  # where the main process lists rows that cannot be used
        self.positions: dict[int, dict[str, Any]] = {}
        self.go(0, START)

    def __len__(self) -> int:
        return self.length

    def go(self, index: int, position: dict[str, Any]) -> None:
        """Set where block `index` begins."""
        self.next, self.positions, self._blocks = index, {index: position}, self._read(position)

    def position(self, index: int) -> dict[str, Any]:
        """Where block `index` begins; those before it are not asked for any more."""
        while self.next < index:
            self._advance()
        self.positions = {i: position for i, position in self.positions.items() if i >= index}
        return self.positions[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        while self.next < index:
            self._advance()
        parts = self._advance()
        ids, labels = ([int(token) for part in parts for token in part[side]] for side in (0, 1))
        lengths = {"seq_lengths": [len(ids) for ids, _ in parts]} if self.data.packing else {}
        return {"input_ids": ids, "labels": labels, **lengths}

    def _advance(self) -> list[Piece]:
        parts, position = next(self._blocks)
        self.next += 1
        if self.next % self.batch == 0:
            self.positions[self.next] = position
        return parts

    def _read(self, at: dict[str, Any]) -> Iterator[tuple[list[Piece], dict[str, Any]]]:
        """Every block from a position on, each with the position behind it."""
        blocks = Blocks(Path(), self.data.max_length, self.data.packing)
        epoch, first, skip = at["epoch"], at["chunk"], at["tokens"]
        rows, size = Counter(at["before"]), self._open_rejected(at["rejected_bytes"])
        while True:
            found = False
            for origin in self.origins:
                origin.open()
            batches = encoded(self.origins, self.spec, self.processes, first)
            for number, (index, chunk, batch) in enumerate(batches, first):
                here = {
                    "epoch": epoch,
                    "chunk": number,
                    "before": dict(rows),
                    "rejected_bytes": size,
                }
                if epoch == 0:
                    rows += batch.counts + Counter(
                        f"rejected: {reason}" for _, reason, _ in batch.rejected
                    )
                    size += self._reject(self.origins[index], chunk.file, batch.rejected)
                    self._enough(rows, ENOUGH)
                ids, labels = (batch.pieces[name] for name in ("ids", "labels"))
                pieces = [
                    (i.values.to_numpy(), n.values.to_numpy())
                    for i, n in zip(ids, labels, strict=True)
                ]
                carried = sum(len(ids) for ids, _ in blocks.carry)
                for count, parts in enumerate(
                    blocks.laid_out(list(_behind(pieces, skip)), last=False), 1
                ):
                    found = True
                    yield (
                        parts,
                        {
                            **here,
                            "rows": dict(rows),
                            "tokens": skip + count * blocks.max_length - carried,
                        },
                    )
                found, skip = found or bool(pieces), 0
            self._enough(rows, 0)
            if not found and not first:
                raise UserError(
                    "no row is left to train on: there would be nothing to learn", code=NUMERIC
                )
            epoch, first = epoch + 1, 0

    def _open_rejected(self, size: int | None) -> int:
        """rejected.jsonl as it was at a position: at the start it holds what `prepare` rejected."""
        if self.rejected is None:
            return size or 0
        if size is None:
            shutil.copyfile(self.prepared / "rejected.jsonl", self.rejected)
            return self.rejected.stat().st_size
        with self.rejected.open("ab") as file:
            file.truncate(size)
        return size

    def _reject(self, origin: Origin, file: int, rejected: list[tuple[int, str, str]]) -> int:
        """Note rows that cannot be used; the bytes that took."""
        name = origin.files[file].name if origin.files else origin.name
        about = [
            {"file": name, "row": row, "reason": reason, "detail": detail}
            for row, reason, detail in rejected
        ]
        text = "".join(json.dumps(line) + "\n" for line in about)
        if self.rejected and text:
            with self.rejected.open("a", encoding="utf-8") as out:
                out.write(text)
        return len(text)

    def _enough(self, rows: Counter, least: int) -> None:
        """Refuse to go on when too many of the rows so far cannot be used."""
        bad = {reason: count for reason, count in rows.items() if reason.startswith("rejected: ")}
        if sum(bad.values()) > self.data.max_rejected * max(rows["read"], least):
            words = ", ".join(
                f"{count:,} {reason.removeprefix('rejected: ')}" for reason, count in bad.items()
            )
            problem = (
                f"{sum(bad.values()):,} of {rows['read']:,} rows so far cannot be used: {words}"
            )
            raise UserError(problem, "see rejected.jsonl; mend them, or raise data.max_rejected")


def _behind(pieces: list[Piece], skip: int) -> Iterator[Piece]:
    """Pieces without their first `skip` tokens."""
    for ids, labels in pieces:
        cut = min(skip, len(ids))
        skip -= cut
        if cut < len(ids):
            yield ids[cut:], labels[cut:]


def counted(rows: dict[str, int], prepared: dict[str, Any]) -> dict[str, Any]:
    """A position's counts as a manifest has them, with those of the rows that were `prepared` to evaluate on."""
    reasons = Counter(prepared["rejected_by_reason"])
    reasons += Counter(
        {
            name.removeprefix("rejected: "): n
            for name, n in rows.items()
            if name.startswith("rejected: ")
        }
    )
    counts = {name: prepared[name] + rows.get(name, 0) for name in COUNTS}
    about = {
        "rejected": reasons.total(),
        "rejected_by_reason": dict(sorted(reasons.items())),
        "train": rows["kept"],
    }
    return prepared | counts | about
