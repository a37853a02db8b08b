"""What lies at a path, and below it, whatever it is: links and pipes are told of, not followed."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path

from llmpipe.errors import INTEGRITY, UserError

NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""What a system says where no file lies, or a folder, or a link that leads nowhere."""


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


def files_below(folder: Path, skip: AbstractSet[str] = frozenset()) -> Iterator[Path]:
    """Every file below `folder`, sorted; top-level folders in `skip` are left out.

    Raises UserError (3) at a link, since it could point outside, and at what is no file.
    """
    for path in paths_below(folder, skip):
        if problem := not_plain(path):
            hint = "copy the file in its place"
            raise UserError(f"{path}: {problem} inside an artifact", hint, INTEGRITY)
        yield path


def modules_in(folder: Path) -> list[str]:
    """The names of a package's modules, sorted, without importing any."""
    names = (name.removesuffix(".py") for name in os.listdir(folder) if name.endswith(".py"))
    return sorted(name for name in names if name != "__init__")
