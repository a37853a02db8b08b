"""An Arrow table, as `datasets` saves it or Feather holds it, mapped into memory.

The number of a row counts from 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmpipe.data.readers.row import File, Reading, Row
from llmpipe.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow

BATCH = 256  # rows that are held at once as Python's objects
MAGIC = b"ARROW1"  # begins a file of Arrow; a stream has none


def read(file: File) -> Reading:
    """Raises UserError where it is no Arrow table, or is cut off."""
    import pyarrow

    number = 0
    try:
        for batch in _batches(file):
            size = batch.nbytes // max(len(batch), 1)
            for begin in range(0, len(batch), BATCH):
                for columns in batch.slice(begin, BATCH).to_pylist():
                    number += 1
                    yield Row(number, columns), size
    except (pyarrow.ArrowException, OSError) as error:
        problem = f"not a readable Arrow file: {first_line(error)}"
        raise UserError(f"{file.shown}:{number + 1}: {problem}") from None


def _batches(file: File) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow

    with pyarrow.memory_map(str(file.path)) as mapped:
        magic = mapped.read(len(MAGIC))
        mapped.seek(0)
        if magic == MAGIC:
            table = pyarrow.ipc.open_file(mapped)
            for index in range(table.num_record_batches):
                yield table.get_batch(index)
        else:
            yield from pyarrow.ipc.open_stream(mapped)
