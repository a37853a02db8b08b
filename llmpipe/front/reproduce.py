"""`llmpipe reproduce NAME`: what was published of a pipeline against what this machine obtains."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from llmpipe import screen
from llmpipe.errors import NUMERIC, Say, UserError, near
from llmpipe.recipe.check import Pipeline
from llmpipe.recipe.expected import Expected
from llmpipe.run.artifact import Artifact, artifact_of
from llmpipe.run.results import Results

RECIPES = Path("recipes")


class Obtained(NamedTuple):
    """A number of this run, with its interval where it has one."""

    value: float
    interval: str = ""


def pipeline_of(name: str) -> Path:
    """The file of a pipeline that is called by its name or its path. Raises UserError."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    shipped = RECIPES / f"{name}.yaml"
    if not shipped.exists():
        known = [file.stem for file in sorted(RECIPES.glob("*.yaml")) if _expects(file)]
        there = f"there are: {', '.join(known)}" if known else "there is no recipes/ here"
        raise UserError(f"reproduce: {name}: no {shipped}{near(name, known)}", there)
    return shipped


def _expects(path: Path) -> bool:
    return "\nexpected:" in path.read_text(encoding="utf-8", errors="replace")


def announce(pipeline: Pipeline, path: Path, say: Say) -> None:
    """Say what is to be reproduced. Raises UserError where nothing was published of a pipeline."""
    if not pipeline.expected and not pipeline.problems:
        problem = f"{path}:1: expected: is not there, so there is nothing to hold this run against"
        raise UserError(problem, f"`llmpipe run {path}` runs it")
    for number in pipeline.expected:
        ran = f"run to it {number.ran}" if number.ran else "NOT RUN YET by those who wrote it"
        say(f"published: {_name(number)}: {number.shown} ({number.source}); {ran}")


def compare(pipeline: Pipeline, say: Say) -> None:
    """Say every number beside the published one. Raises UserError (4) where one is outside."""
    recipes = [located.recipe for located in pipeline.stages if located]
    artifacts = {recipe.artifact: artifact_of(recipe) for recipe in recipes}
    outside = 0
    for number in pipeline.expected:
        obtained = obtained_of(number, artifacts[number.artifact])
        holds = number.holds(obtained.value)
        outside += not holds
        verdict = "within" if holds else screen.coloured("OUTSIDE", screen.RED, sys.stdout)
        say(f"{_name(number)}: {verdict}")
        say(f"  published {number.shown}")
        say(f"  obtained  {obtained.value:.4g}{obtained.interval}")
    count = len(pipeline.expected)
    if outside:
        problem = f"{outside} of {count} published numbers {'was' if outside == 1 else 'were'} not"
        raise UserError(f"{problem} obtained", "see the lines that say OUTSIDE", NUMERIC)
    say(f"reproduced: {count} of {count} published numbers")


def _name(number: Expected) -> str:
    return f"{number.artifact} {number.metric}" + (f" of {number.model}" if number.model else "")


def obtained_of(number: Expected, artifact: Artifact) -> Obtained:
    """What an artifact has in the place of a published number. Raises UserError (2)."""
    results = artifact.published("results.json")
    if results is not None:
        return _measured(number, Results.from_file(results))
    value: Any = artifact.manifest().final
    for part in number.metric.split("."):
        value = _one_of(value, part, number) if isinstance(value, dict) else None
    if not isinstance(value, (int, float)):
        raise UserError(f"expected: {number.metric}: no number of {artifact.path}", _known({}))
    return Obtained(float(value))


def _measured(number: Expected, results: Results) -> Obtained:
    """A cell of an evaluation, TASK.METRIC of a model."""
    task, _, metric = number.metric.partition(".")
    cells = _one_of(_one_of(results.tasks, task, number).metrics, metric, number)
    cell = _one_of(cells, number.model or next(iter(cells)), number)
    bounds = f" [{cell.low:.4g}, {cell.high:.4g}]" if cell.has_interval else ""
    return Obtained(cell.value, f"{bounds}, n = {cell.n:,}")


def _one_of(values: dict[str, Any], name: str, number: Expected) -> Any:
    if name in values:
        return values[name]
    raise UserError(f"expected: {_name(number)}: no {name}{near(name, values)}", _known(values))


def _known(values: dict[str, Any]) -> str:
    return f"there are: {', '.join(values) or 'no numbers'}"
