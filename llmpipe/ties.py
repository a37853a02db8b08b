"""Processes that end with those they work for, whenever and however these end.

Linux kills a process when its parent ends, once the process has asked for that (`prctl(2)`,
PR_SET_PDEATHSIG). Whoever asks looks at its parent afterwards: one that had ended before would
never be missed. Asking comes first in a process, before anything heavy is imported. Elsewhere than
on Linux nothing is tied.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # prctl(2): the signal that this process gets when its parent ends
PARENT = "LLMPIPE_PARENT"
"""In the environment of a worker: the pid of the command that it works for."""
KILLED = 128 + signal.SIGKILL


def die_with_parent(parent: int | None = None, by: signal.Signals = signal.SIGKILL) -> None:
    """Ask Linux to kill this process, or to send it another signal, when its parent ends.

    `parent`: the pid that the parent should have; with another one it has ended already, and so
    does this process.
    """
    if sys.platform != "linux":
        return
    import ctypes  # here: help and mistakes are answered without it

    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, by)
    if parent is not None and os.getppid() != parent:
        os._exit(KILLED)


def die_with_command() -> None:
    """For a worker: end with the command, which started it, or its launcher, which is tied itself.

    A launcher whose command has ended has another parent, and so has a worker without launcher.
    """
    command = int(os.environ[PARENT])
    if "RANK" not in os.environ:
        die_with_parent(command)
    else:
        die_with_parent()
        if sys.platform == "linux" and parent_of(os.getppid()) != command:
            os._exit(KILLED)
    tie_forks()


def die_with_launcher() -> None:
    """For a command that somebody else's launcher started: end with that.

    Where torchrun is gone already, the process has been adopted by one that takes in orphans.
    """
    # `accelerate launch` of one process ends at once when it is stopped, and hands nothing on
    die_with_parent(by=signal.SIGKILL if "RANK" in os.environ else signal.SIGTERM)
    adopted = os.getppid() == 1 or _read(os.getppid(), "comm") == b"systemd\n"
    if adopted and "TORCHELASTIC_RUN_ID" in os.environ and not _launches_us(os.getppid()):
        os._exit(KILLED)
    tie_forks()


def tie_forks() -> None:
    """Let every process that Python forks from here on end with this one: a data loader's workers.

    One that is forked in a thread is not tied, since it would end with the thread.
    """
    if sys.platform != "linux":
        return
    parent: list[int] = []

    def before() -> None:
        import threading

        parent[:] = [os.getpid()] if threading.get_native_id() == os.getpid() else []

    def in_child() -> None:
        if parent:
            die_with_parent(parent[0])

    os.register_at_fork(before=before, after_in_child=in_child)


class Tie:
    """Sent to a process that is spawned, ahead of all else: it ends with its sender from then on,
    before what follows is unpickled and imports what it needs.
    """

    def __init__(self) -> None:
        self.sender = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self.sender,)


def _arrive(sender: int) -> Tie:
    die_with_parent(sender)
    return Tie()


def call_tied(_: Tie, function: Callable[..., None], *arguments: Any) -> None:
    """`function(*arguments)` as a pool's initializer; see `Tie`."""
    function(*arguments)


def parent_of(pid: int) -> int | None:
    """Pid of a process's parent; None where there is no such process."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if fields else None


def children(pid: int) -> list[int]:
    """Pids of what a process has started and not yet waited for."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []
    return [int(child) for thread in threads for child in _read(pid, thread / "children").split()]


def descendants(pid: int) -> list[int]:
    """Pids of a process's children, of theirs, and so on; each after its parent."""
    below = children(pid)
    for child in below:  # which grows meanwhile
        below += children(child)
    return below


def _read(pid: int, name: str | Path) -> bytes:
    """A file of /proc/PID; nothing where it cannot be read."""
    try:
        return Path("/proc", str(pid), name).read_bytes()
    except OSError:
        return b""


def _launches_us(pid: int) -> bool:
    """Whether a process may be our launcher: its command ends as ours, or it is one of Python's."""
    ours = [os.fsencode(argument) for argument in sys.argv[1:]]
    theirs = _read(pid, "cmdline").split(b"\0")[:-1]
    if ours and theirs[-len(ours) :] == ours:
        return True
    try:
        return "python" in os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return False
