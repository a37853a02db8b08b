"""`llmpipe verify`: every file of a run, hashed and held against what was recorded of it.

What has a table of its own is an artifact (manifest.json), a checkpoint (sums.json) and a folder of
prepared or converted data; artifacts that were moved aside are verified like others. A manifest
that somebody wrote anew, its fingerprint with it, agrees with itself; but who was made from the
artifact has noted its old fingerprint, so the parents that a manifest names are compared as well.

Nothing is locked and nothing is written: a run on storage for reading alone can be verified, and
one that is at work.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llmpipe import sums
from llmpipe.data.prepared import OF_ARTIFACT, RECORD
from llmpipe.errors import INTEGRITY, Say, UserError
from llmpipe.files.json import digest, json_object, read_json, read_written
from llmpipe.files.paths import not_plain, paths_below
from llmpipe.files.tables import Seen, Table, in_bytes, sha256_file
from llmpipe.recipe.names import ARTIFACT
from llmpipe.run import checkpoints
from llmpipe.run.artifact import ASIDE, MANIFEST, PLAN, Artifact
from llmpipe.run.identity import short
from llmpipe.run.manifest import Manifest
from llmpipe.run.plan import RECIPE, Plan
from llmpipe.sums import SUMS, Kept

PATIENCE = 2.0
"""Seconds after which it is said how far it is."""

PARTS = (MANIFEST, RECIPE, PLAN, "model", "checkpoints")
"""By any of these a folder is an artifact, whatever it has lost."""

WRITTEN = ("model", "checkpoints", "results.json", "samples.jsonl")
"""What a stage leaves once its plan is written down: by these it was finished that has none."""

LINES = ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl", "rejected.jsonl")
"""What an unfinished artifact writes line by line, and goes on from."""

UNRECORDED = re.compile(r"\.prepared|\.locks|\.trackers|\.?report(-vs-.*)?\.html(\.\d+)?")
"""What lies in a run and is in no table."""


@dataclass(frozen=True)
class Item:
    """What has a table of its own, or should have one."""

    path: Path
    what: str
    """In words: `model by sft`."""
    files: Table = field(default_factory=dict)
    """What is recorded of it."""
    compare: partial[list[str]] | None = None
    """Takes `seen`; how it departs from what is recorded, as `files.differences` says it."""
    problems: tuple[str, ...] = ()
    """What is known to be wrong with it before anything is hashed."""
    suspicion: str | None = None
    """What is wrong as well, if anything is."""

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(entry.size for entry in self.files.values())

    @property
    def count(self) -> str:
        """How much is recorded, in words."""
        if not self.files:
            return "no table"
        return f"{len(self.files):,} file{'s' * (len(self.files) > 1)}, {in_bytes(self.size)}"

    def check(self, seen: Seen) -> list[str]:
        problems = [*self.problems, *(self.compare(seen=seen) if self.compare else ())]
        if problems and not os.path.lexists(self.path):
            return []  # an old checkpoint of a run that is at work
        return [self.suspicion, *problems] if problems and self.suspicion else problems


def verify_run(path: Path, say: Say, note: Say) -> None:
    """Verify a run, or one artifact of it.

    A line for each thing that has a table is said, and a line for each difference, as `path: what`.
    It is noted how far it is. Raises UserError (2) where there is no run, and (3) where anything
    differs.
    """
    whole, made = _artifacts_at(path)
    items = [item for artifact in made for item in _items(artifact)]
    if whole:
        items += _kept(path / ".prepared", made)
    progress = _Progress(sum(item.size for item in items), note)
    different = 0
    for item in items:
        problems = item.check(progress.seen)
        say(f"{item.path}  {item.what}: {item.count}{': DIFFERS' * bool(problems)}")
        for problem in problems:
            say(f"{item.path}/{problem}")
        different += len(problems)
    for name in _strays(path if whole else None, made):
        say(f"{name}: in no table, so not verified")
    total = sum(len(item.files) for item in items)
    verified = f"{total:,} files, {in_bytes(progress.total)}"
    if different:
        problem = f"{path}: {different:,} difference{'s' * (different > 1)} in {verified}"
        hint = "what is named above is not what was recorded: restore it, or make it anew"
        raise UserError(problem, hint, INTEGRITY)
    say(f"{path}: {verified}: all as recorded")


class _Progress:
    """Says how much is hashed, every few seconds."""

    def __init__(self, total: int, note: Say):
        self.total = total
        self.note = note
        self.done = 0
        self.told = time.monotonic()

    def seen(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.told >= PATIENCE:
            self.told = now
            self.note(f"hashed {in_bytes(self.done)} of {in_bytes(self.total)}")


def _artifacts_at(path: Path) -> tuple[bool, list[Artifact]]:
    """Whether a path is a whole run, and the artifacts there. Raises UserError (2)."""
    hint = "give the folder that `run:` of a recipe names, or an artifact in it"
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such run directory", hint)
    if path.name in ("", ".."):  # whose neighbours are to be named
        path = Path(os.path.abspath(path))
    folders = [Path(path, name) for name in sorted(os.listdir(path)) if not name.startswith(".")]
    made = [Artifact(folder) for folder in folders if _is_artifact(folder)]
    if made and not os.path.lexists(path / MANIFEST):
        return True, made
    if not _is_artifact(path):
        raise UserError(f"{path}: holds no artifacts", hint)
    return False, [Artifact(path)]


def _is_artifact(folder: Path) -> bool:
    """Whether a folder is an artifact, or may be one that cannot be looked into."""
    if not folder.is_dir():
        return False
    return not _is_open(folder) or any(os.path.lexists(folder / part) for part in PARTS)


def _is_open(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK)


def _items(artifact: Artifact) -> Iterator[Item]:
    """An artifact, and its checkpoints."""
    identity = None
    if not _is_open(artifact.path):
        problem = f"{MANIFEST}: cannot be read: {os.strerror(errno.EACCES)}"
        yield Item(artifact.path, "not to be looked into", problems=(problem,))
        return
    if artifact.finished:
        yield (item := _finished(artifact))
        manifest = _manifest(artifact) if item.compare else None
        identity = manifest.identity if manifest else None
    else:
        yield _unfinished(artifact)
        plan = _plan(artifact)
        identity = plan.identity if plan else None
    for step in artifact.steps:
        yield _checkpoint(checkpoints.folder(artifact.checkpoints, step), identity)


def _finished(artifact: Artifact) -> Item:
    try:
        manifest = artifact.manifest()
    except (UserError, OSError) as error:
        problem = _problem(error, artifact, MANIFEST)
        return Item(artifact.path, "finished", problems=(problem,))
    elsewhere = ASIDE.sub("", artifact.name) != manifest.name  # renamed, or another one's manifest
    called = f", which calls itself {manifest.name}" if elsewhere else ""
    return Item(
        artifact.path,
        f"{manifest.kind} by {manifest.stage}{called}",
        manifest.files,
        partial(artifact.differences, manifest),
        tuple(_of_parents(artifact, manifest)),
        f"{MANIFEST}: is that of {manifest.name}" if elsewhere else None,
    )


def _problem(error: UserError | OSError, artifact: Artifact, name: str) -> str:
    """What is wrong with a file of an artifact that cannot be read."""
    if isinstance(error, OSError):
        return f"{name}: cannot be read: {error.strerror}"
    return error.message.removeprefix(f"{artifact.path}/")


def _manifest(artifact: Artifact) -> Manifest | None:
    """The manifest of an artifact, where it has one that is whole."""
    try:
        return artifact.manifest() if artifact.finished else None
    except (UserError, OSError):
        return None


# --- what was made from what ----------------------------------------------------------------------


def _of_parents(artifact: Artifact, manifest: Manifest) -> Iterator[str]:
    """Which of the artifacts of its run that it was made from are others now."""
    for model in manifest.models.values():
        reference = str(model.get("reference"))
        if not reference.startswith(ARTIFACT):
            continue
        name, _, step = reference.removeprefix(ARTIFACT).partition("@")
        parent = Artifact(artifact.run / name)
        recorded = model.get("fingerprint")
        now = _of_checkpoint(parent, step) if step else _of_artifact(parent, recorded)
        if now and now != recorded:
            noted = f"was made from {reference} {str(recorded)[:12]}"
            yield (
                f"{MANIFEST}: {noted}, which is {short(now)} now: "
                "made anew, or its manifest was written by somebody else"
            )


def _of_artifact(parent: Artifact, recorded: object) -> str | None:
    """The fingerprint of a parent, or the `recorded` one where it was moved aside; None where it is
    not in the run any more."""
    if not parent.path.exists():
        return None
    manifest = _manifest(parent)
    if manifest and manifest.fingerprint == recorded:
        return manifest.fingerprint
    for folder in parent.run.glob(f"{parent.name}.old-*"):
        aside = _manifest(Artifact(folder)) if ASIDE.search(folder.name) else None
        if aside and aside.fingerprint == recorded:
            return aside.fingerprint
    return manifest.fingerprint if manifest else "without a manifest"


def _of_checkpoint(parent: Artifact, step: str) -> str | None:
    """The fingerprint of a checkpoint; None where it is not kept any more, or damaged."""
    known = checkpoints.Sums.read(parent.checkpoints / f"step-{step}")
    return digest(known.files) if known else None


# --- what is not finished -------------------------------------------------------------------------


def _unfinished(artifact: Artifact) -> Item:
    """What an unfinished artifact goes on from has no table; what can be read of it is."""
    problems = [
        f"{path.relative_to(artifact.path).as_posix()}: {problem}"
        for path in paths_below(artifact.path, {"checkpoints"})
        if (problem := not_plain(path))
    ]
    try:
        plan = Plan.read(artifact.path)
    except (UserError, OSError) as error:
        problem = _problem(error, artifact, PLAN)
        problems += [problem] if problem not in problems else []  # a link is known already
    else:
        problems += _of_plan(artifact, plan)
    for name in LINES:
        problems += _of_lines(artifact.path / name)
    for step in artifact.steps[-1:]:
        problems += checkpoints.verify_lines(checkpoints.folder(artifact.checkpoints, step))
    return Item(artifact.path, "not finished", problems=tuple(problems))


def _of_plan(artifact: Artifact, plan: Plan | None) -> Iterator[str]:
    if plan is None:
        if _is_made(artifact):
            yield f"{MANIFEST}: missing"
        return
    recipe = artifact.path / RECIPE
    fits = recipe.is_file() and sha256_file(recipe) == plan.recipe_file
    record = read_written(artifact.path / RECORD)
    yield from _of_record(artifact, record)
    if plan.recipe_file and read_written(artifact.path / PLAN) is None:
        yield f"{PLAN}: is not as it was written"
    if plan.recipe_file and not fits:
        yield f"{RECIPE}: is not what {PLAN} was written with"
    called = {PLAN: plan.artifact} if plan.artifact else {}  # older ones do not know it
    if isinstance(record, dict) and ("artifact" in record or "data" not in record):
        called[RECORD] = str(record.get("artifact", ""))
    renamed = fits and len(set(called.values())) == 1 and "" not in called.values()
    for file, name in called.items():
        if name != ASIDE.sub("", artifact.name) and not renamed:
            yield f"{file}: is that of {name or 'a folder in .prepared'}"


def _of_record(artifact: Artifact, record: object) -> Iterator[str]:
    """Whether prepared.json is that of the folder that it names, as far as this is still kept."""
    if not os.path.lexists(artifact.path / RECORD):
        return
    if not isinstance(record, dict):
        yield f"{RECORD}: damaged"
        return
    folder = artifact.run / ".prepared" / str(record.get("data"))
    kept = read_json(folder / RECORD) if sums.is_sealed(folder) else None
    if isinstance(kept, dict) and _of_rows(record) != _of_rows(kept):
        yield f"{RECORD}: is not what {folder / RECORD} says"


def _of_rows(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says less where its rows lie, which the artifact's alone does."""
    elsewhere = (*OF_ARTIFACT, "mixture")
    return {at: value for at, value in record.items() if at not in elsewhere}


def _is_made(artifact: Artifact) -> bool:
    """Whether an artifact without a plan was finished once, and is not a model that is merged."""
    if os.path.lexists(artifact.path / RECIPE):
        return any(os.path.lexists(artifact.path / part) for part in WRITTEN)
    base = Artifact(artifact.run / artifact.name.removesuffix("-merged"))
    return base == artifact or base.finished


def _plan(artifact: Artifact) -> Plan | None:
    """The plan of an artifact, where it has one that is whole."""
    try:
        return Plan.read(artifact.path)
    except (UserError, OSError):
        return None


def _of_lines(path: Path) -> Iterator[str]:
    """The first whole line of a file that is no object; the last one may be half written."""
    if not path.is_file() or path.is_symlink():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n") and json_object(line) is None:
                yield f"{path.name}: line {number:,} cannot be read"
                return


def _kept(cache: Path, made: list[Artifact]) -> Iterator[Item]:
    """What `.prepared` holds with a table, which must be the one that an artifact goes on with."""
    named = {}
    for artifact in filter(lambda artifact: _is_open(artifact.path), made):
        record = read_json(artifact.path / RECORD)
        for part in (record, record.get("mixture") if isinstance(record, dict) else None):
            if isinstance(part, dict) and part.get("sums"):
                named[part.get("data")] = part["sums"]
    for folder in sorted(cache.glob("[!.]*")):
        if folder.is_dir() and sums.is_sealed(folder):
            table = sums.Sums.read(folder)
            kept = Kept(folder, named.get(folder.name))
            files = table.files if table else {}
            yield Item(folder, "kept to be read again", files, partial(sums.verify, kept))


def _checkpoint(path: Path, identity: str | None) -> Item:
    """A checkpoint, which is of its artifact's `identity` where that is known."""
    known = checkpoints.Sums.read(path)
    problems = []
    if known and identity and known.origin.identity.partition(":")[0] != identity:
        problems.append(f"{SUMS}: is of another recipe than the artifact")
    files = known.files if known else {}
    compare = partial(checkpoints.verify, path)
    return Item(path, "checkpoint", files, compare, tuple(problems))


# --- what is in no table --------------------------------------------------------------------------


def _strays(run: Path | None, made: list[Artifact]) -> Iterator[Path]:
    """What llmpipe did not write, left when it was killed, or wrote when it had no tables."""
    known = {artifact.name for artifact in made}
    if run:
        for name in sorted(os.listdir(run)):
            if name not in known and not UNRECORDED.fullmatch(name):
                yield run / name
        for path in sorted((run / ".prepared").glob("*")):
            if not sums.is_sealed(path) and path.name != ".locks":
                yield path
    for artifact in made:
        if not _is_open(artifact.path):
            continue
        home = artifact.checkpoints
        names = sorted(os.listdir(home)) if home.is_dir() else []
        steps = {f"step-{step}" for step in artifact.steps}
        yield from (home / name for name in names if name not in steps)
