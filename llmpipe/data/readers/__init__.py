"""Files of rows, read one row after another: a reader for every kind of file, and one for the Hub.

Rows stream: no file is ever held whole. A row that cannot be read is a problem of that row
(`Rejected`), not of the run; a file that cannot be opened, or a JSON list that breaks off, is a
UserError. A new kind of file is a file of this folder and its suffix in `READERS`.
"""

from __future__ import annotations

from collections.abc import Callable

from llmpipe.data.readers import delimited, json_list, jsonl, parquet, passages
from llmpipe.data.readers.row import File, Payload, Reading, Row, parse
from llmpipe.errors import UserError

__all__ = ["READERS", "File", "Payload", "Reading", "Row", "parse", "read"]

READERS: dict[str, Callable[[File], Reading]] = {
    ".jsonl": jsonl.read,
    ".json": json_list.read,
    ".csv": delimited.read,
    ".tsv": delimited.read,
    ".parquet": parquet.read,
    ".txt": passages.read,
}


def read(file: File) -> Reading:
    """The rows of a file, in order. Raises UserError where it cannot be read."""
    try:
        yield from READERS[file.path.suffix.lower()](file)
    except OSError as error:
        raise UserError(f"{file.shown}: cannot be read: {error.strerror or error}") from None
