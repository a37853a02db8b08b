"""A text file is one document, handed on in passages cut at line ends.

The number of a row is the line that its passage begins on.
"""

from __future__ import annotations

from llmpipe.data.readers.row import (
    MAX_LINE,
    File,
    Reading,
    Row,
    if_utf8,
    lines_of,
    open_text,
    too_long,
)

PASSAGE = 32 << 10  # bytes, about


def read(file: File) -> Reading:
    begin = 1
    lines: list[str] = []
    size = 0
    with open_text(file, newline=None) as stream:
        for number, line in enumerate(lines_of(stream), 1):
            if line is None:
                yield from _passage(begin, lines)
                yield Row(number, too_long()), MAX_LINE
            else:
                lines.append(line)
                size += len(line)
                if size <= PASSAGE:
                    continue
                yield from _passage(begin, lines)
            begin, lines, size = number + 1, [], 0
        yield from _passage(begin, lines)


def _passage(number: int, lines: list[str]) -> Reading:
    """A row of these lines, where they say anything."""
    text = "".join(lines)
    if text.strip():
        yield Row(number, if_utf8(text, {"text": text.strip("\n")})), len(text)
