"""A JSON list of rows; or JSON Lines under another suffix. The number of a row counts from 1."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import IO

from llmpipe.data.readers import jsonl
from llmpipe.data.readers.row import MAX_LINE, File, Reading, Row, if_utf8, open_text
from llmpipe.errors import UserError

STEP = 1 << 18  # characters read at once
_BETWEEN_ROWS = re.compile(r"[ \t\r\n,]*")
_DECODER = json.JSONDecoder()
_OPEN = re.compile(r'\{\s*("[^"]*"\s*:\s*([\[{]\s*)*)?')  # a first line that goes on in the next
_LIST = re.compile(r'"([^"]*)"\s*:\s*\[\s*\{')
_AROUND = {"data", "rows", "train", "test", "examples", "items", "instances", "records", "samples"}


def read(file: File) -> Reading:
    """Raises UserError where the list breaks off, as what follows a mistake cannot be read, where
    more follows the list, and where the rows are inside of an object."""
    with open_text(file) as stream:
        beginning = stream.read(STEP).lstrip()
        if beginning.startswith("{"):
            _refuse_one_object(file, beginning)
            yield from jsonl.read(file)
            return
        if not beginning.startswith("["):
            hint = "a .json file holds [{...}, {...}] or one {...} per line"
            raise UserError(f"{file.shown}: is neither a list of rows nor one row per line", hint)
        window = _Window(file, stream, beginning)
        while (text := window.next_row()) is not None:
            payload = if_utf8(text, text.encode(errors="ignore"))
            yield Row(window.rows, payload), len(text)


def _refuse_one_object(file: File, beginning: str) -> None:
    """Raise UserError for an object over several lines, or around a list of rows."""
    line, _, others = beginning.partition("\n")
    around = _LIST.search(beginning)
    if _OPEN.fullmatch(line.strip()) and others.strip():
        problem = "an object over several lines"
    elif not others.strip() and around and around[1] in _AROUND:
        problem = "one object around a list of rows"
    else:
        return
    name = file.path.name
    hint = "a .json file holds [{...}, {...}] or one {...} per line"
    hint += f"; jq -c . {name} > rows.jsonl writes the latter"
    if around:
        hint += f", and jq -c '.{around[1]}[]' {name} if its list '{around[1]}' holds the rows"
    raise UserError(f"{file.shown}:1: {problem}", hint)


@dataclass
class _Window:
    """The stretch of a file that is held; it slides over the list."""

    file: File
    stream: IO[str]
    text: str
    at: int = 1  # where in `text` the next row may begin; first behind the bracket
    line: int = 1  # the line of the file that `text` begins on
    rows: int = 0  # so far
    step: int = STEP
    ended: bool = False

    def next_row(self) -> str | None:
        """The text of a row, or None behind the last one. Raises UserError."""
        while True:
            between = _BETWEEN_ROWS.match(self.text, self.at)
            assert between is not None  # it matches nothing, too
            self.at = between.end()
            if self.text[self.at : self.at + 1] == "]":
                self.at += 1
                self._check_rest()
                return None
            try:
                end = self._end_of_row()
            except (ValueError, RecursionError) as error:
                if self.ended or len(self.text) - self.at > MAX_LINE:
                    raise self._broken(error) from None
                self._slide()
            else:
                row = self.text[self.at : end]
                self.at = end
                self.rows += 1
                self.step = STEP
                return row

    def _end_of_row(self) -> int:
        if self.at == len(self.text):
            raise json.JSONDecodeError("the file is cut off", self.text, self.at)
        _, end = _DECODER.raw_decode(self.text, self.at)
        return end

    def _check_rest(self) -> None:
        while not self.ended:
            if rest := self.text[self.at :].lstrip():
                line = self.line + self.text.count("\n", 0, len(self.text) - len(rest))
                problem = f"{self.file.shown}:{line}: more follows the list that ends before"
                hint = f"it begins with {rest[:20]!r}; join the lists, or write one row per line"
                raise UserError(problem, hint)
            self.at = len(self.text)
            self._slide()

    def _slide(self) -> None:
        """Drop what was read, and read on: more each time, for a row that is long."""
        more = self.stream.read(self.step)
        self.line += self.text.count("\n", 0, self.at)
        self.text = self.text[self.at :] + more
        self.at = 0
        self.ended = not more
        self.step = min(self.step * 2, MAX_LINE)

    def _broken(self, error: ValueError | RecursionError) -> UserError:
        problem = str(error)[:100]
        at = self.at
        if isinstance(error, json.JSONDecodeError):
            problem = error.msg
            at = error.pos
        number = self.rows + 1
        line = self.line + self.text.count("\n", 0, at)
        where = f"{self.file.shown}:{number}: row {number} (line {line})"
        hint = "a JSON list cannot be read past a mistake; one row per line (.jsonl) can"
        return UserError(f"{where} is not valid JSON: {problem}", hint)
