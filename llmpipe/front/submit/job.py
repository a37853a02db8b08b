"""What a job is to do, and whether it can: the recipe as the job's first process will see it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from llmpipe.errors import UserError, near
from llmpipe.files.paths import expanded
from llmpipe.front import ahead
from llmpipe.recipe.check import Located, Pipeline, load_pipeline, locate
from llmpipe.recipe.sections import Recipe, is_local
from llmpipe.recipe.yaml import read
from llmpipe.run.artifact import artifact_of
from llmpipe.stages import STAGES, schema

SystemName = Literal["slurm", "sky", "kubeflow", "docker"]

LONGEST = 40
"""Characters of a job's name; a pod's is longer by what Kubernetes adds, and has at most 63."""


def system_of(name: str) -> SystemName:
    """The system of a name. Raises UserError where it is none."""
    known = get_args(SystemName)
    if name not in known:
        raise UserError(f"--to {name}: is not one of {', '.join(known)}{near(name, known)}")
    return cast(SystemName, name)


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    recipe: Path
    system: SystemName
    nodes: int
    gpus: int
    """Of each machine; 0 for its CPUs."""
    overrides: list[str]
    """What `--set` and `--run` give, as KEY=VALUE."""
    arguments: list[str]
    """The same as they were written, for the job's own command line."""


@dataclass(frozen=True)
class Job:
    """A command of llmpipe on machines of a cluster."""

    command: list[str]
    """What each process runs."""
    name: str
    """In lower case, with hyphens: what every system takes."""
    run: Path
    """The run directory, as the recipe spells it."""
    nodes: int
    gpus: int

    @property
    def processes_per_node(self) -> int:
        return max(1, self.gpus)

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node


def job_of(asked: Asked) -> Job:
    """Look at a recipe, or a pipeline, and say what runs it.

    Raises UserError for all that the stage itself would refuse ahead, for machines that the
    recipe's batch does not divide among, and for paths that another machine does not have.
    """
    word, stages, pipeline = _read(asked)
    valid = [located for located in stages if located]
    elsewhere = asked.system != "slurm"
    with _seen_from(asked):
        if elsewhere:
            # other machines have other packages, and this one need not be able to train
            ahead.look(stages, only_prepare=True, pipeline=pipeline)
        else:
            ahead.check(stages, pipeline=pipeline)
    if elsewhere:
        _refuse_outside(asked.recipe, valid)
    artifacts = [artifact_of(located.recipe) for located in valid]
    run = artifacts[0].run
    last = run.name if pipeline else f"{run.name}-{artifacts[0].name}"
    command = ["llmpipe", word, str(asked.recipe), *asked.arguments]
    return Job(command, plain(last), run, asked.nodes, asked.gpus)


def _read(asked: Asked) -> tuple[str, Sequence[Located | None], Pipeline | None]:
    """The word of the command that takes a recipe, its stages, and the pipeline if it is one."""
    values, where = read(asked.recipe)
    if not isinstance(values, dict):
        raise UserError(f"{asked.recipe}:1: a recipe is a mapping of keys to values")
    if "stages" in values:
        pipeline = load_pipeline(asked.recipe, schema, asked.overrides)
        return "run", pipeline.stages, pipeline
    name = values.get("stage")
    if not isinstance(name, str) or name not in STAGES:
        line = where.get(("stage",), f"{asked.recipe}:1")
        problem = f"no stage{near(str(name), STAGES)}" if name else "required, but missing"
        raise UserError(f"{line}: stage: {problem}", f"there are: {', '.join(STAGES)}")
    return name, [locate(asked.recipe, schema(name), asked.overrides)], None


@contextmanager
def _seen_from(asked: Asked) -> Iterator[None]:
    """Let what is asked of this machine be answered as on the job's first one."""
    processes = max(1, asked.gpus)
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(asked.gpus)))}
    if started_by_system(asked):
        seen |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(asked.nodes * processes),
            "LOCAL_WORLD_SIZE": str(processes),
        }
    kept = {name: os.environ.get(name) for name in seen}
    os.environ.update(seen)
    try:
        yield
    finally:
        for name, before in kept.items():
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def started_by_system(asked: Asked) -> bool:
    """Whether the file starts every process itself; on one machine llmpipe does, but under SLURM,
    whose signals would reach the launcher between."""
    several = asked.nodes * max(1, asked.gpus) > 1
    return several and (asked.nodes > 1 or asked.system == "slurm")


def _refuse_outside(file: Path, stages: list[Located]) -> None:
    """Raise UserError for paths that are not below the current folder, which is all that goes along
    to another machine."""
    lines = [f"{file}: this recipe"] if _is_outside(str(file)) else []
    for located in stages:
        for field, path in _paths(located.recipe):
            if _is_outside(path):
                lines.append(f"{located.line(field)}: {field}: {path}")
    if lines:
        text = "\n".join(
            f"{line}: is not below the current folder" for line in dict.fromkeys(lines)
        )
        raise UserError(text, "nothing else of this machine is there where the job runs")


def _paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every path of a recipe, behind its field."""
    yield "run", recipe.run
    named = {f"{field}.path": rows.path for field, rows in recipe.rows().items()}
    for field, path in {**recipe.references(), **named}.items():
        if is_local(path):
            yield field, path
    yield from recipe.files().items()


def _is_outside(path: str) -> bool:
    return os.path.isabs(expanded(path)) or os.path.normpath(path).startswith("..")


def plain(name: str) -> str:
    """A name of letters, digits and hyphens, with a letter in front."""
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"llmpipe-{name}"
    return name[:LONGEST].strip("-")
