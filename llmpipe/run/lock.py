"""Who may write: an flock for each artifact."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time

from llmpipe.errors import BUSY, UserError
from llmpipe.run.artifact import Artifact


class Lock:
    """An flock on a file of the run; it is gone with the process that holds it, however that ends.

    Two locks guard an artifact. `start` is held by the command, from planning to the end; `write` by the process that
    trains, so that a command started after its predecessor was killed cannot admit a second writer. A parent artifact
    is held shared while it is read.
    """

    def __init__(self, artifact: Artifact, role: str = "start", shared: bool = False):
        self.path = artifact.run / ".locks" / f"{artifact.name}.{role}"
        self.artifact = artifact
        self.shared = shared
        self.fd: int | None = None

    def acquire(self, wait: float = 0) -> Lock:
        """Take the lock or raise UserError (75) naming the holder's pid and host; try for `wait` seconds."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    os.close(fd)
                    raise
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                time.sleep(0.05)  # the holder may be about to write its name
                holder = os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
                os.close(fd)
                raise UserError(
                    f"{self.artifact.path}: busy: {holder} is at work on it",
                    "wait for it to end, or stop it; nothing was changed",
                    BUSY,
                ) from None
        if not self.shared:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self.fd = fd
        return self

    def release(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def __enter__(self) -> Lock:
        return self if self.fd is not None else self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()
