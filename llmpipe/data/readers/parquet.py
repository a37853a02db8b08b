"""A parquet table. The number of a row counts from 1."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llmpipe.data.readers.row import File, Reading, Row
from llmpipe.errors import UserError

if TYPE_CHECKING:
    import pyarrow

BATCH = 256  # rows that are held at once


def read(file: File) -> Reading:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            size = file.bytes // max(1, table.metadata.num_rows)
            json_types = {
                field.name: field.type for field in table.schema_arrow if _holds_json(field.type)
            }
            for batch in table.iter_batches(batch_size=BATCH):
                for columns in batch.to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    for name, type_ in json_types.items():
                        columns[name] = _parsed(columns[name], type_)
                    yield Row(number, columns), size
    except (pyarrow.ArrowException, KeyError, ValueError) as error:
        problem = f"not a readable parquet file: {error}"
        raise UserError(f"{file.shown}:{number + 1}: {problem}") from None


def _holds_json(type_: pyarrow.DataType) -> bool:
    """Whether values are JSON texts, at any depth: so `datasets` keeps what differs from row to
    row."""
    import pyarrow

    if isinstance(type_, pyarrow.JsonType):
        return True
    return any(_holds_json(type_.field(i).type) for i in range(type_.num_fields))


def _parsed(value: Any, type_: pyarrow.DataType) -> Any:
    """A value of such a type with its JSON texts parsed. Raises ValueError."""
    import pyarrow

    if isinstance(value, str) and isinstance(type_, pyarrow.JsonType):
        return json.loads(value)
    if isinstance(value, list) and type_.num_fields == 1:
        return [_parsed(item, type_.field(0).type) for item in value]
    if isinstance(value, dict) and pyarrow.types.is_struct(type_):
        return {name: _parsed(item, type_.field(name).type) for name, item in value.items()}
    return value
