"""Files and folders that are whole or not there: written in place of what was there, published at
once, and on the disk before they have their names.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.faults import writing
from llmpipe.files.paths import files_below, not_plain, walk


def to_write(path: Path, mode: Literal["w", "a", "wb", "ab"], errors: str = "strict") -> IO[Any]:
    """A file of a run, opened to be written; text is UTF-8.

    Raises UserError (3) where something else lies there: through a link, or a second name of
    another file, that one would be written.
    """
    if "b" in mode:
        return open(path, mode, opener=descriptor_of)
    return open(path, mode, opener=descriptor_of, encoding="utf-8", errors=errors)


def descriptor_of(path: str | Path, flags: int) -> int:
    """A file opened as `flags` say, and made where there is none; see `to_write`."""
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        # a pipe that nobody reads is not waited for
        descriptor = os.open(path, flags & ~os.O_TRUNC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _not_ours(path, not_plain(Path(path)) or "a folder") from None
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        another = "a second name of another file (a hard link)"
        raise _not_ours(path, not_plain(Path(path)) or another)
    if flags & os.O_TRUNC:
        os.ftruncate(descriptor, 0)
    return descriptor


def _not_ours(path: str | Path, what: str) -> UserError:
    hint = "remove it, or copy the file in its place"
    return UserError(f"{path}: {what}, through which nothing is written", hint, INTEGRITY)


def cut_back(path: Path, size: int) -> None:
    """Leave of a file its first `size` bytes; one that is not there is begun.

    Raises UserError (3) where it has fewer.
    """
    with to_write(path, "ab") as file:
        bytes_there = os.fstat(file.fileno()).st_size
        if bytes_there < size:
            problem = f"{path}: {bytes_there:,} bytes, and the checkpoint was written with {size:,}"
            raise UserError(problem, "restore it from a copy; --fresh starts anew", INTEGRITY)
        file.truncate(size)


def fsync(path: Path) -> None:
    """Flush a file's or a folder's entry to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old one or the new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # of a process that was killed, or planted there
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextlib.contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """Yield an empty folder; on leaving without an error flush it and rename it to `target`.

    A target that exists is replaced: it is moved aside first, so that no moment shows a mixture.
    Raises UserError (5) when the disk is full; nothing of the target is lost then.
    """
    staging = staging_of(target)
    try:
        with writing(target, staging):
            target.parent.mkdir(parents=True, exist_ok=True)
            remove(staging)
            staging.mkdir()
            yield staging
            _flush(staging)
            _replace(target, staging)
            fsync(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def staging_of(target: Path) -> Path:
    """Where what is published as `target` lies until it is whole."""
    return target.with_name(f".{target.name}.staging")


def _flush(folder: Path) -> None:
    """Settle everything below a folder, and the folders themselves."""
    settle(files_below(folder))
    for root, _, _ in walk(folder):
        fsync(Path(root))


def settle(paths: Iterable[Path]) -> None:
    """Flush files to the disk, to be read by whom the user's umask lets: safetensors makes private
    ones, and what one person publishes another one goes on from.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        with contextlib.suppress(PermissionError):  # of a file that another person began
            path.chmod(0o666 & ~umask)
        fsync(path)


def _replace(target: Path, new: Path) -> None:
    if not os.path.lexists(target):
        new.rename(target)
        return
    old = target.with_name(f".{target.name}.old")
    remove(old)
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    remove(old)


def remove(path: Path) -> None:
    """Remove what lies at a path, if anything: a folder with all in it, however deep; of a link,
    the link.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    for root, folders, names in reversed(list(walk(path))):
        inside = [os.path.join(root, name) for name in [*folders, *names]]
        for link_or_file in filter(os.path.lexists, inside):  # folders are gone by now
            os.unlink(link_or_file)
        os.rmdir(root)
