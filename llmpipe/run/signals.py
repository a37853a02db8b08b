"""SIGINT and SIGTERM, and workers that end with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

from llmpipe.errors import SIGINT, SIGTERM, Stopped


class Signals:
    """SIGINT and SIGTERM: at once by default, at the end of the step inside training; a second Ctrl-C at once."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.deferred = False

    def install(self) -> Signals:
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)
        return self

    def _handle(self, number: int, _: FrameType | None) -> None:
        code = SIGINT if number == signal.SIGINT else SIGTERM
        again = self.code is not None and number == signal.SIGINT
        self.code = self.code or code
        if not self.deferred or again:
            raise Stopped(self.code, "stopped")


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when its parent ends; end now when it already has."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if parent is not None and os.getppid() != parent:
            os._exit(137)
