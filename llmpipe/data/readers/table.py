"""Batches of an Arrow table -> rows, as the readers of tables share it.

A table keeps one order of keys for all the objects of a column, and makes 1 into 1.0 where another
row has 1.5. What has to keep its own, such as the arguments of tools, is therefore stored as JSON
text; so does `datasets` with what differs from row to row, and that is parsed here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from llmpipe.data.formats import Rejected
from llmpipe.data.readers.row import Payload, check_names
from llmpipe.errors import first_line

if TYPE_CHECKING:
    import pyarrow

BATCH = 256  # rows that are held at once


def rows_of(
    schema: pyarrow.Schema, batches: Iterable[pyarrow.RecordBatch], shown: str
) -> Iterator[Payload]:
    """The columns of every row, or why they cannot be read.

    Raises UserError where two columns have one name, and what is among `BROKEN` where the table is
    broken.
    """
    check_names(schema.names, shown)
    json_types = {field.name: field.type for field in schema if _holds_json(field.type)}
    for batch in batches:
        _check(batch)
        for begin in range(0, len(batch), BATCH):
            yield from _rows(batch.slice(begin, BATCH), json_types)


def broken() -> tuple[type[Exception], ...]:
    """What reading a table raises that is damaged, or none."""
    import pyarrow

    return (pyarrow.ArrowException, OSError, KeyError, ValueError, OverflowError, RecursionError)


def _check(batch: pyarrow.RecordBatch) -> None:
    """Raise pyarrow's error where lengths and places in a batch lead out of it: who followed them
    would read foreign memory. A text that is not UTF-8 costs its row alone.
    """
    import pyarrow

    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
        schema = pyarrow.schema([field.with_type(_of_bytes(field.type)) for field in batch.schema])
        batch.cast(schema, safe=False).validate(full=True)


def _of_bytes(type_: pyarrow.DataType) -> pyarrow.DataType:
    """A type with bytes in place of texts, at any depth."""
    import pyarrow

    if pyarrow.types.is_string(type_):
        return pyarrow.binary()
    if pyarrow.types.is_large_string(type_):
        return pyarrow.large_binary()
    if pyarrow.types.is_list(type_):
        return pyarrow.list_(_of_bytes(type_.value_type))
    if pyarrow.types.is_struct(type_):
        return pyarrow.struct([field.with_type(_of_bytes(field.type)) for field in type_])
    return type_


def _rows(batch: pyarrow.RecordBatch, json_types: dict[str, pyarrow.DataType]) -> Iterator[Payload]:
    """The rows of a batch, each by itself where together they cannot be read."""
    try:
        rows = batch.to_pylist(maps_as_pydicts="strict")
        for columns in rows:
            for name, type_ in json_types.items():
                columns[name] = _parsed(columns[name], type_)
    except broken() as error:
        if len(batch) == 1:
            yield _unreadable(error)
            return
        for number in range(len(batch)):
            yield from _rows(batch.slice(number, 1), json_types)
    else:
        yield from rows


def _unreadable(error: Exception) -> Rejected:
    if isinstance(error, UnicodeDecodeError):
        return Rejected("not UTF-8", "a text of the table has other bytes")
    return Rejected("unreadable value", first_line(error)[:100])


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
