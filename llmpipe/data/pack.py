"""Sequences -> an Arrow file that `datasets.Dataset.from_file` maps into memory, packed or one row each.

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


def lists(lengths: list[int] | np.ndarray, values: np.ndarray) -> pa.ListArray:
    """int32 values, all after one another -> list<int32> with lists of these lengths."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int32()))


class Output:
    """Writes one of train.arrow and eval.arrow; a file without rows is not written.

    Columns: `input_ids` and `labels` list<int32>, and with packing `seq_lengths` list<int32>.
    """

    def __init__(self, path: Path, max_length: int, packing: bool):
        self.path, self.max_length, self.packing = path, max_length, packing
        self.rows = self.sequences = self.tokens = self.supervised = 0
        self.digest = hashlib.sha256()
        self.lengths = np.zeros(max_length + 1, np.int64)  # how many rows have each length
        self._window: list[tuple[np.ndarray, np.ndarray]] = []
        self._window_tokens = 0
        self._file = self._writer = None

    def add(self, ids: np.ndarray, labels: np.ndarray) -> None:
        """One row: int32 (n,) each, 0 < n <= max_length."""
        self.lengths[len(ids)] += 1
        self._window.append((ids.copy(), labels.copy()))  # views would keep whole batches of the spool alive
        self._window_tokens += len(ids)
        if len(self._window) >= WINDOW_ROWS or self._window_tokens >= WINDOW_TOKENS:
            self._flush()

    def _flush(self) -> None:
        rows, self._window, self._window_tokens = self._window, [], 0
        lengths = [len(ids) for ids, _ in rows]
        bins = best_fit(lengths, self.max_length) if self.packing else [[i] for i in range(len(rows))]
        for start in range(0, len(bins), BATCH_SEQUENCES):
            part = bins[start : start + BATCH_SEQUENCES]
            order = [i for bin in part for i in bin]
            ids, labels = (np.concatenate([rows[i][side] for i in order]) for side in (0, 1))
            self._write(ids, labels, [[lengths[i] for i in bin] for bin in part])
            self.rows += len(order)

    def _write(self, ids: np.ndarray, labels: np.ndarray, documents: list[list[int]]) -> None:
        """Sequences after one another; `documents`: the lengths of what each of them consists of."""
        sums = [sum(lengths) for lengths in documents]
        columns = {"input_ids": lists(sums, ids), "labels": lists(sums, labels)}
        if self.packing:
            flat = np.array([length for lengths in documents for length in lengths])
            columns["seq_lengths"] = lists([len(lengths) for lengths in documents], flat)
        batch = pa.RecordBatch.from_pydict(columns)
        if self._writer is None:
            self._file = self.path.open("wb")
            self._writer = pa.ipc.new_stream(self._file, batch.schema)
        self._writer.write_batch(batch)
        self.sequences += len(sums)
        self.tokens += len(ids)
        self.supervised += int((labels != IGNORED).sum())
        for values in (np.array(sums), ids, labels):
            self.digest.update(values.tobytes())

    def close(self) -> None:
        if self._window:
            self._flush()
        if self._writer is not None:
            self._writer.close()
            self._file.close()

    def quantile(self, share: float) -> int:
        """The length that `share` of the rows do not exceed."""
        return int(np.searchsorted(np.cumsum(self.lengths), share * self.rows)) if self.rows else 0


class Blocks(Output):
    """Rows laid end to end and cut into sequences of exactly `max_length`; only the last one of a file is shorter.

    With `packing` a sequence keeps where its documents begin, and attention does not cross from one to the next.
    """

    def __init__(self, path: Path, max_length: int, packing: bool):
        super().__init__(path, max_length, packing)
        self._carry: list[tuple[np.ndarray, np.ndarray]] = []

    def _flush(self, last: bool = False) -> None:
        rows, self._window, self._window_tokens = self._carry + self._window, [], 0
        self.rows += len(rows) - len(self._carry)
        if not rows:
            return
        ids, labels = (np.concatenate([row[side] for row in rows]) for side in (0, 1))
        whole = len(ids) if last else len(ids) - len(ids) % self.max_length
        edges = np.cumsum([len(row) for row, _ in rows])
        for start in range(0, whole, BATCH_SEQUENCES * self.max_length):
            end = min(start + BATCH_SEQUENCES * self.max_length, whole)
            cuts = np.arange(start + self.max_length, end, self.max_length)
            documents = []
            for left, right in zip([start, *cuts], [*cuts, end], strict=True):
                inner = edges[(edges > left) & (edges < right)] if self.packing else []
                documents.append(np.diff([left, *inner, right]).tolist())
            self._write(ids[start:end], labels[start:end], documents)
        self._carry = [(ids[whole:], labels[whole:])] if whole < len(ids) else []

    def close(self) -> None:
        self._flush(last=True)
        super().close()
