"""SIGINT and SIGTERM, and workers that end with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

from llmpipe.errors import SIGINT, SIGTERM, Stopped

PR_SET_PDEATHSIG = 1  # prctl(2): the signal that this process gets when its parent ends


class Signals:
    """SIGINT and SIGTERM end the process at once, or, where `deferred`, at the end of a step.

    A second Ctrl-C ends it at once in any case.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        """The exit code of the first signal that came."""
        self.deferred = False
        """Set by a training loop, which looks at `code` after each step."""

    def install(self) -> Signals:
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)
        return self

    def _handle(self, number: int, _: FrameType | None) -> None:
        again = self.code is not None and number == signal.SIGINT
        if self.code is None:
            self.code = SIGINT if number == signal.SIGINT else SIGTERM
        if not self.deferred or again:
            raise Stopped(self.code, "stopped")


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when its parent ends.

    `parent`: the pid that the parent should have; with another one it has ended already, and so
    does this process.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)
