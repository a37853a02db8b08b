"""Sequences, or pairs, -> an Arrow file that `datasets.Dataset.from_file` maps into memory, packed or one row each.

Packing is best fit (Ding et al., 2404.10830; TRL's "bfd") within windows of the stream, so that memory does not grow.
Only long rows go by length; short ones fill the gaps in random order, since rows of one length are often of one kind,
and steps would swing between kinds. A packed sequence keeps the lengths of its documents in `seq_lengths`; the trainer
starts positions anew at each, so that documents do not see one another. No document is split or dropped here.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from pathlib import Path

import numpy as np
import pyarrow as pa

IGNORED = -100
WINDOW_ROWS, WINDOW_TOKENS, BATCH_SEQUENCES = 8192, 2_000_000, 256
LIST = pa.list_(pa.int32())
# What a piece of each kind of data is made of; `margin` holds one number or none, `row` JSON (see Encoder.prompt).
ROW = {"ids": LIST, "labels": LIST}
PAIR = {"prompt": LIST, "chosen": LIST, "rejected": LIST, "margin": pa.list_(pa.float32())}
PROMPT = {"prompt": LIST, "row": pa.list_(pa.uint8())}
COLUMNS = {"rows": ROW, "blocks": ROW, "pairs": PAIR, "prompts": PROMPT}

Piece = tuple[np.ndarray, ...]  # ids and labels, int32 (n,) each; or a pair's columns


def best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """Indices of `lengths` -> bins of at most `size` in sum, each into the fullest bin that takes it.

    Rows above a quarter of `size` come first, longest first; the others follow, shuffled by a fixed seed.
    """
    bins: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free, bin) of the bins that are not full, ascending
    shuffled = np.random.default_rng(0).permutation(len(lengths)).tolist()
    for index in sorted(shuffled, key=lambda i: -lengths[i] if 4 * lengths[i] > size else 0):
        at = bisect_left(spaces, (lengths[index], 0))
        if at < len(spaces):
            space, chosen = spaces.pop(at)
        else:
            space, chosen = size, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if space > lengths[index]:
            insort(spaces, (space - lengths[index], chosen))
    return bins


class Output:
    """Writes one of train.arrow and eval.arrow; a file without rows is not written.

    Columns: `input_ids` and `labels` list<int32>, and with packing `seq_lengths` list<int32>.
    """

    def __init__(self, path: Path, max_length: int, packing: bool):
        self.path, self.max_length, self.packing = path, max_length, packing
        self.rows = self.sequences = self.tokens = self.supervised = 0
        self.digest = hashlib.sha256()
        self.lengths = np.zeros(max_length + 1, np.int64)  # how many rows have each length
        self._window: list[Piece] = []
        self._window_tokens = 0
        self._writer = None

    def length(self, piece: Piece) -> int:
        return len(piece[0])

    def add(self, *piece: np.ndarray) -> None:
        """One row: a piece of 0 < n <= max_length tokens."""
        self.rows += 1
        length = self.length(piece)
        self.lengths[length] += 1
        self._window.append(
            tuple(part.copy() for part in piece)
        )  # views would keep whole batches of the spool alive
        self._window_tokens += length
        if len(self._window) >= WINDOW_ROWS or self._window_tokens >= WINDOW_TOKENS:
            self._flush(last=False)

    def _flush(self, last: bool) -> None:
        rows, self._window, self._window_tokens = self._window, [], 0
        sequences = self.laid_out(rows, last)
        for start in range(0, len(sequences), BATCH_SEQUENCES):
            self._write(sequences[start : start + BATCH_SEQUENCES])

    def laid_out(self, rows: list[Piece], last: bool) -> list[list[Piece]]:
        """The rows of a window as sequences, each a list of documents or parts of them."""
        if not self.packing:
            return [[row] for row in rows]
        return [
            [rows[i] for i in bin]
            for bin in best_fit([len(ids) for ids, _ in rows], self.max_length)
        ]

    def _write(self, sequences: list[list[Piece]]) -> None:
        lengths = [[len(ids) for ids, _ in parts] for parts in sequences]
        sums = np.array([sum(parts) for parts in lengths])
        ids, labels = (
            np.concatenate([part[side] for parts in sequences for part in parts]) for side in (0, 1)
        )
        offsets = pa.array(np.concatenate([[0], np.cumsum(sums)]), pa.int32())
        columns = {"input_ids": ids, "labels": labels}
        columns = {
            name: pa.ListArray.from_arrays(offsets, pa.array(values))
            for name, values in columns.items()
        }
        if self.packing:
            columns["seq_lengths"] = pa.array(lengths, LIST)
        batch = pa.RecordBatch.from_pydict(columns)
        if self._writer is None:
            self._writer = pa.ipc.new_stream(str(self.path), batch.schema)
        self._writer.write_batch(batch)
        self.sequences += len(sums)
        self.tokens += len(ids)
        self.supervised += int((labels != IGNORED).sum())
        for values in (sums, ids, labels):
            self.digest.update(values.tobytes())

    def close(self) -> None:
        self._flush(last=True)
        if self._writer is not None:
            self._writer.close()

    def quantile(self, share: float) -> int:
        """The length that `share` of the rows do not exceed."""
        return int(np.searchsorted(np.cumsum(self.lengths), share * self.rows)) if self.rows else 0


class PairOutput(Output):
    """Preferences, one a row: `prompt_ids`, `chosen_ids` and `rejected_ids` list<int32>, and `margin`, 0 where none is
    given. `lengths` are those of the prompt with its longer answer."""

    def length(self, piece: Piece) -> int:
        return len(piece[0]) + max(len(piece[1]), len(piece[2]))

    def _write(self, sequences: list[list[Piece]]) -> None:
        pairs = [pair for (pair,) in sequences]
        columns = {
            f"{name}_ids": pa.array([pair[i] for pair in pairs], LIST)
            for i, name in enumerate(list(PAIR)[:3])
        }
        columns["margin"] = pa.array(
            [float(pair[3][0]) if len(pair[3]) else 0.0 for pair in pairs], pa.float32()
        )
        batch = pa.RecordBatch.from_pydict(columns)
        if self._writer is None:
            self._writer = pa.ipc.new_stream(str(self.path), batch.schema)
        self._writer.write_batch(batch)
        self.sequences += len(pairs)
        for prompt, chosen, rejected, margin in pairs:
            self.supervised += len(chosen) + len(rejected)
            self.tokens += 2 * len(prompt) + len(chosen) + len(rejected)
            for part in (prompt, chosen, rejected, margin):
                self.digest.update(part.tobytes() + b"|")


class PromptOutput(Output):
    """Prompts, one a row: `prompt_ids` list<int32> and `row`, JSON as Encoder.prompt makes it."""

    def laid_out(self, rows: list[Piece], last: bool) -> list[list[Piece]]:
        return [[row] for row in rows]

    def _write(self, sequences: list[list[Piece]]) -> None:
        prompts = [prompt for (prompt,) in sequences]
        rows = [row.tobytes().decode() for _, row in prompts]
        batch = pa.RecordBatch.from_pydict(
            {"prompt_ids": pa.array([ids for ids, _ in prompts], LIST), "row": rows}
        )
        if self._writer is None:
            self._writer = pa.ipc.new_stream(str(self.path), batch.schema)
        self._writer.write_batch(batch)
        self.sequences += len(prompts)
        for ids, row in prompts:
            self.tokens += len(ids)
            self.digest.update(ids.tobytes() + b"|" + row.tobytes())


class Blocks(Output):
    """Rows laid end to end and cut into sequences of exactly `max_length`; only the last one of a file is shorter.

    With `packing` a sequence keeps where its documents begin, and attention does not cross from one to the next.
    """

    carry: list[Piece] = []  # what the last window left over for the next one

    def laid_out(self, rows: list[Piece], last: bool) -> list[list[Piece]]:
        sequences: list[list[Piece]] = []
        free = 0
        for ids, labels in self.carry + rows:
            while len(ids):
                if not free:
                    sequences.append([])
                    free = self.max_length
                sequences[-1].append((ids[:free], labels[:free]))
                ids, labels, free = ids[free:], labels[free:], max(free - len(ids), 0)
        self.carry = sequences.pop() if free and not last else []
        return sequences
