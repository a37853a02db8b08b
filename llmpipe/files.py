"""Files that are whole or not there: hashes, atomic writes, folders published at once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.faults import of_disk

LEFTOVER = re.compile(r"\.(outcome|plan|prepared|manifest)\.json\.\d+")
"""Name of what a `write_json` leaves that was killed."""


def expanded(text: str) -> Path:
    """The path that a person wrote: ~ is a home, where there is one of that name."""
    return Path(os.path.expanduser(text))


def unreachable(path: Path) -> str | None:
    """Why nothing can be read at a path, in words; None where something lies there."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a NUL is in no path
        return "no such file or folder"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file's or a folder's entry to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one, also after a power cut.

    Dataclasses in `value` become objects.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False, default=asdict)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    fsync(path.parent)


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


def read_json(path: Path) -> Any:
    """Parsed JSON, or None when the file is absent or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


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


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below `folder`, sorted.

    Raises UserError (3) at a link, since it could point outside.
    """
    for root, folders, names in os.walk(folder):
        folders.sort()
        linked = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in sorted([*names, *linked]):
            path = Path(root, name)
            if path.is_symlink():
                hint = "copy the file in its place"
                raise UserError(f"{path}: a link inside an artifact", hint, INTEGRITY)
            yield path


def table(folder: Path, skip: AbstractSet[str] = frozenset()) -> Table:
    """The files of a folder; top-level names in `skip` are left out."""
    entries = {}
    for path in files_below(folder):
        name = path.relative_to(folder).as_posix()
        if not _skipped(name, skip):
            entries[name] = FileEntry(path.stat().st_size, sha256_file(path))
    return entries


def modules_in(folder: Path) -> list[str]:
    """The names of a package's modules, sorted, without importing any."""
    names = (name.removesuffix(".py") for name in os.listdir(folder) if name.endswith(".py"))
    return sorted(name for name in names if name != "__init__")


def differences(folder: Path, expected: Table, skip: AbstractSet[str] = frozenset()) -> list[str]:
    """How a folder departs from what is recorded: a line per missing, added or changed file."""
    present = {path.relative_to(folder).as_posix(): path for path in files_below(folder)}
    problems = []
    for name, entry in expected.items():
        path = present.pop(name, None)
        if path is None:
            problems.append(f"{name}: missing")
        elif problem := _difference(path, entry):
            problems.append(f"{name}: {problem}")
    for name in present:
        if not _skipped(name, skip) and not LEFTOVER.fullmatch(name):
            problems.append(f"{name}: not in the manifest")
    return problems


def _skipped(name: str, skip: AbstractSet[str]) -> bool:
    return name.split("/")[0] in skip


def _difference(path: Path, entry: FileEntry) -> str | None:
    size = path.stat().st_size
    if size != entry.size:
        return f"{size} bytes, recorded {entry.size}"
    sha256 = sha256_file(path)
    if sha256 != entry.sha256:
        return f"sha256 {sha256[:12]}, recorded {entry.sha256[:12]}"
    return None


@contextlib.contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """Yield an empty folder; on leaving without an error flush it and rename it to `target`.

    A target that exists is replaced: it is moved aside first, so that no moment shows a mixture.
    Raises UserError (5) when the disk is full; nothing of the target is lost then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.staging")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    try:
        yield staging
        _flush(staging)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if fault := of_disk(error, target):
            raise fault from error
        raise
    _replace(target, staging)
    fsync(target.parent)


def _flush(folder: Path) -> None:
    """Flush everything below a folder to the disk, readable as the user's umask says."""
    umask = os.umask(0)
    os.umask(umask)
    for path in files_below(folder):
        path.chmod(0o666 & ~umask)  # safetensors makes its files private
        fsync(path)
    for root, _, _ in os.walk(folder):
        fsync(Path(root))


def _replace(target: Path, new: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = target.with_name(f".{target.name}.old")
    if old.exists():
        shutil.rmtree(old)
    target.rename(old)
    new.rename(target)
    shutil.rmtree(old)
