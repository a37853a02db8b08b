"""Comma- or tab-separated values under a header. The number of a row is the line it begins on."""

from __future__ import annotations

import csv

from llmpipe.data.formats import Rejected
from llmpipe.data.readers.row import MAX_LINE, File, Reading, Row, if_utf8, open_text


def read(file: File) -> Reading:
    csv.field_size_limit(MAX_LINE)
    delimiter = "\t" if file.path.suffix.lower() == ".tsv" else ","
    with open_text(file) as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            number = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(number, _wrong(f"{error}; a quote that is never closed?")), 0
                continue
            text = ",".join(fields)
            if header is None:
                header = [name.strip() for name in fields]
            elif not fields:  # a blank line
                continue
            elif len(fields) != len(header):
                yield Row(number, _wrong(f"{len(fields)} instead of {len(header)}")), len(text)
            else:
                # as pandas and datasets have it, an empty cell is none
                columns = {name: field or None for name, field in zip(header, fields, strict=True)}
                yield Row(number, if_utf8(text, columns)), len(text)


def _wrong(detail: str) -> Rejected:
    return Rejected("wrong number of fields", detail)
