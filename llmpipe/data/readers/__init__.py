"""Files of rows, read one row after another: a reader for every kind of file, and one for the Hub.

Rows stream: no file is ever held whole. A row that cannot be read is a problem of that row
(`Rejected`), not of the run; a file that cannot be opened, or a JSON list that breaks off, is a
UserError. A new kind of file is a file of this folder and its suffix in `TEXTS` or `TABLES`.
"""

from __future__ import annotations

from collections.abc import Callable

from llmpipe.data.readers import arrow, delimited, json_list, jsonl, parquet, passages
from llmpipe.data.readers.compressed import COMPRESSED, DAMAGED, is_compressed, suffix_of
from llmpipe.data.readers.row import File, Payload, Reading, Row, parse
from llmpipe.errors import DATA
from llmpipe.faults import misread

__all__ = ["KNOWN", "READERS", "File", "Payload", "Reading", "Row", "parse", "read"]

TEXTS: dict[str, Callable[[File], Reading]] = {
    ".jsonl": jsonl.read,
    ".ndjson": jsonl.read,
    ".json": json_list.read,
    ".csv": delimited.read,
    ".tsv": delimited.read,
    ".txt": passages.read,
}
TABLES: dict[str, Callable[[File], Reading]] = {
    ".parquet": parquet.read,
    ".arrow": arrow.read,
    ".feather": arrow.read,
}
READERS: dict[str, Callable[[File], Reading]] = {
    **TEXTS,
    **TABLES,
    **{kind + packed: reader for kind, reader in TEXTS.items() for packed in COMPRESSED},
}
KNOWN = f"{', '.join(TEXTS)} (also {', '.join(COMPRESSED)} of them), {', '.join(TABLES)}"
"""The suffixes, in words."""


def read(file: File) -> Reading:
    """The rows of a file, in order. Raises UserError where it cannot be read."""
    try:
        yield from READERS[suffix_of(file.path.name)](file)
    except DAMAGED as error:
        hint = "it may be cut off: copy it again" if is_compressed(file.path) else None
        raise misread(error, file.shown, hint=hint, code=DATA) from None
