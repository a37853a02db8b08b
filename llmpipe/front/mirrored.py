"""One run directory, or one on each machine: found out, and what the others have to be sent.

Rank 0 writes a word into the run, and all look whether they see it. A machine that does not has a
run directory of its own, and mirrors rank 0's (`llmpipe.mirror`): the plan, the rows as tokens, the
artifacts of the run that the recipe names, and the tables of the checkpoints. What lies outside of
the run is nobody's to send: a model in a folder has to be there, and is held against rank 0's.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmpipe.data.prepared import RECORD, PreparedFolder
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import digest
from llmpipe.files.tables import table
from llmpipe.files.writing import write_whole
from llmpipe.front.verified import converted
from llmpipe.recipe.sections import Recipe
from llmpipe.run import checkpoints
from llmpipe.run.artifact import PLAN, Artifact, mirror_of
from llmpipe.run.machine import file_system, machine_rank, rank
from llmpipe.run.plan import RECIPE, Plan
from llmpipe.run.reference import Model
from llmpipe.stages import prepared_by, stage
from llmpipe.sums import SUMS

if TYPE_CHECKING:
    from llmpipe.mirror import Copy

PAUSE = 0.2
"""Seconds between two looks at a file."""
SIGHT = 60.0
"""Seconds in which a file of another machine has to be seen."""
AT_ONCE = 1.0
"""The same where the folder is on a disk of this machine: it is seen at once, or never."""

OF_ONE_MACHINE = ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "tmpfs", "overlay")
"""File systems that no two machines have at once."""


# --- who sees what rank 0 writes ------------------------------------------------------------------


class Sight(NamedTuple):
    """What a process saw."""

    sees: bool
    machine: str
    """On which machine it is, as its launcher counts them."""

    def told(self) -> str:
        return json.dumps(self)

    @classmethod
    def of(cls, told: str) -> Sight:
        return cls(*json.loads(told))


def look(artifact: Artifact, word: str, sleep: Callable[[float], None] = time.sleep) -> Sight:
    """Whether this process sees the word that rank 0 has written."""
    ours, theirs = look_path(artifact, rank()), look_path(artifact, 0)
    local = file_system(artifact.run) in OF_ONE_MACHINE
    try:
        for _ in range(round((AT_ONCE if local else SIGHT) / PAUSE)):
            with suppress(OSError):
                # NFS looks anew into a folder that this machine itself has changed
                write_whole(ours, word.encode())
            with suppress(OSError):
                if theirs.read_bytes() == word.encode():
                    return Sight(True, machine_rank())
            sleep(PAUSE)
        return Sight(False, machine_rank())
    finally:
        with suppress(OSError):
            ours.unlink()


def look_path(artifact: Artifact, rank: int) -> Path:
    return artifact.run / ".locks" / f"{artifact.name}.{rank}.look"


def keepers(sights: Sequence[Sight]) -> dict[int, str]:
    """{rank: machine}: who keeps a mirror, the first on each machine that does not see rank 0's
    run. `sights`: of the ranks from 1 on.
    """
    first: dict[str, int] = {}
    for other, sight in enumerate(sights, 1):
        if not sight.sees:
            first.setdefault(sight.machine, other)
    return {other: machine for machine, other in first.items()}


# --- what a mirror holds --------------------------------------------------------------------------


def copies_for(artifact: Artifact, recipe: Recipe) -> list[Copy]:
    """What the processes of other machines read of a run while an artifact is made; the plan, by
    which they begin, last.
    """
    from llmpipe.mirror import copy_of

    plan = Plan.read(artifact.path)
    assert plan is not None  # it was written just now
    prepared: PreparedFolder = prepared_by(stage(recipe.stage)).of_artifact(artifact.path)
    home = artifact.run / ".prepared"
    kept = [*prepared.kept(home), *converted(plan, home)]
    folders = [*_parents(plan, artifact.run), *(each.folder for each in kept)]
    inside = [folder for folder in dict.fromkeys(folders) if _is_in(folder, artifact.run)]
    copies = [copy_of(folder, artifact.run) for folder in inside]
    return [*copies, _tables(artifact), _beginning(artifact)]


def _parents(plan: Plan, run: Path) -> Iterator[Path]:
    """The artifacts of the run that a plan names, or their checkpoints."""
    for start in (*plan.models.values(), *plan.datasets.values()):
        for model in start.chain:
            if model.kind in ("artifact", "merged") and model.folder:
                is_checkpoint = model.folder.parent.name == "checkpoints"
                yield model.folder if is_checkpoint else model.folder.parent


def _is_in(folder: Path, run: Path) -> bool:
    return Path(os.path.abspath(folder)).is_relative_to(os.path.abspath(run))


def _tables(artifact: Artifact) -> Copy:
    """Of each checkpoint that there is, and of no other, its table: all processes choose by them.
    What they read of the one that they go on from comes when it is chosen.
    """
    from llmpipe.mirror import Copy, entry_of

    home = artifact.checkpoints
    steps = [checkpoints.folder(home, step) for step in artifact.steps]
    tables = [path / SUMS for path in steps if (path / SUMS).is_file()]
    files = {path.relative_to(home).as_posix(): entry_of(path) for path in tables}
    return Copy(f"{artifact.name}/checkpoints", files, [path.name for path in steps])


def _beginning(artifact: Artifact) -> Copy:
    """What `open_job` reads, and nothing else of what is being made."""
    from llmpipe.mirror import Copy, entry_of

    files = {name: entry_of(artifact.path / name) for name in (RECIPE, RECORD, PLAN)}
    return Copy(artifact.name, files, ["checkpoints"])


# --- whose run is as far as it was ----------------------------------------------------------------


def progress_of(artifact: Artifact) -> str:
    """How far rank 0's run is, as it tells others before it sends anything."""
    plan = Plan.read(artifact.path)
    assert plan is not None  # it was written just now
    return json.dumps([plan.identity, max(artifact.steps, default=0)])


def refuse_behind(told: str, artifact: Artifact) -> None:
    """Raise UserError (3) where rank 0's run is not as far as this machine knows that it was, by a
    mirror or by a run of its own: another machine was the first one then, and has what was made.
    """
    identity, step = json.loads(told)
    for known in (artifact, Artifact(mirror_of(artifact.run) / artifact.name)):
        reached, words = _reached(known, identity)
        if reached > step:
            there = f"has step {step}" if step else "has none"
            raise UserError(
                f"{known.path}: {words} is known of here, and rank 0's run {there}: another "
                "machine was the first one then",
                "let it be the first one again, or copy its run there; --fresh begins anew",
                INTEGRITY,
            )


def _reached(known: Artifact, identity: str) -> tuple[float, str]:
    """How far an artifact came, and what tells of it; 0 where it is another one."""
    with suppress(UserError):  # damaged: nobody goes on from it
        if known.finished and known.manifest().identity == identity:
            return math.inf, "a finished artifact"
        plan = None if known.finished else Plan.read(known.path)
        if plan and plan.identity == identity:
            step = max(known.steps, default=0)
            return step, f"a checkpoint of step {step}"
    return 0, ""


# --- what has to lie on every machine -------------------------------------------------------------


def refuse_other_models(artifact: Artifact) -> None:
    """Raise UserError where a model that lies outside of the run is not on this machine (2), or is
    another one than rank 0's (3).
    """
    plan = Plan.read(artifact.path)
    for start in plan.models.values() if plan else ():
        for model in start.chain:
            if model.folder and not _is_in(model.folder, artifact.run):
                _refuse_another(model, model.folder)


def _refuse_another(model: Model, folder: Path) -> None:
    if model.kind not in ("folder", "artifact"):  # others were made for this run, and sent
        return
    hint = f"copy {model.reference} from the machine of rank 0, or name a model of the Hub"
    if not folder.is_dir():
        problem = f"{model.reference}: is not on machine {machine_rank()}, and lies outside the run"
        raise UserError(problem, hint)
    if _identity_of(model, folder) not in model.identity.items():
        problem = f"{model.reference}: is another one on machine {machine_rank()} than at rank 0"
        raise UserError(problem, hint, INTEGRITY)


def _identity_of(model: Model, folder: Path) -> tuple[str, Any]:
    if model.kind == "folder":
        return "files", digest(table(folder))
    return "fingerprint", Artifact(folder.parent).verify().fingerprint
