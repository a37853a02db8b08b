"""Sequences -> an Arrow file that `datasets.Dataset.from_file` maps into memory, packed or one row each.

Packing is best-fit decreasing (Ding et al., 2404.10830; TRL's "bfd") within windows of the stream, so that memory does
not grow with the data. A packed sequence keeps the lengths of its documents in `seq_lengths`; the trainer starts
positions anew at each, so that documents do not see one another. No document is split or dropped here.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left, insort
from pathlib import Path

import numpy as np
import pyarrow as pa

WINDOW_ROWS, WINDOW_TOKENS = 8192, 2_000_000
BATCH_ROWS, BATCH_TOKENS = 256, 500_000
LIST = pa.list_(pa.int32())


def best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """Indices of `lengths` -> bins of at most `size` in sum: longest first, each into the fullest bin that takes it."""
    bins: list[list[int]] = []
    spaces: list[int] = []  # distinct free spaces, ascending
    by_space: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        at = bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            chosen = by_space[space].pop()
            if not by_space[space]:
                del spaces[at]
        else:
            space, chosen = size, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if (left := space - length) > 0:
            if not by_space.setdefault(left, []):
                insort(spaces, left)
            by_space[left].append(chosen)
    return bins


class Output:
    """Writes one of train.arrow and eval.arrow; `close` answers whether anything was written.

    Columns: `input_ids` and `labels` list<int32>, and with packing `seq_lengths` list<int32>.
    """

    def __init__(self, path: Path, max_length: int, packing: bool):
        self.path, self.max_length, self.packing = path, max_length, packing
        self.rows = self.sequences = self.tokens = self.supervised = 0
        self.digest = hashlib.sha256()
        self.lengths = np.zeros(max_length + 1, np.int64)  # how many rows have each length
        self._window: list[tuple[np.ndarray, np.ndarray]] = []
        self._window_tokens = 0
        self._batch: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self._batch_tokens = 0
        self._writer: pa.RecordBatchStreamWriter | None = None

    def add(self, ids: np.ndarray, labels: np.ndarray) -> None:
        """One row: int32 (n,) each, 0 < n <= max_length."""
        self.rows += 1
        self.lengths[len(ids)] += 1
        row = (ids.copy(), labels.copy())  # views would keep whole batches of the spool alive
        if not self.packing:
            self._sequence([row])
            return
        self._window.append(row)
        self._window_tokens += len(ids)
        if len(self._window) >= WINDOW_ROWS or self._window_tokens >= WINDOW_TOKENS:
            self._pack()

    def _pack(self) -> None:
        window, self._window, self._window_tokens = self._window, [], 0
        for bin in best_fit([len(ids) for ids, _ in window], self.max_length):
            self._sequence([window[i] for i in bin])

    def _sequence(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self._batch.append(rows)
        self._batch_tokens += sum(len(ids) for ids, _ in rows)
        if len(self._batch) >= BATCH_ROWS or self._batch_tokens >= BATCH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if not self._batch:
            return
        rows = [row for sequence in self._batch for row in sequence]
        ids = np.concatenate([ids for ids, _ in rows])
        labels = np.concatenate([labels for _, labels in rows])
        lengths = np.array([len(ids) for ids, _ in rows], np.int32)
        counts = np.array([len(sequence) for sequence in self._batch])
        documents = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)])[documents].astype(np.int32)
        columns = {"input_ids": _lists(offsets, ids), "labels": _lists(offsets, labels)}
        if self.packing:
            columns["seq_lengths"] = _lists(documents, lengths)
        batch = pa.RecordBatch.from_pydict(columns)
        if self._writer is None:
            self._file = self.path.open("wb")
            self._writer = pa.ipc.new_stream(self._file, batch.schema)
        self._writer.write_batch(batch)
        self.sequences += len(self._batch)
        self.tokens += len(ids)
        self.supervised += int((labels != -100).sum())
        for part in (offsets, ids, labels):
            self.digest.update(part.tobytes())
        self._batch, self._batch_tokens = [], 0

    def close(self) -> bool:
        if self._window:
            self._pack()
        self._flush()
        if self._writer is None:
            return False
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return True

    def quantile(self, share: float) -> int:
        """The length that `share` of the rows do not exceed."""
        return int(np.searchsorted(np.cumsum(self.lengths), share * self.rows)) if self.rows else 0


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int32()))
