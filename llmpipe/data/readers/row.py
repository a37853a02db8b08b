"""A row as a file holds it, and what it says."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from llmpipe.data.fields import is_text, strict_json
from llmpipe.data.formats import Rejected
from llmpipe.data.readers.compressed import open_bytes, text_bytes
from llmpipe.errors import UserError

MAX_LINE = 64 << 20  # bytes of one row
_ESCAPED = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, under errors="surrogateescape"

Payload = bytes | dict[str, Any] | Rejected  # a JSON text, an object, or why it cannot be read


@dataclass(frozen=True)
class File:
    """A file of rows."""

    name: str
    """Relative to the source; goes into records."""
    shown: str
    """What the user would type."""
    path: Path
    bytes: int
    sha256: str
    state: tuple[int, ...] | None = None
    """Of it before it was hashed, see `state_of`; None where it was not."""

    @property
    def text_bytes(self) -> int:
        """Of its rows; of a compressed file an estimate."""
        return text_bytes(self.path, self.bytes)


def state_of(path: Path) -> tuple[int, ...] | None:
    """Which file lies at a path, its size and when it was written; None where none does.

    Another one where a single byte was written: what is read for hours is not hashed again.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Row(NamedTuple):
    """A row, not yet parsed: that is left to the process that tokenizes it."""

    number: int
    """What a person would look for in the file, from 1."""
    payload: Payload


# Each row with the bytes of the file that it takes, nearly.
Reading = Iterator[tuple[Row, int]]


def open_text(file: File, newline: str | None = "") -> IO[str]:
    """A file as text; a byte that is not UTF-8 is read as one that `if_utf8` sees."""
    stream = open_bytes(file.path)
    return io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline=newline)


def lines_of(stream: IO[str]) -> Iterator[str | None]:
    """The lines of a text, each with its end; None stands for one of more than MAX_LINE."""
    while line := stream.readline(MAX_LINE):
        if len(line) < MAX_LINE or line.endswith(("\n", "\r")):
            yield line
            continue
        while line and not line.endswith(("\n", "\r")):
            line = stream.readline(MAX_LINE)
        yield None


def too_long() -> Rejected:
    """Why a line of more than MAX_LINE is not read."""
    return Rejected("line too long", f"more than {MAX_LINE >> 20} MB")


def if_utf8(text: str, payload: bytes | dict[str, Any]) -> Payload:
    """The payload that was made of a text of `open_text`, unless the text is not UTF-8."""
    if _ESCAPED.search(text):
        return Rejected("not UTF-8", "save the file as UTF-8")
    return payload


def check_names(names: list[str], where: str) -> None:
    """Raises UserError where two columns have one name, as only one of them would be read, and
    where a name is not UTF-8, as no record could hold it."""
    if not all(map(is_text, names)):
        problem = f"{where}: the header is not UTF-8"
        raise UserError(problem, "save the file as UTF-8")
    numbers: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if name and numbers.setdefault(name, number) != number:
            both = f"number {numbers[name]} and {number}"
            problem = f"{where}: two columns are called '{name[:100]}', {both}"
            raise UserError(problem, "rename or remove one of them")


def parse(payload: Payload) -> dict[str, Any]:
    """The columns of a row, under their own names. Raises Rejected."""
    if isinstance(payload, Rejected):
        raise payload
    if isinstance(payload, dict):
        return {name: _without_fillers(value) for name, value in payload.items()}
    try:
        text = payload.decode()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{payload[error.start]:02x} at position {error.start + 1}"
        raise Rejected("not UTF-8", f"{byte}; save the file as UTF-8") from None
    try:
        columns = strict_json(text)
    except json.JSONDecodeError as error:
        raise _mistake(text, error) from None
    except (ValueError, RecursionError) as error:
        # a number of thousands of digits, nesting without end
        raise Rejected("bad JSON", str(error)[:100]) from None
    if not isinstance(columns, dict):
        raise Rejected("not an object", f"a row is {{...}}, not {text.strip()[:20]}")
    return columns


def _without_fillers(value: Any) -> Any:
    """A value of a table, less the nulls that its columns hold where only other rows have a key."""
    if isinstance(value, dict):
        return {name: _without_fillers(it) for name, it in value.items() if it is not None}
    if isinstance(value, list):
        return [_without_fillers(item) for item in value]
    return value


def _mistake(text: str, error: json.JSONDecodeError) -> Rejected:
    if "\x00" in text:
        return Rejected("NUL character", f"at position {text.index(chr(0)) + 1}")
    detail = f"{error.msg} at position {error.pos + 1}"
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
        detail += " (the line is cut off)"
    return Rejected("bad JSON", detail)
