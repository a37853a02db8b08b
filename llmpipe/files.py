"""Files that are whole or not there: hashes, atomic writes, folders published at once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Literal

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.faults import reading, writing

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

LARGEST = 64 << 20
"""Bytes of a JSON file that is read."""

DEEPEST = 100
"""Lists and objects in one another that are read; what llmpipe writes has a tenth of it."""

NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""What a system says where no file lies, or a folder, or a link that leads nowhere."""

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a character, as JSON can spell it; no file and no terminal takes one."""


def expanded(text: str) -> Path:
    """The path that a person wrote: ~ is a home, where there is one of that name."""
    return Path(os.path.expanduser(text))


def stamp(path: Path) -> str:
    """What the system says of a file, or of every file below a folder: sizes, and when each was
    written or renamed last. Where it says the same again nothing was changed in between.
    """
    files = paths_below(path) if path.is_dir() else [path]
    states = [(str(file.relative_to(path)), file.lstat()) for file in files]
    return digest([[name, it.st_size, it.st_mtime_ns, it.st_ctime_ns] for name, it in states])


def unreachable(path: Path) -> str | None:
    """Why nothing can be read at a path, in words; None where something lies there."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a NUL is in no path
        return "no such file or folder"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


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


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one, also after a power cut.

    Dataclasses in `value` become objects; half a surrogate pair, as a file of rows may hold,
    becomes a question mark.
    """
    write_whole(path, _as_json(value).encode())


def _as_json(value: Any) -> str:
    text = json.dumps(value, indent=1, ensure_ascii=False, default=asdict) + "\n"
    return text.encode(errors="replace").decode()


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


def in_bytes(count: int) -> str:
    """1,234,567 -> '1.2 MB'."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON; dataclasses in it become objects."""
    separators = (",", ":")
    text = json.dumps(
        value, sort_keys=True, ensure_ascii=False, separators=separators, default=asdict
    )
    return hashlib.sha256(text.encode()).hexdigest()


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """{path: value} of a nested document; the keys of a path stand with spaces between them."""
    if not isinstance(value, dict):
        return {path: value}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        leaves |= flat(inner, f"{path} {key}".strip())
    return leaves


def read_text(path: Path, most: int = LARGEST) -> str:
    """The text of a plain file, as it stands. Raises OSError, or ValueError for what is no file, no
    UTF-8, or larger than `most` bytes.

    A pipe or a device, which may never end, is not read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, encoding="utf-8", newline="") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a plain file")
        if status.st_size > most:
            raise ValueError(f"{status.st_size:,} bytes, of which {most:,} are read at most")
        return file.read()


def parse_json(text: str, *, twice: bool = True) -> Any:
    """What a JSON text says. Raises ValueError, in a line, for what is none, and for what nobody
    could work with: nesting deeper than DEEPEST, numbers without end, halves of characters.

    Unless `twice`, a key that an object has twice is refused: readers differ in which one counts.
    """
    try:
        value = json.loads(text, object_pairs_hook=None if twice else _once)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST}") from None
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):
        raise ValueError(f"nested deeper than {DEEPEST}")
    if SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' stands twice")
    return values


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than DEEPEST."""
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for holder in level:
            inner = holder.values() if isinstance(holder, dict) else holder
            if isinstance(holder, dict | list):
                below += [item for item in inner if isinstance(item, dict | list)]
        if not below:
            return False
        level = below
    return True


def read_json(path: Path) -> Any:
    """Parsed JSON, or None when the file is absent or not whole."""
    _, value = _parsed(path)
    return value


def read_written(path: Path) -> Any:
    """What `write_json` wrote, or None where the file is absent or one byte of it is another."""
    text, value = _parsed(path)
    return value if text == _as_json(value) else None


def _parsed(path: Path) -> tuple[str, Any]:
    """The text of a JSON file, and what it says; nothing, and None, where there is none."""
    try:
        text = read_text(path)
        return text, parse_json(text)
    except ValueError:
        return "", None
    except OSError as error:
        if error.errno in NO_FILE:
            return "", None
        raise


def json_object(line: bytes) -> dict[str, Any] | None:
    """What a line of a .jsonl file says; None where it is no object."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def json_lines(path: Path) -> list[Any]:
    """What the lines of a .jsonl file say. Raises UserError (3) where one says nothing."""
    with reading(path, "lines of JSON", ValueError):
        text = path.read_text(encoding="utf-8").removesuffix("\n")
        return [json.loads(line) for line in text.split("\n")] if text else []


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


def files_below(folder: Path, skip: AbstractSet[str] = frozenset()) -> Iterator[Path]:
    """Every file below `folder`, sorted; top-level folders in `skip` are left out.

    Raises UserError (3) at a link, since it could point outside, and at what is no file.
    """
    for path in paths_below(folder, skip):
        if problem := not_plain(path):
            hint = "copy the file in its place"
            raise UserError(f"{path}: {problem} inside an artifact", hint, INTEGRITY)
        yield path


def paths_below(folder: Path, skip: AbstractSet[str] = frozenset()) -> Iterator[Path]:
    """Everything below `folder` that is no folder, sorted; a link is not followed.

    Top-level folders in `skip` are left out, and links to such.
    """
    for root, folders, names in walk(folder):
        if Path(root) == folder:
            folders[:] = [name for name in folders if name not in skip]
        linked = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in sorted([*names, *linked]):
            yield Path(root, name)


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each folder from `folder` down, in order, with the names of folders and of others in it.

    `os.walk`, which calls itself for every folder in another and dies of a thousand; and as there,
    links are not followed, nor the folders that are taken off the list.
    """
    waiting = [str(folder)]
    while waiting:
        root = waiting.pop()
        try:
            with os.scandir(root) as listed:
                entries = list(listed)
        except OSError:
            continue
        folders = [entry.name for entry in entries if _is_folder(entry)]
        yield root, folders, [entry.name for entry in entries if not _is_folder(entry)]
        paths = [os.path.join(root, name) for name in sorted(folders, reverse=True)]
        waiting += [path for path in paths if not os.path.islink(path)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is one, or a link to one; a link in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def not_plain(path: Path) -> str | None:
    """What lies at a path instead of a file or a folder; None where it is one of these, or nothing
    lies there."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return "a link" if stat.S_ISLNK(mode) else "no file, but a pipe or a device"


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


def modules_in(folder: Path) -> list[str]:
    """The names of a package's modules, sorted, without importing any."""
    names = (name.removesuffix(".py") for name in os.listdir(folder) if name.endswith(".py"))
    return sorted(name for name in names if name != "__init__")


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
