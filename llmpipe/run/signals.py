"""Signals that stop a run: SIGINT, SIGTERM, and SIGHUP of a terminal that is gone."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

from llmpipe.errors import SIGINT, SIGTERM, Stopped

ONE_PRESS = 0.5
"""Seconds in which several SIGINTs are one Ctrl-C, that came by the terminal and by the command."""


def stopping() -> list[signal.Signals]:
    """Signals that stop a run. Under `nohup` SIGHUP is ignored, and stays so."""
    served = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        served.append(signal.SIGHUP)
    return served


def code_of(number: int) -> int:
    """The exit code of who served a signal: 130 or 143."""
    return SIGINT if number == signal.SIGINT else SIGTERM


def hold() -> None:
    """Let what stops a run wait in this process, and in those that it starts, until `heed`: Python
    is not ready for a signal while it starts.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, stopping())


def heed() -> None:
    """Serve what came meanwhile, and what comes."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping())


class Signals:
    """A signal ends the process at once, or, where `deferred`, at the end of a step.

    A second Ctrl-C ends it at once in any case.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.code: int | None = None
        """The exit code of the first signal that came."""
        self.deferred = False
        """Set by a training loop, which looks at `code` after each step."""
        self._clock = clock
        self._came = 0.0
        self._raised = False

    def install(self) -> Signals:
        for number in stopping():
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = self._clock()
        again = self.code is not None and number == signal.SIGINT and now - self._came > ONE_PRESS
        if self.code is None:
            self.code = code_of(number)
            self._came = now
        # what comes while the first one is being served changes nothing
        if again or not (self.deferred or self._raised):
            self._raised = True
            raise Stopped(self.code, "stopped")
