"""What will lie in the run directories when a stage starts: what lies there already, and what the
stages before it make.

Names and records alone are read: no file is hashed, and nobody is asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmpipe.errors import UserError, near
from llmpipe.files.paths import expanded
from llmpipe.recipe.names import ARTIFACT
from llmpipe.recipe.sections import ELSEWHERE, Recipe, Training, is_local
from llmpipe.run.artifact import PLAN, Artifact, artifact_of, is_artifact, is_reward_model
from llmpipe.run.reference import Use, resolve
from llmpipe.run.whereabouts import noted


@dataclass(frozen=True)
class Coming:
    """What a stage of this command makes."""

    number: int
    """Of the stage, from 1."""
    recipe: Recipe
    kind: str
    """Of artifact."""

    @property
    def artifact(self) -> Artifact:
        return artifact_of(self.recipe)

    @property
    def artifacts(self) -> Iterator[tuple[Artifact, str]]:
        """Each artifact that the stage makes, with its kind."""
        yield self.artifact, self.kind
        if isinstance(self.recipe, Training) and self.recipe.adapter and self.recipe.adapter.merge:
            yield self.artifact.merged, "model" if self.kind == "adapter" else self.kind


@dataclass(frozen=True)
class Command:
    """What is to be made, one after the other, and how."""

    coming: list[Coming]
    fresh: bool = False
    """What lies there is moved aside first."""
    only_prepare: bool = False
    """Nothing is trained here, so this machine need not be able to."""
    unread: tuple[str, ...] = ()
    """Names of artifacts of stages whose recipes are not valid: of these nothing is said."""


class Outlook:
    """What a stage of a command will find."""

    def __init__(self, command: Command, this: Coming):
        self.number = this.number
        self.fresh = command.fresh
        self.unread = command.unread
        self.coming: dict[str, tuple[Coming, str]] = {}
        for stage in command.coming:
            for artifact, kind in stage.artifacts:
                self.coming.setdefault(_at(artifact.path), (stage, kind))
        self.begun = is_begun(this.artifact) and not command.fresh
        """Whether it is settled what the stage's artifact is made of, and which commits."""
        self.finished = self.lies_there(this.artifact)
        """Whether the stage's artifact is there, so that there is nothing to do."""
        self.works = not (command.only_prepare or self.finished)
        """Whether this machine is going to do the stage's work."""

    def lies_there(self, artifact: Artifact) -> bool:
        """Whether an artifact is finished, and stays so."""
        remade = self.fresh and _at(artifact.path) in self.coming
        return artifact.finished and not remade

    def look(self, reference: str, use: Use, run: Path) -> str | None:
        """The kind of artifact that a reference means; None where that cannot be told.

        Raises UserError for what will not be there, or be of no use to the stage.
        """
        artifact = self.named(reference, run)
        if artifact is None:
            if self.is_below(reference):
                return None
            resolve(reference, use, run, {"hub": reference} if self.begun else None)
            return _kind_of_folder(reference)
        if artifact.name in self.unread:
            return None
        stage, kind = self.coming.get(_at(artifact.path), (None, ""))
        if stage and stage.number == self.number:
            hint = "give this stage another `name:`"
            raise UserError(f"{use.field}: {reference}: is what this stage itself makes", hint)
        if self.lies_there(artifact):
            resolve(reference, use, run)
            return artifact.manifest().kind
        if stage is None and "@" in reference:  # a checkpoint needs no finished artifact
            resolve(reference, use, run)
            return None
        if stage is None:
            raise self._nowhere(artifact, reference, use)
        if stage.number > self.number:
            problem = f"{use.field}: {reference}: is made later, by stage {stage.number}"
            raise UserError(problem, "move that stage in front of this one")
        _check_step(stage, reference, use.field, kind)
        if kind not in use.accepts:
            takes = " or ".join(use.accepts)
            problem = f"{use.field}: {reference}: stage {stage.number} makes a {kind} of it"
            raise UserError(problem, f"this stage takes {takes}")
        return kind

    def named(self, reference: str, run: Path) -> Artifact | None:
        """The artifact that a reference names, there or coming."""
        if reference.startswith(ARTIFACT):
            return Artifact(run / reference.removeprefix(ARTIFACT).partition("@")[0])
        path = expanded(reference)
        if is_local(reference) and (_at(path) in self.coming or is_artifact(path)):
            return Artifact(path)
        return None

    def maker(self, reference: str, run: Path) -> Coming | None:
        """The stage of this command that is going to make an artifact."""
        artifact = self.named(reference, run)
        if artifact is None or self.lies_there(artifact):
            return None
        stage, _ = self.coming.get(_at(artifact.path), (None, ""))
        return stage

    def is_below(self, path: str) -> bool:
        """Whether a path lies in what an earlier stage makes."""
        if not is_local(path):
            return False
        parents = [str(parent) for parent in Path(_at(expanded(path))).parents]
        numbers = [self.coming[parent][0].number for parent in parents if parent in self.coming]
        return any(number < self.number for number in numbers)

    def starts(self, reference: str, run: Path) -> Iterator[str]:
        """What a model started from, what that started from, and so on, by their `meaning`.

        Raises LookupError where that cannot be told.
        """
        seen = set()
        while artifact := self.named(reference, run):
            if artifact.name in self.unread or artifact in seen:  # a ring is said of its stages
                raise LookupError
            seen.add(artifact)
            start = self._start(artifact)
            if start is None:
                return
            reference, run = start, artifact.run
            yield self.meaning(reference, run)

    def root(self, reference: str, run: Path) -> Path | None:
        """The folder of the first model on the way back that lies there: of a finished artifact, or
        what the first of all stages starts from. None where that is no folder of this machine, or
        an adapter's, or cannot be told.
        """
        seen = set()
        while artifact := self.named(reference, run):
            if self.lies_there(artifact):
                return artifact.model if (artifact.model / "config.json").exists() else None
            if artifact.name in self.unread or artifact in seen:
                return None
            seen.add(artifact)
            try:
                start = self._start(artifact)
            except LookupError:
                return None
            if start is None:
                return None
            reference, run = start, artifact.run
        path = expanded(reference)
        return path if is_local(reference) and path.is_dir() else None

    def meaning(self, reference: str, run: Path) -> str:
        """A reference as it is for all who mean the same: artifact and path in full, path, Hub id.

        Two paths may still hold the same, which only reading them tells.
        """
        _, at, step = reference.partition("@")
        if artifact := self.named(reference, run):
            return f"{ARTIFACT}{_at(artifact.path)}{at}{step}"
        return _at(expanded(reference)) if is_local(reference) else reference

    def _start(self, artifact: Artifact) -> str | None:
        """The reference that an artifact was made from, or will be."""
        if self.lies_there(artifact):
            try:
                start = dict(artifact.manifest().models.get("model", {}))
            except UserError:  # damaged: to be said when it is used
                raise LookupError from None
            reference: str | None = start.pop("reference", None)
            if reference and reference.startswith(ELSEWHERE):
                reference = noted(start)
                if reference is None:
                    raise LookupError
            return reference
        if _at(artifact.path) not in self.coming:
            raise LookupError
        return self.coming[_at(artifact.path)][0].recipe.references().get("model")

    def _nowhere(self, artifact: Artifact, reference: str, use: Use) -> UserError:
        if artifact.path.exists():
            return UserError(f"{use.field}: {reference}: is not finished", "make it first")
        known = [
            Path(path).name for path in self.coming if Path(path).parent == Path(_at(artifact.run))
        ]
        if artifact.run.is_dir():
            known += [path.name for path in artifact.run.iterdir() if is_artifact(path)]
        known = [name for name in dict.fromkeys(known) if not self._is_this(artifact.run / name)]
        problem = f"{use.field}: {reference}: there is no such artifact in {artifact.run}"
        if self.number > 1:
            problem += ", and no stage before this one makes it"
        hint = f"there are: {', '.join(known)}" if known else "make it first"
        return UserError(f"{problem}{near(artifact.name, known)}", hint)

    def _is_this(self, path: Path) -> bool:
        stage, _ = self.coming.get(_at(path), (None, ""))
        return stage is not None and stage.number >= self.number


def is_begun(artifact: Artifact) -> bool:
    """Whether it is decided what an artifact is made of."""
    return artifact.finished or os.path.exists(artifact.path / PLAN)


def _at(path: Path) -> str:
    return os.path.abspath(path)


def _kind_of_folder(reference: str) -> str | None:
    """The kind of what is no artifact."""
    path = expanded(reference)
    if not is_local(reference) or not path.is_dir():
        return "model" if reference.endswith(".gguf") else None
    return "reward-model" if is_reward_model(path) else "model"


def _check_step(stage: Coming, reference: str, field: str, kind: str) -> None:
    """Raises UserError where a stage that is to be made will not have a checkpoint at a step."""
    name, _, step = reference.partition("@")
    recipe = stage.recipe
    if not step:
        return
    if not isinstance(recipe, Training):
        problem = f"{field}: {reference}: {recipe.stage} writes no checkpoints"
        raise UserError(problem, f"take {name}")
    if recipe.adapter:
        raise UserError(f"{field}: {reference}: is a checkpoint of an adapter", f"take {name}")
    every, last = recipe.checkpoint.every, recipe.steps
    if last and int(step) > last:
        raise UserError(f"{field}: {reference}: stage {stage.number} ends at step {last}")
    if last and int(step) != last and int(step) % every:
        problem = (
            f"{field}: {reference}: stage {stage.number} writes a checkpoint every {every} steps"
        )
        raise UserError(problem, f"take one of them, or {name}")
    later = last // every - int(step) // every if last else 0
    if later >= recipe.checkpoint.keep and not recipe.evaluation.keep_best:
        problem = (
            f"{field}: {reference}: stage {stage.number} keeps its last {recipe.checkpoint.keep}"
        )
        raise UserError(f"{problem} checkpoints", "raise checkpoint.keep there")
