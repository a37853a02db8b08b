"""Pieces -> an Arrow file that `datasets.Dataset.from_file` maps into memory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmpipe.data.kinds import Kind
from llmpipe.data.pack import Piece, Sequence
from llmpipe.recipe.sections import Preparation

# Of what is laid out at once; memory grows with it.
WINDOW_ROWS = 8192
WINDOW_TOKENS = 2_000_000
BATCH_SEQUENCES = 256


class Writer:
    """Writes one of train.arrow and eval.arrow, and counts; a file without rows is not written."""

    def __init__(self, path: Path, kind: Kind, preparation: Preparation):
        self.path = path
        self.kind = kind
        self.packing = preparation.packing
        self.rows = 0
        self.sequences = 0
        self.tokens = 0
        self.supervised = 0
        self.digest = hashlib.sha256()
        self.lengths = np.zeros(preparation.max_length + 1, np.int64)
        """How many rows have each length."""
        self._layout = kind.layout(preparation.max_length, preparation.packing)
        self._window: list[Piece] = []
        self._window_tokens = 0
        self._file: Any = None

    def add(self, piece: Piece) -> None:
        """One piece of 0 < n <= max_length tokens."""
        self.rows += 1
        length = self.kind.length(piece)
        self.lengths[length] += 1
        # views would keep whole batches of the spool alive
        self._window.append(tuple(column.copy() for column in piece))
        self._window_tokens += length
        if len(self._window) >= WINDOW_ROWS or self._window_tokens >= WINDOW_TOKENS:
            self._flush(last=False)

    def close(self) -> None:
        self._flush(last=True)
        if self._file is not None:
            self._file.close()

    def quantile(self, share: float) -> int:
        """The length that `share` of the rows do not exceed."""
        if not self.rows:
            return 0
        return int(np.searchsorted(np.cumsum(self.lengths), share * self.rows))

    def _flush(self, last: bool) -> None:
        sequences = self._layout(self._window, last)
        self._window = []
        self._window_tokens = 0
        for start in range(0, len(sequences), BATCH_SEQUENCES):
            self._write(sequences[start : start + BATCH_SEQUENCES])

    def _write(self, sequences: list[Sequence]) -> None:
        table = self.kind.table(sequences, self.packing)
        if self._file is None:
            self._file = pa.ipc.new_stream(str(self.path), table.batch.schema)
        self._file.write_batch(table.batch)
        self.sequences += len(sequences)
        self.tokens += table.tokens
        self.supervised += table.supervised
        self.digest.update(table.content)
