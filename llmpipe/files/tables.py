"""What is recorded of a folder's files, sizes and hashes, and how it departs from that."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import digest
from llmpipe.files.paths import files_below, not_plain, paths_below

LEFTOVER = re.compile(r"\.(outcome|plan|prepared|manifest)\.json\.\d+")
"""Name of what a `write_json` leaves that was killed."""

SMALL = 1 << 16
"""Bytes of a file that is hashed where a glance has to do."""

CHUNK = 1 << 23
"""Bytes that are hashed at once: many, since a thread waits for its turn between them."""

Seen = Callable[[int], None]
"""Is told of bytes that were hashed, some at a time."""

ADDED = "not in the manifest"

UNREADABLE = "cannot be read"
"""What is said of a file that is not as it was recorded, but is not damaged either."""


@dataclass(frozen=True)
class FileEntry:
    """What is recorded of a file."""

    size: int
    """In bytes."""
    sha256: str


Table = dict[str, FileEntry]
"""Files by their path relative to a folder."""


def table_of(record: dict[str, Any]) -> Table:
    """A table as JSON holds it."""
    return {name: FileEntry(**entry) for name, entry in record.items()}


def check_names(files: Table, at: str) -> None:
    """Raises ValueError for the name of a file that lies outside of the folder of a table."""
    for name in files:
        if name.startswith("/") or "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise ValueError(f"{at}: {name[:60]!r} is no file of the folder")


_hashed: dict[tuple[int, ...], str] | None = None
"""sha256 of files that were read already, where `hashing_once` is in force."""


@contextlib.contextmanager
def hashing_once() -> Iterator[None]:
    """Meanwhile a file that is come upon again, as the base of several models, is not read again
    unless it was written to.
    """
    global _hashed
    before, _hashed = _hashed, {} if _hashed is None else _hashed
    try:
        yield
    finally:
        _hashed = before


def sha256_file(path: Path, seen: Seen | None = None) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        key = (status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns)
        if _hashed is not None and key in _hashed:
            return _hashed[key]
        chunk = memoryview(bytearray(max(1, min(status.st_size, CHUNK))))
        while count := file.readinto(chunk):
            sha256.update(chunk[:count])
            if seen:
                seen(count)
    if _hashed is not None:
        _hashed[key] = sha256.hexdigest()
    return sha256.hexdigest()


def stamp(path: Path) -> str:
    """What the system says of a file, or of every file below a folder: sizes, and when each was
    written or renamed last. Where it says the same again nothing was changed in between.
    """
    files = paths_below(path) if path.is_dir() else [path]
    states = [(str(file.relative_to(path)), file.lstat()) for file in files]
    return digest([[name, it.st_size, it.st_mtime_ns, it.st_ctime_ns] for name, it in states])


def table(
    folder: Path,
    skip: AbstractSet[str] = frozenset(),
    known: Mapping[str, FileEntry] = MappingProxyType({}),
) -> Table:
    """The files of a folder; top-level names in `skip` are left out.

    Those that are `known` were written and hashed by other processes, and are not read. Raises
    UserError (3) where this process does not see one of them as it was written.
    """
    for name, entry in known.items():
        _refuse_unlike(folder / name, entry)
    entries = {}
    for path in files_below(folder, skip):
        name = path.relative_to(folder).as_posix()
        if name not in skip and name not in known:
            entries[name] = FileEntry(path.stat().st_size, sha256_file(path))
    return dict(sorted((entries | dict(known)).items()))


def _refuse_unlike(path: Path, entry: FileEntry) -> None:
    """Raise UserError (3) where a file has not the size that another process has written."""
    try:
        with path.open("rb") as file:  # opening it, not listing it, asks a server of files anew
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        size = 0
    if size != entry.size:
        problem = f"{path}: {size:,} bytes are seen here, {entry.size:,} were written elsewhere"
        raise UserError(
            problem, "let all processes see one folder; the disk may be full", INTEGRITY
        )


def differences(
    folder: Path,
    expected: Table,
    skip: AbstractSet[str] = frozenset(),
    *,
    seen: Seen | None = None,
    most: int | None = None,
    unread: AbstractSet[str] = frozenset(),
) -> list[str]:
    """How a folder departs from what is recorded: a line per missing, added or changed file.

    A link is a difference, whatever it points to; other top-level names in `skip` are left out. Of
    files of more than `most` bytes only the size is compared, and of those that are `unread`.
    """
    problems = [
        f"{name}: {problem}"
        for name, entry in expected.items()
        if (problem := difference(folder / name, entry, seen, -1 if name in unread else most))
    ]
    for path in paths_below(folder, skip):
        name = path.relative_to(folder).as_posix()
        if name in expected or LEFTOVER.fullmatch(name):
            continue
        if problem := not_plain(path):
            problems.append(f"{name}: {problem}")
        elif name not in skip:
            problems.append(f"{name}: {ADDED}")
    return problems


def difference(
    path: Path, entry: FileEntry, seen: Seen | None = None, most: int | None = None
) -> str | None:
    """How a file departs from what is recorded; one of more than `most` bytes is not read."""
    try:
        if problem := not_plain(path):
            return problem
        size = path.stat().st_size
        if size != entry.size:
            return f"{size:,} bytes, recorded {entry.size:,}"
        if most is not None and size > most:
            return None
        sha256 = sha256_file(path, seen)
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return f"{UNREADABLE}: {error.strerror}"
    if sha256 != entry.sha256:
        return f"sha256 {sha256[:12]}, recorded {entry.sha256[:12]}"
    return None


def in_bytes(count: int) -> str:
    """1,234,567 -> '1.2 MB'."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
