"""A parquet table. The number of a row counts from 1."""

from __future__ import annotations

from llmpipe.data.readers.row import File, Reading, Row
from llmpipe.data.readers.table import BATCH, broken, rows_of
from llmpipe.errors import DATA
from llmpipe.faults import misread


def read(file: File) -> Reading:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            size = file.bytes // max(1, table.metadata.num_rows)
            batches = table.iter_batches(batch_size=BATCH)
            for number, columns in enumerate(rows_of(table.schema_arrow, batches, file.shown), 1):
                yield Row(number, columns), size
    except broken() as error:
        where = f"{file.shown}:{number + 1}"
        raise misread(error, where, "parquet", code=DATA, size=file.bytes) from None
