"""One place turns what libraries and machines raise into a line and an exit code.

Whoever makes a call knows whose file it reads or writes, and says so there: `reading`, `writing`.
The doors know of all that is left only whether the machine is to blame: `of_machine`. What neither
explains is a bug.

Many libraries drop the system's word: torch says "unexpected pos 64 vs 0" of a full disk. Where
they do, the place is asked: can a page be written there, at this moment?
"""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmpipe.errors import INTEGRITY, LOST, RESOURCES, Stopped, UserError, first_line

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What a system says of a disk that takes no more."""

HANDLES = (errno.EMFILE, errno.ENFILE)
"""What it says where too many files are open."""

REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)
"""What it says of a place in which this user cannot write."""

NO_MEMORY = (
    *("can't allocate memory", "out of memory", "DefaultCPUAllocator"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)
"""Words of libraries whose allocation failed."""

ASKED = re.compile(r"\b(?:m|re)alloc of size (\d+)")
"""How Arrow says of how many bytes."""

DENSEST = 1000
"""Bytes that each of a compressed file may stand for: text that says something has ten or less."""

MEMORY = (
    "lower launch.micro_batch_size or data.max_length, or set launch.activation_checkpointing: full"
)
"""What to do of want of memory in training."""

GO_ON = "the same command goes on from the last checkpoint"
"""What to do where training ended for what may not be so again."""

CODE_IN_WORDS = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)
"""How Rust's and Arrow's libraries write a system's error."""

WORDS = {os.strerror(number): number for number in (*FULL, *HANDLES, errno.ENOMEM)}
"""The others, if at all."""

PAGE = 1 << 16
"""Bytes that a disk with room takes."""

PEER = ("gloo/transport", "gloo/rendezvous", "Connection closed by peer", "Connection reset by")
"""Words of gloo about a process that it has lost; NCCL and the store have an error of their own."""


@contextmanager
def reading(
    path: Path | str,
    form: str,
    *errors: type[Exception],
    hint: str | None = None,
    code: int = INTEGRITY,
) -> Iterator[None]:
    """What raises one of `errors` here, of all where none is named, is a file of somebody's that is
    not what it should be.

    `form`: what it is read as, "safetensors". Raises UserError of that `code` naming the file, and
    (5) where a disk fails or too many files are open.
    """
    try:
        yield
    except (UserError, Stopped):
        raise
    except BaseException as error:
        if not isinstance(error, errors or Exception) and not is_panic(error):
            raise
        if of_peer(error):  # of a model that several processes read together
            raise
        raise misread(error, path, form, hint, code) from error


def misread(
    error: BaseException,
    path: Path | str,
    form: str | None = None,
    hint: str | None = None,
    code: int = INTEGRITY,
    size: int | None = None,
) -> UserError:
    """What to say of an error that came of reading somebody's file, see `reading`.

    `size`: its bytes. Raises the error itself where memory was short, but for a length that no such
    file can hold: who knows the moment knows the remedy.
    """
    if of_memory(error):
        asked = ASKED.search(str(error))
        if size is None or not asked or int(asked[1]) <= max(size * DENSEST, 1 << 31):
            raise error
        why = f"a length of {int(asked[1]):,} bytes, in a file of {size:,}"
        return UserError(f"{path}: cannot be read{_as(form)}: {why}", hint, code)
    if fault := _of_reading(error, path):
        return fault
    why = getattr(error, "strerror", None) or first_line(error)
    return UserError(f"{path}: cannot be read{_as(form)}: {why}", hint, code)


def _as(form: str | None) -> str:
    return f" as {form}" if form else ""


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust panicked, of which Python hears by what is no Exception."""
    return type(error).__name__ == "PanicException"


@contextmanager
def writing(target: Path, staging: Path | None = None) -> Iterator[None]:
    """What fails here because the disk does is said so (5), as long as it does.

    `target`: what is written; `staging`: what is written in its place until it is whole.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        fault = None if of_memory(error) else of_disk(error, target, staging)
        if fault:
            raise fault from error
        raise


def of_peer(error: BaseException) -> UserError | None:
    """What to say (75) where another process of the run was lost; None of anything else."""
    if not isinstance(error, RuntimeError) or of_memory(error):
        return None
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "DistError" not in kinds and not any(word in str(error) for word in PEER):
        return None
    return UserError(
        f"another process ended, see what it says: {first_line(error)}",
        GO_ON,
        LOST,
    )


@contextmanager
def remembering(hint: str) -> Iterator[None]:
    """What fails here for want of memory has another remedy than in training: `hint`."""
    try:
        yield
    except Exception as error:
        if fault := of_memory(error, hint):
            raise fault from error
        raise


def of_machine(
    error: BaseException, target: Path | None = None, staging: Path | None = None
) -> UserError | None:
    """What to say (5) where memory, the disk that `target` lies on or the system is to blame; else
    None.

    An error that says nothing of the system is the disk's where that takes nothing at this moment;
    `staging` is then the folder that was written in. No `target`: nothing was written.
    """
    if isinstance(error, UserError | Stopped):
        return None
    return of_memory(error) or of_disk(error, target, staging)


def of_memory(error: BaseException, hint: str = MEMORY) -> UserError | None:
    """What to say (5) of an allocation that failed, in whatever words; None of anything else."""
    text = str(error)
    short = isinstance(error, MemoryError) or any(word in text for word in NO_MEMORY)
    if not short and code_of(error) != errno.ENOMEM:
        return None
    return UserError(f"out of memory: {first_line(error)}", hint, RESOURCES)


def of_disk(
    error: BaseException, target: Path | None, staging: Path | None = None
) -> UserError | None:
    """What to say (5) of a disk that is full, fails or refuses, and of any other error of the
    system; None of what is none.
    """
    said = code_of(error)
    number = _full_before(error) or said
    if number is None and target:
        number = unwritable(staging or target) or _at_limit(staging or target)
    if number in FULL:
        return _of_full(number, error, target or Path(), staging)
    if isinstance(error, OSError):
        return _of_system(error, target)
    if said:
        return _of_system(OSError(said, first_line(error)), target)
    return _of_system(OSError(number, os.strerror(number), target), target) if number else None


def of_place(*folders: Path) -> UserError | None:
    """What to say (5) where one of some folders takes nothing at this moment; else None.

    For who died without a word.
    """
    for folder in folders:
        if number := unwritable(folder):
            return _of_full(number, None, folder, None)
    return None


def refuse_no_folder() -> None:
    """Raises UserError (5) where the current folder was removed: libraries die of that."""
    try:
        os.getcwd()
    except OSError:
        problem = "the current folder is not there any more"
        raise UserError(problem, "cd to one that is", RESOURCES) from None


def of_limit(hint: str) -> UserError | None:
    """What to say (5) of who died without a word under a limit of memory (`ulimit -v`); else None.

    Libraries that cannot even be loaded say nothing.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    problem = f"a process ended early, and may have no more than {_in_words(limit)} of memory"
    return UserError(f"{problem} (ulimit -v)", hint, RESOURCES)


def a_bug(error: BaseException) -> UserError:
    """What to say (1) of what nobody explains."""
    message = f"a bug: {type(error).__name__}: {error}"
    return UserError(message, "please report it, with the traceback", code=1)


def code_of(error: BaseException) -> int | None:
    """The system's number of an error, also where a library only writes it out."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if match := CODE_IN_WORDS.search(text):
        return int(match[1] or match[2])
    return next((number for words, number in WORDS.items() if words in text), None)


def unwritable(place: Path) -> int | None:
    """The system's number of why nothing can be written at a place; None where it takes a page."""
    try:
        _write_a_page(_existing(place) / f".probe.{os.getpid()}")
    except OSError as error:
        return error.errno
    return None


def _at_limit(folder: Path) -> int | None:
    """The system's number where a file has reached the longest that one may be (`ulimit -f`)."""
    longest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    reached = longest != resource.RLIM_INFINITY and max(_sizes(folder), default=0) >= longest
    return errno.EFBIG if reached else None


def _write_a_page(path: Path) -> None:
    """Write a page to the disk, and leave nothing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        path.unlink()
        left = PAGE
        while left:
            left -= os.write(descriptor, bytes(left))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def kept(target: Path) -> str:
    """What of an artifact is not lost: the name of its newest checkpoint.

    `target`: the artifact, or what lies in it.
    """
    for folder in (target, *list(target.parents)[:2]):
        names = [path.name for path in _listed(folder / "checkpoints")]
        steps = [int(name[5:]) for name in names if re.fullmatch(r"step-\d+", name)]
        if steps:
            return f"step-{max(steps)}"
    return "what is done"


def _of_reading(error: BaseException, path: Path | str) -> UserError | None:
    """What the machine says of a file that it cannot read: a disk that fails, too many files."""
    number = code_of(error)
    if number in HANDLES or number == errno.EIO:
        return _of_system(OSError(number, os.strerror(number), str(path)), None)
    return None


def _full_before(error: BaseException | None) -> int | None:
    """The number by which an error, or one that it came of, says that a disk takes no more."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        number = code_of(error)
        if number in FULL:
            return number
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _of_full(
    number: int, error: BaseException | None, target: Path, staging: Path | None
) -> UserError:
    name = (isinstance(error, OSError) and _file_of(error)) or target
    reason = os.strerror(number)
    if number == errno.EROFS:
        hint = "make it writable, or name another run directory: --run DIR"
    elif number == errno.EFBIG:
        hint = f"raise the limit (ulimit -f); the same command goes on from {kept(target)}"
    else:
        reason += _room(target, staging)
        hint = f"make room and run the same command again: it goes on from {kept(target)}"
    return UserError(f"{name}: cannot be written: {reason}", hint, RESOURCES)


def _file_of(error: OSError) -> str | None:
    """The file that an error names; some name a descriptor."""
    name = error.filename
    return os.fsdecode(name) if isinstance(name, str | bytes | Path) and name else None


def _room(target: Path, staging: Path | None) -> str:
    """What there is, and what is needed, as far as that is known."""
    try:
        disk = os.statvfs(_existing(target))
    except OSError:  # it is gone
        return ""
    free, size = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    words = f"; {_in_words(free)} of {_in_words(size)} are free"
    if disk.f_files and not disk.f_favail:
        words = f"; all {disk.f_files:,} inodes are taken"
    last = target.parent / kept(target)  # of a checkpoint, which is as large as the one before
    needed = max(sum(_sizes(staging)), sum(_sizes(last)))
    return f"{words}, at least {_in_words(needed)} needed" if staging and needed else words


def _of_system(error: OSError, target: Path | None) -> UserError:
    """Of any other error of the system: what, and of which file."""
    reason = error.strerror or first_line(error)
    if error.errno in HANDLES:
        return UserError(reason, "raise the limit of open files: ulimit -n", RESOURCES)
    name = _file_of(error)
    if name is None:
        return UserError(reason, code=RESOURCES)
    if error.errno in REFUSED and target and _lies_in(target.parent, name):
        hint = "make the run directory writable, or name another one: --run DIR"
        return UserError(f"{name}: cannot be written: {reason}", hint, RESOURCES)
    return UserError(f"{name}: {reason}", "see that it is there, and whose it is", RESOURCES)


def _lies_in(folder: Path, name: str) -> bool:
    return Path(os.path.abspath(name)).is_relative_to(os.path.abspath(folder))


def _existing(place: Path) -> Path:
    """The folder that a place lies in, or that of its parents which is there."""
    return next((path for path in (place, *place.parents) if os.path.isdir(path)), Path())


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _sizes(folder: Path | None) -> Iterator[int]:
    """Bytes of each file below a folder."""
    for root, _, names in os.walk(folder) if folder else ():
        for name in names:
            with suppress(OSError):
                yield os.lstat(os.path.join(root, name)).st_size


def _in_words(count: int) -> str:
    if count < 1e6:
        return f"{count / 1e3:,.1f} kB"
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
