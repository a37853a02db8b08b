"""Comma- or tab-separated values under a header. The number of a row is the line it begins on.

Quotes follow RFC 4180: a field may be quoted, and then hold delimiters and line ends. A stray quote
must not swallow the rows behind it, so:

- a quote that is not closed as it should be costs the line that it stands on and no other;
- a row over several lines, most of which are rows by themselves, has two readings, and all of them
  are refused, unless quotes within fields were doubled, as whoever quotes with care does it;
- a .tsv is mostly written without quotes: until a row has shown that it is not, such lines are
  taken as they are, and always is a line that makes no sense with quotes.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from llmpipe.data.formats import Rejected
from llmpipe.data.readers.compressed import suffix_of
from llmpipe.data.readers.row import (
    MAX_LINE,
    File,
    Payload,
    Reading,
    Row,
    check_names,
    if_utf8,
    lines_of,
    open_text,
)
from llmpipe.errors import UserError

# Prose has a space, a line end or the end of the field behind a comma, or is a number of thousands.
_BETWEEN = {
    ",": re.compile(r',(?!\s|"?\s*$|(?<=\d,)\d{3}(?!\d))'),
    "\t": re.compile(r"\t"),
}
_DOUBLED = re.compile(r'[^,\t\r\n]""[^,\t\r\n]')  # as whoever quotes with care writes a quote
# `a, "b"`: a field that is quoted for its writer and not for a reader of CSV
_SPACED = re.compile(r'[ ]+"[^"]*"\s*')
NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


def read(file: File) -> Reading:
    """Raises UserError where the header names a column twice, or has another delimiter."""
    csv.field_size_limit(MAX_LINE)
    delimiter = "\t" if suffix_of(file.path.name).startswith(".tsv") else ","
    with open_text(file) as stream:
        records = _Records(stream, file.shown, delimiter)
        header: list[str] = []
        while (record := records.next(len(header))) is not None:
            number, text, fields = record
            if isinstance(fields, Rejected):
                yield Row(number, fields), len(text)
            elif not fields:  # a blank line
                continue
            elif not header:
                header = fields
                columns = _columns(file, number, header, delimiter)
            else:
                yield Row(number, _payload(text, fields, header, columns)), len(text)


def _payload(text: str, fields: list[str], header: list[str], columns: list[str]) -> Payload:
    if len(fields) != len(header):
        lines = text.rstrip("\r\n").count("\n") + 1
        over = f" over {lines} lines" if lines > 1 else ""
        return Rejected("wrong number of fields", f"{len(fields)} instead of {len(header)}{over}")
    if ', "' in text and any(map(_SPACED.fullmatch, fields)):
        return Rejected("bad quotes", "a space stands before a quote, which then quotes nothing")
    if fields == header:
        return Rejected("the header again", "as where files were joined")
    # as pandas and datasets have it, an empty cell is none
    cells = {name: field or None for name, field in zip(columns, fields, strict=True)}
    return if_utf8(text, cells)


def _columns(file: File, line: int, header: list[str], delimiter: str) -> list[str]:
    """What the columns are called. Raises UserError."""
    where = f"{file.shown}:{line}"
    names = [name.strip() for name in header]
    if len(names) == 1:
        for other, word in NAMES.items():
            if other in names[0] and other != delimiter:
                problem = f"{where}: the header is one column with {word}, not {NAMES[delimiter]}"
                raise UserError(problem, f"save the file with {NAMES[delimiter]}, or as .jsonl")
    check_names(names, where)
    # the index that pandas writes, or a delimiter at the end
    return [name or f"column {number} without a name" for number, name in enumerate(names, 1)]


@dataclass
class _Lines:
    """The lines of a file, for a reader that may give some of them back."""

    lines: Iterator[str | None]
    shown: str
    number: int = 0
    """Of the line that was taken last."""
    taken: list[str] = field(default_factory=list)
    """Since the row began."""
    again: deque[str] = field(default_factory=deque)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else next(self.lines)
        self.number += 1
        if line is None:
            problem = f"{self.shown}:{self.number}: a line of more than {MAX_LINE >> 20} MB"
            raise UserError(problem, "no field is as long; is it a table at all?")
        self.taken.append(line)
        return line

    def give_back(self) -> str:
        """All lines of the row but the first, which is returned."""
        first, *others = self.taken
        self.number -= len(others)
        self.again.extendleft(reversed(others))
        self.taken = [first]
        return first


class _Records:
    """The rows of a file, as fields."""

    def __init__(self, stream: IO[str], shown: str, delimiter: str):
        self.lines = _Lines(lines_of(stream), shown)
        self.delimiter = delimiter
        self.reader = csv.reader(self.lines, delimiter=delimiter, strict=True)
        self.doubled = False
        """Whether a quoted field has held quotes that were doubled."""
        self.quotes = delimiter != "\t"
        """Whether quotes are known to be the file's way."""
        self.refused: deque[tuple[int, str]] = deque()
        self.between = _BETWEEN[delimiter]

    def next(self, columns: int) -> tuple[int, str, list[str] | Rejected] | None:
        """The line that a row begins on, its text and its fields, or None behind the last one.

        `columns`: how many there are, 0 where the header is still to come.
        """
        if self.refused:
            return (*self.refused.popleft(), _two_readings())
        lines = self.lines
        lines.taken.clear()
        number = lines.number + 1
        try:
            fields = next(self.reader)
        except StopIteration:
            return None
        except csv.Error as error:
            line = lines.give_back()
            return number, line, self._as_it_is(line, columns) or _unclosed(error)
        if len(lines.taken) == 1:
            text = lines.taken[0]
            if not self.doubled and '""' in text:
                self.doubled = any('"' in field for field in fields)
            if not columns and text.startswith('"'):  # who quotes the header quotes all
                self.quotes = True
            return number, text, fields
        if self.doubled or not self._are_rows(columns):
            self.quotes = True
            return number, "".join(lines.taken), fields
        if not self.quotes:
            line = lines.give_back()
            return number, line, line.rstrip("\r\n").split(self.delimiter)
        self.refused.extend(enumerate(lines.taken[1:], number + 1))
        return number, lines.taken[0], _two_readings()

    def _are_rows(self, columns: int) -> bool:
        """Whether most lines of a row would be one without its quotes, the first among them."""
        lines = self.lines.taken
        if columns < 2 or any(map(_DOUBLED.search, lines)):
            return False
        first, *others = (len(self.between.findall(line)) == columns - 1 for line in lines)
        return first and sum(others) * 2 > len(others)

    def _as_it_is(self, line: str, columns: int) -> list[str] | None:
        """The fields of a .tsv's line without quotes, where they are as many as they should be."""
        fields = line.rstrip("\r\n").split("\t")
        return fields if self.delimiter == "\t" and len(fields) == columns else None


def _two_readings() -> Rejected:
    detail = "a quoted field of several lines, or a stray quote and several rows"
    return Rejected("unclear quotes", f"{detail}; .jsonl has no such doubt")


def _unclosed(error: csv.Error) -> Rejected:
    return Rejected("bad quotes", f"{error}; a quote that is never closed?")
