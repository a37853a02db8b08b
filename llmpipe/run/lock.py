"""Who may write: an flock for each artifact."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time

from llmpipe.errors import BUSY, UserError
from llmpipe.files.writing import descriptor_of
from llmpipe.run.artifact import Artifact, make_run, not_writable

PAUSE = 0.05
"""Seconds between two tries."""


class Lock:
    """An flock on a file of the run; it is gone with the process that has it, however that ends.

    Two locks guard an artifact. `start` is taken by the command, from planning to the end; `write`
    by the process that trains, so that a command started after its predecessor was killed cannot
    admit a second writer. A parent artifact is locked shared while it is read.
    """

    def __init__(self, artifact: Artifact, role: str = "start", shared: bool = False):
        self.path = artifact.run / ".locks" / f"{artifact.name}.{role}"
        self.artifact = artifact
        self.shared = shared
        self.descriptor: int | None = None

    def acquire(self, wait: float = 0) -> Lock:
        """Take the lock, trying for `wait` seconds.

        Raises UserError (75) naming the pid and host of the process that has it, or (5) where the
        run cannot be written, or its file system knows no locks.
        """
        descriptor = self._open()
        deadline = time.monotonic() + wait
        try:
            while not self._take(descriptor):
                expired = time.monotonic() >= deadline
                time.sleep(PAUSE)  # after the last try too: the other may be about to sign
                if expired:
                    raise self._busy(descriptor)
            if not self.shared:
                _sign(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self.descriptor = descriptor
        return self

    def release(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def __enter__(self) -> Lock:
        return self if self.descriptor is not None else self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _open(self) -> int:
        """The file to lock; of a parent that is only to be read, and lies where we may not write,
        the folder itself: then nobody of ours can move it aside.
        """
        try:
            make_run(self.artifact.run)
            return descriptor_of(self.path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            problem = not_writable(self.artifact.run, error)
        except UserError as error:
            problem = error
        if self.shared and self.artifact.path.is_dir():
            return os.open(self.artifact.path, os.O_RDONLY | os.O_CLOEXEC)
        raise problem

    def _take(self, descriptor: int) -> bool:
        """Whether the lock was free and is now taken."""
        kind = fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise not_writable(self.artifact.run, error) from None
        return True

    def _busy(self, descriptor: int) -> UserError:
        signature = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        return UserError(
            f"{self.artifact.path}: busy: {signature or 'another process'} is at work on it",
            "wait for it to end, or stop it; nothing was changed",
            BUSY,
        )


def _sign(descriptor: int) -> None:
    """Leave in the file who has the lock."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
