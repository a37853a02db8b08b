"""A text file is one document, handed on in passages cut at line ends.

The number of a row is the line that its passage begins on.
"""

from __future__ import annotations

from llmpipe.data.readers.row import File, Reading, Row, if_utf8, open_text

PASSAGE = 32 << 10  # bytes, about


def read(file: File) -> Reading:
    number = 1
    with open_text(file, newline=None) as stream:
        while lines := stream.readlines(PASSAGE):
            text = "".join(lines)
            if text.strip():
                yield Row(number, if_utf8(text, {"text": text.strip("\n")})), len(text)
            number += len(lines)
