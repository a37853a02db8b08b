"""The files of the repository, each with its sum: the model as it was published, the card, and the
records that the card was made of.

    README.md                                    the card
    config.json  model.safetensors  ...          `model/` of the artifact, as it is; of an export
                                                 see `formats`
    llmpipe/NAME/manifest.json, recipe.yaml      of it, and of everything that it was made from
    llmpipe/NAME/results.json                    of every evaluation on the card
    llmpipe/NAME/exports.jsonl                   of an export
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.tables import FileEntry, Table, differences, sha256_file
from llmpipe.files.writing import publishing
from llmpipe.run.artifact import MANIFEST, Artifact
from llmpipe.run.manifest import Manifest

CARD = "README.md"
RECORDS = "llmpipe"
"""The folder of the repository that holds what the card was made of."""

_RECORD = re.compile(rf"{RECORDS}/[^/]+/(manifest\.json|recipe\.yaml|results\.json|exports\.jsonl)")

MODEL = "model/"
RECIPE = "recipe.yaml"
RESULTS = "results.json"


@dataclass(frozen=True)
class RepoFile:
    """A file of the repository."""

    path: str
    source: Path | bytes
    """Where it lies, or what it says."""
    entry: FileEntry

    @classmethod
    def of_text(cls, path: str, text: str) -> RepoFile:
        content = text.encode()
        return cls(path, content, FileEntry(len(content), hashlib.sha256(content).hexdigest()))

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


def model_files(artifact: Artifact, manifest: Manifest) -> list[RepoFile]:
    """What is in `model/`. Raises UserError (3) where an artifact has nothing there."""
    files = [
        RepoFile(name.removeprefix(MODEL), artifact.path / name, entry)
        for name, entry in manifest.files.items()
        if name.startswith(MODEL)
    ]
    if not files:
        problem = f"{artifact.path}: the manifest names no file of {MODEL}"
        raise UserError(problem, "make the artifact again", INTEGRITY)
    return files


def records(
    artifact: Artifact, manifest: Manifest, folder: str, names: Iterable[str]
) -> list[RepoFile]:
    """The manifest of an artifact, and files of it by their names, in a folder of `llmpipe/`."""
    folder = f"{RECORDS}/{folder}"
    path = artifact.path / MANIFEST
    entry = FileEntry(path.stat().st_size, sha256_file(path))
    files = [RepoFile(f"{folder}/{MANIFEST}", path, entry)]
    for name in names:
        published = artifact.published(name) if name in manifest.files else None
        if published:
            files.append(RepoFile(f"{folder}/{name}", published, manifest.files[name]))
    return files


def is_record(path: str) -> bool:
    """Whether a file of a repository is one that a push has put there as a record."""
    return _RECORD.fullmatch(path) is not None


def table_of(files: Iterable[RepoFile]) -> Table:
    return {file.path: file.entry for file in files}


def size_of(files: Iterable[RepoFile]) -> int:
    """In bytes."""
    return sum(file.entry.size for file in files)


def check_target(folder: Path, artifact: Path) -> None:
    """Raises UserError (2) for a folder of a dry run that is there already, or in the artifact."""
    if os.path.lexists(folder) and not _is_empty(folder):
        raise UserError(f"--dry-run: {folder}: is there already", "name a folder that is not")
    if folder.resolve().is_relative_to(artifact.resolve()):
        problem = f"--dry-run: {folder}: is in the artifact, which it would change"
        raise UserError(problem, "name a folder beside it")


def write(files: list[RepoFile], folder: Path) -> None:
    """The repository as a folder. Raises UserError (3) where a file was changed meanwhile, and (5)
    where it cannot be written."""
    with publishing(folder) as staging:
        for file in files:
            target = staging / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file.source, bytes):
                target.write_bytes(file.source)
            else:
                shutil.copyfile(file.source, target)
        if problems := differences(staging, table_of(files)):
            problem = "\n".join(problems)
            raise UserError(problem, "was changed since it was verified", INTEGRITY)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
