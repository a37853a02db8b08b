"""The run directory: what lies where, when a thing counts as finished, and who may write.

    runs/alpaca/                a run
      sft/                      an artifact: finished when, and only when, manifest.json is there
        recipe.yaml  manifest.json  model/  checkpoints/
        metrics.jsonl  samples.jsonl  rejected.jsonl  log.txt
      .prepared/                tokenized rows, items, models made readable: by content, see `sums`
      .locks/                   who is writing

Publishing a folder: everything is written into a sibling whose name starts with a dot, hashed,
flushed to the disk and renamed. A reader sees the old state or the new one. Verifying is the
reverse: every file has the recorded size and sha256, and there is no other file.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpipe import screen
from llmpipe.errors import INTEGRITY, RESOURCES, UserError
from llmpipe.files.json import read_json, read_written, write_json
from llmpipe.files.paths import expanded, files_below, not_plain
from llmpipe.files.tables import ADDED, UNREADABLE, Seen, difference, differences, table
from llmpipe.files.writing import fsync, remove, settle
from llmpipe.sums import fingerprint

if TYPE_CHECKING:
    from llmpipe.recipe.sections import Recipe
    from llmpipe.run.manifest import Document, Manifest

MANIFEST = "manifest.json"

PLAN = "plan.json"

SCRATCH = {PLAN, "prepared.json", "outcome.json", "log.txt", MANIFEST}
"""In an artifact, but not part of it."""

CHECKPOINT = re.compile(r"step-(0|[1-9][0-9]{0,17})")
"""A published one; anything else that lies beside it is somebody's own."""

ASIDE = re.compile(r"\.old-(\d+)$")


def steps_of(checkpoints: Path) -> list[int]:
    """Steps of the published checkpoints in a folder, oldest first."""
    names = [path.name for path in checkpoints.glob("step-*") if path.is_dir()]
    return sorted(int(match[1]) for name in names if (match := CHECKPOINT.fullmatch(name)))


@dataclass(frozen=True)
class Artifact:
    """One folder of a run, finished or not."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def run(self) -> Path:
        return self.path.parent

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def rows(self) -> Path:
        """What other stages read of an artifact that is a data set."""
        return self.path / "rows.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def steps(self) -> list[int]:
        """Steps of its published checkpoints, oldest first."""
        return steps_of(self.checkpoints)

    @property
    def merged(self) -> Artifact:
        """Where the model lies that an adapter was merged into, if it was."""
        return Artifact(self.run / f"{self.name}-merged")

    @property
    def finished(self) -> bool:
        return os.path.exists(self.path / MANIFEST)  # False also where no path can be so long

    def document(self) -> Document:
        """What manifest.json holds, checked against its own fingerprint.

        Raises UserError (3) when it is damaged.
        """
        path = self.path / MANIFEST
        if problem := not_plain(path):
            raise UserError(f"{path}: {problem}", "copy the file in its place", INTEGRITY)
        document = read_written(path)
        if not isinstance(document, dict) or document.get("fingerprint") != fingerprint(document):
            hint = (
                "restore it from a copy, or make the artifact again: "
                f"llmpipe ... --fresh moves {self.path} aside"
            )
            raise UserError(f"{path}: the manifest was changed or damaged", hint, INTEGRITY)
        return document

    def manifest(self) -> Manifest:
        """The manifest. Raises UserError (3) when it is damaged."""
        from llmpipe.run.manifest import Manifest  # what is not finished has none

        document = self.document()
        try:
            return Manifest.of(document)
        except ValueError as error:
            problem = f"{self.path / MANIFEST}: {error}"
            hint = (
                "another version wrote it; make the artifact again, or take its model/ as a folder"
            )
            raise UserError(problem, hint, INTEGRITY) from None

    def refuse_links(self) -> None:
        """Raises UserError (3) where something that is no file lies in the folder: it would be
        written through, or what is made would not be published in the end.

        Checkpoints are verified when they are used.
        """
        for artifact in (self, self.merged):
            for _ in files_below(artifact.path, {"checkpoints"}):
                pass

    def verify(self, most: int | None = None) -> Manifest:
        """The manifest, after every file was hashed, or every one of at most `most` bytes.

        Raises UserError (3) naming each difference.
        """
        manifest = self.manifest()
        problems = self.differences(manifest, most=most)
        if problems:
            raise _not_as_published([f"{self.path}/{problem}" for problem in problems])
        return manifest

    def differences(
        self, manifest: Manifest, *, seen: Seen | None = None, most: int | None = None
    ) -> list[str]:
        """How the artifact departs from its manifest, see `files.differences`."""
        skip = SCRATCH | {"checkpoints"}
        return differences(self.path, manifest.files, skip, seen=seen, most=most)

    def published(self, name: str) -> Path | None:
        """A file of the finished artifact, after it was hashed; None where it has none of that
        name.

        Raises UserError (3) where it is not as published.
        """
        path = self.path / name
        entry = self.manifest().files.get(name)
        problem = difference(path, entry) if entry else None
        if problem:
            raise _not_as_published([f"{path}: {problem}"])
        return path if entry else None

    @screen.doing("hashing what is published")
    def commit(self, manifest: Manifest) -> Manifest:
        """Hash every file, write the manifest last: from then on the artifact is finished."""
        for leftover in self.path.glob(".*"):
            remove(leftover)
        settle(files_below(self.path, {"checkpoints"}))
        manifest = replace(manifest, files=table(self.path, SCRATCH | {"checkpoints"}))
        manifest = replace(manifest, fingerprint=fingerprint(manifest.document()))
        write_json(self.path / MANIFEST, manifest.document())
        for name in (PLAN, "prepared.json"):
            (self.path / name).unlink(missing_ok=True)
        return manifest

    def move_aside(self) -> Path | None:
        """Rename the folder to NAME.old-1, -2, ...; nothing is deleted."""
        if not self.path.exists():
            return None
        pattern = re.compile(re.escape(self.name) + ASIDE.pattern)
        names = [pattern.fullmatch(path.name) for path in self.run.iterdir()]
        numbers = [int(name[1]) for name in names if name]
        aside = self.path.with_name(f"{self.name}.old-{max(numbers, default=0) + 1}")
        self.path.rename(aside)
        merged = read_json(self.merged.path / MANIFEST)
        if isinstance(merged, dict) and merged.get("merged_from") == self.name:
            self.merged.move_aside()  # what came of it goes along
        tracker = self.run / ".trackers" / self.name
        if tracker.exists():
            tracker.rename(tracker.with_name(aside.name))  # a new start is a new run there, too
        fsync(self.run)
        return aside


def _not_as_published(lines: list[str]) -> UserError:
    hint = "the artifact is not what was published; restore it, or make it again with --fresh"
    if all(line.endswith(ADDED) for line in lines):
        hint = "the artifact is not what was published; remove what was added to it"
    if all(UNREADABLE in line for line in lines):
        hint = "see whose it is, and that you may read it"
    return UserError("\n".join(lines), hint, INTEGRITY)


def artifact_of(recipe: Recipe) -> Artifact:
    """What a recipe makes, in whatever state."""
    return Artifact(expanded(recipe.run) / recipe.artifact)


def mirror_of(run: Path) -> Path:
    """Where a machine that does not see a run keeps what it is sent of it (`llmpipe.mirror`):
    beside it, so that the ways that lead out of the two are the same.
    """
    path = Path(os.path.abspath(run))
    return path.with_name(f".{path.name}.mirror")


def make_run(run: Path) -> Path:
    """The folder of a run's locks, made with the run where it is not there.

    Raises UserError (5) where it cannot be made.
    """
    locks = run / ".locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a NUL is in no path
        raise not_writable(run, error) from None
    return locks


def not_writable(run: Path, error: OSError | ValueError) -> UserError:
    """What to say (5) of a run directory in which nothing can be written."""
    what = "cannot be written" if os.path.isdir(run) else "cannot be made"
    reason = error.strerror if isinstance(error, OSError) else str(error)
    hint = "name another run directory: --run DIR, or `run:` in the recipe"
    return UserError(f"{run}: {what}: {reason}", hint, RESOURCES)


def artifacts(run: Path) -> list[Artifact]:
    """The artifacts of a run, finished or begun, oldest first."""
    if not os.path.isdir(run):
        hint = "give the folder that `run:` of the recipe names"
        raise UserError(f"{run}: no such run directory", hint)
    folders = [
        path
        for path in run.iterdir()
        if (path / "recipe.yaml").exists()
        and not path.name.startswith(".")
        and not ASIDE.search(path.name)
    ]
    folders.sort(key=lambda folder: (folder / "recipe.yaml").stat().st_mtime)
    return [Artifact(folder) for folder in folders]


def is_artifact(folder: Path) -> bool:
    return os.path.isfile(folder / MANIFEST) and os.path.isfile(folder / "recipe.yaml")


def manifest_beside(model: Path) -> Manifest | None:
    """The manifest of the artifact that published a model folder; None for any other folder.

    Raises UserError (3) when it is damaged.
    """
    return Artifact(model.parent).manifest() if is_artifact(model.parent) else None


def template_kwargs(model: Path) -> dict[str, Any]:
    """`data.chat_template_kwargs` of a published model's training; nothing for other folders."""
    manifest = manifest_beside(model)
    return manifest.asked.chat_template_kwargs if manifest else {}


def is_reward_model(folder: Path) -> bool:
    """Whether a folder holds a reward model, or an adapter that makes one.

    Raises UserError (3) for a classifier of several labels.
    """
    adapter = read_json(folder / "adapter_config.json")
    if isinstance(adapter, dict) and adapter:
        return bool(adapter.get("task_type") == "SEQ_CLS")
    config = read_json(folder / "config.json")
    match config:
        case {"architectures": [str(architecture), *_]}:
            classifies = architecture.endswith("ForSequenceClassification")
        case _:
            return False
    labels = config.get("id2label", {0: ""})
    if classifies and not (isinstance(labels, dict) and len(labels) == 1):
        problem = f"{folder}: a classifier of several labels, not a reward model"
        raise UserError(problem, code=INTEGRITY)
    return classifies
