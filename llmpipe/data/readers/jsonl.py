"""JSON Lines: one row a line. The number of a row is its line.

Lines are split at "\\n" alone, since a text may hold Unicode line separators.
"""

from __future__ import annotations

import codecs

from llmpipe.data.readers.compressed import open_bytes
from llmpipe.data.readers.row import MAX_LINE, File, Reading, Row, too_long


def read(file: File) -> Reading:
    with open_bytes(file.path) as stream:
        number = 0
        while line := stream.readline(MAX_LINE):
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_LINE)
                yield Row(number, too_long()), MAX_LINE
            elif line.strip():
                yield Row(number, line), len(line)
