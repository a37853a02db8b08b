"""Rows that an artifact of the run holds: `path: artifact:NAME` of a source.

The artifact is verified when a command plans, as a model is. What decides the result is the content
of its rows, as with every file, and a worker finds them by their path in the plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from llmpipe.recipe.sections import Recipe, Rows
from llmpipe.run.artifact import Artifact, artifact_of
from llmpipe.run.reference import Model, Use, resolve

DATASET = "dataset"
"""The kind of artifact that has rows."""

R = TypeVar("R", bound=Rows)


def use_of(field: str, *, glance: bool = False) -> Use:
    """For what a source's artifact is asked for."""
    return Use(field, (DATASET,), glance=glance)


def resolved(recipe: Recipe, run: Path) -> dict[str, Model]:
    """The artifacts that a recipe has rows of, every file of them hashed, by the path of the field.

    Raises UserError for one that is not finished, damaged, or no data set.
    """
    return {field: resolve(name, use_of(field), run) for field, name in recipe.datasets().items()}


def placed(source: R, run: Path) -> R:
    """A source with the path of its rows in the place of the artifact that has them."""
    if source.artifact is None:
        return source
    return source.model_copy(update={"path": str(Artifact(run / source.artifact).rows)})


def placed_rows(recipe: Recipe) -> dict[str, Rows]:
    """`recipe.rows()`, each `placed`."""
    run = artifact_of(recipe).run
    return {field: placed(source, run) for field, source in recipe.rows().items()}
