"""An Arrow table, as `datasets` saves it or Feather holds it, mapped into memory.

The number of a row counts from 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from llmpipe.data.readers.row import File, Reading, Row
from llmpipe.data.readers.table import broken, rows_of
from llmpipe.errors import DATA
from llmpipe.faults import misread

if TYPE_CHECKING:
    import pyarrow

MAGIC = b"ARROW1"  # begins a file of Arrow; a stream has none


def read(file: File) -> Reading:
    """Raises UserError where it is no Arrow table, or is cut off."""
    import pyarrow

    number = 0
    size = 0  # of a row, about

    def measured(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
        nonlocal size
        for batch in batches:
            size = batch.nbytes // max(1, len(batch))
            yield batch

    try:
        with pyarrow.memory_map(str(file.path)) as mapped:
            is_stream = mapped.read(len(MAGIC)) != MAGIC
            mapped.seek(0)
            if is_stream:
                table = pyarrow.ipc.open_stream(mapped)
                batches = measured(table)
            else:
                table = pyarrow.ipc.open_file(mapped)
                batches = measured(map(table.get_batch, range(table.num_record_batches)))
            for number, columns in enumerate(rows_of(table.schema, batches, file.shown), 1):
                yield Row(number, columns), size
    except broken() as error:
        where = f"{file.shown}:{number + 1}"
        raise misread(error, where, "Arrow", code=DATA, size=file.bytes) from None
