"""What is printed reaches whoever reads, or is lost: no work ends for want of a reader.

A terminal that cannot show a character shows another one in its place. What a reader that has gone,
or a disk that is full, does not take is lost, and the exit code says so in the end.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from functools import cached_property
from typing import TextIO

from llmpipe.errors import DONE, RESOURCES
from llmpipe.screen import LINE, is_terminal

READER_GONE = 141
"""The exit code of who wrote to a pipe that nobody reads any more: 128 + SIGPIPE."""

_lost: list[OSError] = []


class Output(io.TextIOWrapper):
    """Standard output or error, from the first failure on without effect; on a terminal what is
    written makes the line that moves make way."""

    @cached_property
    def _is_terminal(self) -> bool:
        return is_terminal(self)

    def write(self, text: str) -> int:
        if not self._is_terminal:
            return self._write(text)
        with LINE.aside(self.fileno(), text):
            written = self._write(text)
            self.flush()  # before the line is drawn again
        return written

    def _write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        _lost.append(error)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def open_terminal() -> None:
    """Make standard input, output and error fit to be used, whatever they are."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            os.set_inheritable(nowhere, True)  # or a worker's first file would have that number
    sys.stdout = _output(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _output(sys.stderr, sys.__stderr__, 2)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def _output(stream: TextIO | None, original: TextIO | None, descriptor: int) -> TextIO:
    """The stream in place of one of Python's own; one of somebody else's as it is."""
    if stream is None:  # it was closed when Python started
        return Output(open(descriptor, "wb", closefd=False), "utf-8", "replace")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    if stream is not original:
        stream.reconfigure(errors="replace")
        return stream
    encoding, buffered_by_line = stream.encoding, stream.line_buffering
    return Output(stream.detach(), encoding, "replace", line_buffering=buffered_by_line)


def say(line: str) -> None:
    """Print a line; of a launcher's processes the first one does."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def exit_code() -> int:
    """What a command ends with that did all it had to: 0 where everything printed was taken."""
    sys.stdout.flush()
    if not _lost:
        return DONE
    if _lost[0].errno == errno.EPIPE:
        return READER_GONE
    print(f"error: standard output: {_lost[0].strerror}", file=sys.stderr)
    return RESOURCES
