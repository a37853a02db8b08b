"""One place turns what libraries and machines raise into a line and an exit code.

Whoever makes a call knows whose file it reads, and says so there: `reading`. The door knows of all
that is left only whether the machine is to blame: `of_machine`. What neither explains is a bug.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmpipe.errors import INTEGRITY, RESOURCES, Stopped, UserError, first_line

NO_SPACE = "No space left on device"

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""What a system says of a disk that takes no more."""

REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    errno.ENAMETOOLONG,
)
"""What a system says of a place in which this user cannot write."""

NO_MEMORY = ("can't allocate memory", "out of memory", "DefaultCPUAllocator")
"""Words of libraries whose allocation failed."""


@contextmanager
def reading(
    path: Path,
    form: str,
    *errors: type[Exception],
    hint: str | None = None,
    code: int = INTEGRITY,
) -> Iterator[None]:
    """What raises one of `errors` here is a file of somebody's that is not what it should be.

    `form`: what it is read as, "safetensors". Raises UserError of that `code` naming the file;
    what the machine is to blame for (5).
    """
    try:
        yield
    except (UserError, Stopped):
        raise
    except errors as error:
        if fault := of_machine(error, path):
            raise fault from error
        problem = f"{path}: cannot be read as {form}: {first_line(error)}"
        raise UserError(problem, hint, code) from error


def of_machine(error: BaseException, target: Path) -> UserError | None:
    """What to say (5) where memory, or the disk that `target` lies on, is to blame; else None."""
    return of_memory(error) or of_disk(error, target)


def of_memory(error: BaseException) -> UserError | None:
    """What to say (5) of an allocation that failed, in whatever words; None of anything else."""
    text = str(error)
    if not isinstance(error, MemoryError) and not any(word in text for word in NO_MEMORY):
        return None
    return UserError(
        f"out of memory: {text.splitlines()[0] if text else 'MemoryError'}",
        "lower launch.micro_batch_size or data.max_length, "
        "or set launch.activation_checkpointing: true",
        RESOURCES,
    )


def of_disk(error: BaseException, target: Path) -> UserError | None:
    """What to say (5) of a disk that is full, fails or refuses; None of anything else.

    A refusal counts where it is of something in the folder that `target` lies in.
    """
    # safetensors has an error of its own
    if isinstance(error, Exception) and NO_SPACE in str(error):
        error = OSError(errno.ENOSPC, NO_SPACE)
    if not isinstance(error, OSError):
        return None
    reason = error.strerror or NO_SPACE
    if error.errno in FULL:
        hint = "make room and run the same command again: it goes on from the last checkpoint"
        return UserError(f"{target}: cannot be written: {reason}", hint, RESOURCES)
    path = os.path.abspath(os.fsdecode(error.filename)) if error.filename else ""
    if error.errno in REFUSED and Path(path).is_relative_to(os.path.abspath(target.parent)):
        hint = "make the run directory writable, or name another one: --run DIR"
        return UserError(f"{error.filename}: cannot be written: {reason}", hint, RESOURCES)
    return None
