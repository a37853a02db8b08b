"""One artifact being made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpipe.errors import Say
from llmpipe.run.artifact import Artifact
from llmpipe.run.plan import Plan
from llmpipe.run.signals import Signals


@dataclass
class Job:
    """One artifact being made: what a stage's `prepare` and `train` are given."""

    artifact: Artifact
    recipe: Any
    """The recipe; a stage knows its own class of it."""
    models: dict[str, Path]
    """Folders of the models that the recipe names, as safetensors and JSON, by the path of the field."""
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
        """Where the weights of `model` lie: in its own folder, or in that of its base where it is an adapter."""
        return self.bases.get("model") or self.model

    @property
    def prepared(self) -> Path:
        """Where the run keeps tokenized rows."""
        return self.artifact.run / ".prepared"
