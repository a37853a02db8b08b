"""One artifact being made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from llmpipe.errors import Say
from llmpipe.recipe.sections import Recipe
from llmpipe.run.artifact import Artifact
from llmpipe.run.plan import Plan
from llmpipe.run.signals import Signals

# Covariant: what takes a job of any `Training` recipe takes one of sft's, too.
R_co = TypeVar("R_co", bound=Recipe, covariant=True)


@dataclass(frozen=True)
class Job(Generic[R_co]):
    """One artifact being made: what a stage's `prepare` and `train` are given."""

    artifact: Artifact
    recipe: R_co
    """The recipe; a stage knows its own class of it: `Job[Schema]`."""
    models: dict[str, Path]
    """Folders of the models that the recipe names, as safetensors and JSON, by their fields."""
    bases: dict[str, Path]
    """Folders of the bases of those that are adapters."""
    plan: Plan
    """What was asked, its identity and the models."""
    say: Say
    """Prints a line and keeps it in log.txt."""
    signals: Signals
    """Whether a stop was asked for."""
    inexact: bool = False
    """Resume although the machine's settings changed."""

    @property
    def model(self) -> Path:
        """What a stage that trains starts from."""
        return self.models["model"]

    @property
    def weights(self) -> Path:
        """Where the weights of `model` lie: in the folder of its base where it is an adapter."""
        return self.bases.get("model") or self.model

    @property
    def prepared(self) -> Path:
        """Where the run keeps tokenized rows."""
        return self.artifact.run / ".prepared"
