"""A terminal: colours, and the one line that moves, with history above it.

    with screen.doing("hashing the model"):
        ...

A thread draws the line anew, so that nobody wonders whether a command still lives. Nothing of this
is there where neither standard error nor standard output is a terminal. What is printed by Python
goes above the line (`front.terminal.Output` makes way). One line a process: of several, the first.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, RLock, Thread
from typing import TextIO

PAUSE = 0.25
"""Seconds between two drawings; what takes less is not shown."""
PATIENCE = 2
"""Seconds from which on it is said how long the same takes."""
WIDTH = 80
"""Columns of a terminal that does not say."""

ERASE = "\r\033[K"
RED, GREEN, YELLOW, DIM, PLAIN = "\033[31m", "\033[32m", "\033[33m", "\033[2m", "\033[0m"


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal that obeys escape sequences."""
    if os.environ.get("TERM") == "dumb" or stream is None:
        return False
    with suppress(ValueError, OSError):  # it may be closed
        return stream.isatty()
    return False


def has_colours(stream: TextIO | None) -> bool:
    """Whether to write in colours there: on a terminal, unless NO_COLOR says otherwise
    (https://no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def coloured(text: str, colour: str, stream: TextIO | None) -> str:
    return f"{colour}{text}{PLAIN}" if has_colours(stream) else text


def width_of(text: str) -> int:
    """Columns that a text takes: Chinese characters take two."""
    if text.isascii():
        return len(text)
    import unicodedata  # here, since most lines are ASCII

    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def cut(text: str, width: int) -> str:
    """A text that takes no more than `width` columns."""
    if width_of(text) <= width:
        return text
    shown, columns = "", 0
    for character in text:
        columns += width_of(character)
        if columns > width - 3:
            break
        shown += character
    return f"{shown}..."


class Line:
    """The line that moves. Texts lie on one another: the last one that is not over is shown."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._texts: list[tuple[str, float]] = []  # and since when each is true
        self._is_drawn = False
        self._is_column_zero = True
        self._over = Event()
        self._thread: Thread | None = None

    @contextmanager
    def doing(self, text: str) -> Iterator[Callable[[str], None]]:
        """Show a text meanwhile; what is yielded puts another one in its place."""
        stream = _stream()
        if stream is None:
            yield lambda _: None
            return
        depth = len(self._texts)
        self._texts.append((text, time.monotonic()))
        began = self._begin(stream)

        def say(text: str) -> None:
            if depth < len(self._texts):  # or it is over
                self._texts[depth] = (text, time.monotonic())

        try:
            yield say
        finally:
            del self._texts[depth:]
            if began:
                self._end()

    def _begin(self, stream: TextIO) -> bool:
        """Start to draw where nobody does."""
        if self._thread and self._thread.is_alive():
            return False
        self._over = Event()
        self._thread = Thread(target=self._draw_until, args=(self._over, stream), daemon=True)
        self._thread.start()
        return True

    def _end(self) -> None:
        """Stop drawing: no thread stays, beside which a fork might stand still."""
        self._over.set()
        if self._thread:
            self._thread.join()
        self._thread = None

    def _draw_until(self, over: Event, stream: TextIO) -> None:
        while not over.wait(PAUSE):
            self._draw(stream)
        with self._lock:
            self._erase(stream.fileno())

    def _draw(self, stream: TextIO) -> None:
        with self._lock:
            if not self._texts or not self._is_column_zero:
                return
            text, since = self._texts[-1]
            age = int(time.monotonic() - since)
            if age >= PATIENCE:
                text += f"  {age}s"
            text = coloured(cut(text, _columns(stream) - 1), DIM, stream)
            self._is_drawn = _write(stream.fileno(), ERASE + text, stream.encoding)

    @contextmanager
    def aside(self, descriptor: int, text: str) -> Iterator[None]:
        """Make way while `text` is written to a terminal."""
        with self._lock:
            self._erase(descriptor)
            if text:
                self._is_column_zero = text.endswith("\n")
            yield

    def _erase(self, descriptor: int) -> None:
        if self._is_drawn:
            _write(descriptor, ERASE)
            self._is_drawn = False


def _stream() -> TextIO | None:
    """The terminal that is drawn on: of several processes the first one's."""
    if os.environ.get("RANK", "0") != "0":
        return None
    return next((stream for stream in (sys.stderr, sys.stdout) if is_terminal(stream)), None)


def _columns(stream: TextIO) -> int:
    with suppress(OSError):
        return os.get_terminal_size(stream.fileno()).columns or WIDTH
    return WIDTH


def _write(descriptor: int, text: str, encoding: str = "utf-8") -> bool:
    """Write in one piece, so that nothing of another process comes between; whether that went."""
    with suppress(OSError):
        os.write(descriptor, text.encode(encoding, errors="replace"))
        return True
    return False


def is_shown() -> bool:
    """Whether there is a terminal to draw on."""
    return _stream() is not None


LINE = Line()

doing = LINE.doing
