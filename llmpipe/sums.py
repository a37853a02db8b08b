"""sums.json: what the files of a folder held when it was made, so that what is used is what was
made.

A run keeps folders that it reads again: tokens, items, models that were converted or merged, a
tokenizer, log-probabilities. Each lies in `.prepared` under a name that stands for its content, and
has a table of its files that is written last:

    {"folder": its name, "files": {name: {"size", "sha256"}}, "fingerprint": sha256 of the rest}

The name keeps another folder from taking its place; the record of an artifact that uses it names
the fingerprint, which keeps another table from doing so. A folder is made once, glanced at when a
command comes upon it (every size, and what is small), and verified when it is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import Any

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import digest, read_written, write_json
from llmpipe.files.paths import not_plain
from llmpipe.files.tables import FileEntry, Seen, Table, check_names, differences, table
from llmpipe.typed import record

SUMS = "sums.json"
"""The file table of a checkpoint, and of a folder that a run keeps."""


@dataclass(frozen=True)
class Kept:
    """A folder that was made earlier and is to be used."""

    folder: Path
    fingerprint: str | None = None
    """Of its table, where something names it."""
    in_cache: bool = False
    """Whether it is no run's own: where it is not as it was made it loses its table, so that who
    comes next makes it again."""


@dataclass(frozen=True)
class Sums:
    """What sums.json holds."""

    folder: str
    files: Table
    fingerprint: str

    @classmethod
    def read(cls, folder: Path) -> Sums | None:
        """The table of a folder, or None where it is absent, not whole or changed."""
        document = read_written(folder / SUMS)
        if not isinstance(document, dict) or document.get("fingerprint") != fingerprint(document):
            return None
        try:
            sums = record(cls, document)
            check_names(sums.files, "files")
        except ValueError:
            return None  # a stranger's, with a fingerprint of its own
        return sums


def fingerprint(document: dict[str, Any]) -> str:
    """sha256 over everything in a document but the fingerprint itself."""
    return digest({key: value for key, value in document.items() if key != "fingerprint"})


def seal(folder: Path, name: str | None = None) -> str:
    """Write the table of a folder that is whole; its fingerprint.

    `name`: what the folder will be called, where it is still called otherwise.
    """
    files = {path: asdict(entry) for path, entry in table(folder, {SUMS}).items()}
    document: dict[str, Any] = {"folder": name or folder.name, "files": files}
    document["fingerprint"] = fingerprint(document)
    write_json(folder / SUMS, document)
    return str(document["fingerprint"])


def is_sealed(folder: Path) -> bool:
    """Whether a folder has a table, in whatever state; what an older llmpipe made has none."""
    return os.path.lexists(folder / SUMS)


def verify(kept: Kept | Path, *, seen: Seen | None = None, most: int | None = None) -> list[str]:
    """What is wrong with a folder that a run keeps: a line for each file, nothing when it is whole.

    `seen` and `most` as `files.differences` has them.
    """
    kept = kept if isinstance(kept, Kept) else Kept(kept)
    folder = kept.folder
    if folder.is_symlink() or not folder.is_dir():
        return [f"{SUMS}: missing: {folder.name} is no folder"]
    if not is_sealed(folder):
        return [f"{SUMS}: missing"]
    if problem := not_plain(folder / SUMS):
        return [f"{SUMS}: {problem}"]
    sums = Sums.read(folder)
    if sums is None:
        return [f"{SUMS}: damaged"]
    if sums.folder != folder.name:
        return [f"{SUMS}: is the table of {sums.folder}"]
    if kept.fingerprint not in (None, sums.fingerprint):
        return [f"{SUMS}: is not the table that was verified"]
    return differences(folder, sums.files, {SUMS}, seen=seen, most=most)


def check(kept: Kept, *, most: int | None = None) -> None:
    """Raises UserError (3) naming each file of a folder that is not as it was made."""
    if problems := verify(kept, most=most):
        raise _not_as_made(kept.folder, problems, kept.in_cache and _is_unsealed(kept.folder))


def _is_unsealed(folder: Path) -> bool:
    """Take the table of a folder from it; whether that went."""
    with suppress(OSError):
        (folder / SUMS).unlink(missing_ok=True)
    return not is_sealed(folder)


def _not_as_made(folder: Path, problems: list[str], is_unsealed: bool = False) -> UserError:
    first = "" if is_unsealed else f"remove {folder} and "
    hint = f"{first}run the same command again: it is made anew"
    return UserError("\n".join(f"{folder}/{problem}" for problem in problems), hint, INTEGRITY)


def glance(folder: Path, most: int) -> str:
    """Look at the names and sizes in a folder, and into files of at most `most` bytes; its
    fingerprint.

    Raises UserError (3) as `check` does.
    """
    check(Kept(folder), most=most)
    sums = Sums.read(folder)
    assert sums is not None  # it was checked just now
    return sums.fingerprint


def content(folder: Path, name: str) -> bytes:
    """What a file of a folder holds, once it is seen to be what its table says.

    Raises UserError (3) where it is not.
    """
    path, sums = folder / name, Sums.read(folder)
    entry = sums.files.get(name) if sums else None
    with suppress(OSError):
        data = b"" if not_plain(path) else path.read_bytes()
        if entry == FileEntry(len(data), sha256(data).hexdigest()):
            return data
    raise _not_as_made(folder, [f"{name}: is not what was made"])


class Verification(Thread):
    """Folders that are verified beside other work, as the import of large libraries."""

    def __init__(self, folders: Iterable[Kept]):
        super().__init__(daemon=True)
        self._folders = list(dict.fromkeys(folders))
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            for kept in self._folders:
                check(kept)
        except Exception as error:
            self._error = error

    def finish(self) -> None:
        """Wait for the end. Raises UserError (3) as `check` does."""
        self.join()
        if self._error:
            raise self._error
