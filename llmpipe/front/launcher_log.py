"""What a launcher and its workers say on standard error goes into log.txt, as all of it is kept:
without this machine's paths and without secrets.

A thread reads it line by line while they run. It reads on where the disk takes no more: who writes
to a pipe that nobody empties waits for ever.
"""

from __future__ import annotations

import contextlib
import os
from threading import Thread

from llmpipe.errors import UserError
from llmpipe.files.writing import to_write
from llmpipe.run.artifact import Artifact
from llmpipe.run.machine_paths import MachinePaths

PATIENCE = 5
"""Seconds that the last lines may take, once whoever was started has ended."""

LONGEST = 1 << 16
"""Bytes of a line; more is cut into several."""


class Said:
    """A place to write to, and what was written; on leaving it all of it is kept."""

    def __init__(self, artifact: Artifact):
        self._paths = MachinePaths.of(artifact)
        self._log = artifact.path / "log.txt"
        self._lines: list[str] = []
        self._reader, self._writer = os.pipe()
        self._thread = Thread(target=self._read, daemon=True)

    @property
    def text(self) -> str:
        """As it is kept."""
        return "".join(self._lines)

    def begin(self) -> None:
        """Leave the place to those who were started. (A fork beside a thread may stand still.)"""
        os.close(self._writer)
        self._thread.start()

    def __enter__(self) -> Said:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():  # an orphan may hold the place open
            self._thread.join(PATIENCE)

    def fileno(self) -> int:
        return self._writer

    def _read(self) -> None:
        with open(self._reader, "rb") as lines:
            while line := lines.readline(LONGEST):
                self._lines.append(self._paths.kept(line.decode(errors="replace")))
                with contextlib.suppress(OSError, UserError), to_write(self._log, "a") as log:
                    log.write(self._lines[-1])
