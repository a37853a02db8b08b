"""A parquet table. The number of a row counts from 1."""

from __future__ import annotations

from llmpipe.data.readers.row import File, Reading, Row
from llmpipe.errors import UserError

BATCH = 256  # rows that are held at once


def read(file: File) -> Reading:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            for batch in table.iter_batches(batch_size=BATCH):
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(number, columns), file.bytes // table.metadata.num_rows
    except pyarrow.ArrowException as error:
        problem = f"not a readable parquet file: {error}"
        raise UserError(f"{file.shown}:{number + 1}: {problem}") from None
