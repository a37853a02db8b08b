"""Batches of an Arrow table -> rows, as the readers of tables share it.

A table keeps one order of keys for all the objects of a column, and makes 1 into 1.0 where another
row has 1.5. What has to keep its own, such as the arguments of tools, is therefore stored as JSON
text; so does `datasets` with what differs from row to row, and that is parsed here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from llmpipe.data.readers.row import check_names

if TYPE_CHECKING:
    import pyarrow

BATCH = 256  # rows that are held at once


def rows_of(
    schema: pyarrow.Schema, batches: Iterable[pyarrow.RecordBatch], shown: str
) -> Iterator[dict[str, Any]]:
    """The columns of every row.

    Raises UserError where two columns have one name; ValueError, KeyError and pyarrow's errors
    where the table is broken.
    """
    check_names(schema.names, shown)
    json_types = {field.name: field.type for field in schema if _holds_json(field.type)}
    for batch in batches:
        for begin in range(0, len(batch), BATCH):
            for columns in batch.slice(begin, BATCH).to_pylist(maps_as_pydicts="strict"):
                for name, type_ in json_types.items():
                    columns[name] = _parsed(columns[name], type_)
                yield columns


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
