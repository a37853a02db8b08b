"""Decide, before anything is written, what a command will do: run, resume, skip or refuse.

What a recipe asks for is written out as one document, `Asked`: its science, the identity of the
models it names and the content of every file. An artifact keeps the document it was made for; two
documents that mean the same are one artifact, and where they differ the user is shown in which
fields.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from llmpipe.data.sources import files_of, hub_key, hub_revision
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files import (
    SMALL,
    digest,
    expanded,
    read_json,
    sha256_file,
    table,
    unreachable,
    write_json,
)
from llmpipe.recipe.sections import Recipe, is_local
from llmpipe.run.artifact import PLAN, Artifact
from llmpipe.run.identity import changed_fields, document, identity, meaning, meanings, short
from llmpipe.run.manifest import Asked
from llmpipe.run.reference import Kinds, Model, Use, resolve
from llmpipe.typed import record

Accepts = Kinds | dict[str, Kinds]
"""Kinds of artifacts that a stage takes; by the first name of the field where fields differ."""

Action = Literal["run", "resume", "skip"]


@dataclass(frozen=True)
class Plan:
    """What an artifact is made of and from; plan.json holds it."""

    identity: str
    asked: Asked
    """The document that decides the result."""
    models: dict[str, Model]
    """What the recipe's references mean, by the path of the field."""

    @property
    def content(self) -> dict[str, str]:
        """What every named file held, and which commit every Hub data set had."""
        return self.asked.content

    def write(self, folder: Path) -> None:
        models = {field: model.record() for field, model in self.models.items()}
        plan = {"identity": self.identity, "asked": self.asked, "models": models}
        write_json(folder / PLAN, plan)

    @classmethod
    def read(cls, folder: Path) -> Plan | None:
        """The plan in plan.json, or None when the file is absent or not whole.

        Raises UserError (3) naming a field that is not what it may be.
        """
        document = read_json(folder / PLAN)
        if document is None:
            return None
        try:
            plan = record(_Recorded, document)
            plan.asked.check()
            of_record = Model.of_record
            models = {at: of_record(model, f"models.{at}") for at, model in plan.models.items()}
        except ValueError as error:
            hint = "--fresh moves the artifact aside and starts anew"
            raise UserError(f"{folder / PLAN}: {error}", hint, INTEGRITY) from None
        return cls(plan.identity, plan.asked, models)


@dataclass(frozen=True)
class _Recorded:
    """A `Plan` as plan.json holds it."""

    identity: str
    asked: Asked
    models: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Decision:
    """What a command will do, and why."""

    action: Action
    why: str
    plan: Plan


def kinds_of(field: str, accepts: Accepts) -> Kinds:
    """Kinds of artifacts that a stage takes at a field."""
    return accepts[field.partition(".")[0]] if isinstance(accepts, dict) else accepts


def content_of(recipe: Recipe, pinned: dict[str, str]) -> dict[str, str]:
    """sha256 of every file that a recipe names, and the commit of every Hub data set.

    Commits in `pinned` stay. Raises UserError for a file that is not there.
    """
    content: dict[str, str] = {}
    for field, source in recipe.rows().items():
        if is_local(source.path):
            content |= {f"{field}:{file.name}": file.sha256 for file in files_of(source)}
        else:
            key = hub_key(source)
            content[key] = pinned.get(key) or hub_revision(source)
    for field, name in recipe.files().items():
        path = expanded(name)
        if reason := unreachable(path):
            hint = "a local path is looked up from the current folder"
            raise UserError(f"{field}: {name}: {reason}", hint)
        content[f"{field}:{path.name}"] = (
            digest(table(path)) if path.is_dir() else sha256_file(path)
        )
    return content


def plan_of(recipe: Recipe, run: Path, accepts: Accepts, old: Asked | None = None) -> Plan:
    """What a recipe asks for and the models that it names.

    Hub revisions pinned in `old` stay pinned. Raises UserError for what is not there, damaged, or
    of no use to the stage.
    """
    pinned = old or Asked()
    models = {}
    for field, reference in recipe.references().items():
        use = Use(field, kinds_of(field, accepts), keep=recipe.keeps_adapters or field != "model")
        models[field] = resolve(reference, use, run, pinned.models.get(field))
    asked = Asked(
        recipe=document(recipe, recipe.narrows or recipe.stage),
        models={field: model.identity for field, model in models.items()},
        content=content_of(recipe, pinned.content),
    )
    return Plan(identity(recipe, asked), asked, models)


def decide(artifact: Artifact, recipe: Recipe, accepts: Accepts, progress: str) -> Decision:
    """Compare what is asked with what lies there.

    `progress` globs what an unfinished artifact goes on from. Raises UserError (3) when another
    recipe made the artifact, where it is not as published, or where a link lies in it.
    """
    if artifact.finished:
        manifest = artifact.manifest()
        now = plan_of(recipe, artifact.run, accepts, manifest.asked)
        _refuse_other(artifact, recipe, manifest.asked, now.asked, "was made")
        artifact.verify(SMALL)
        plan = Plan(manifest.identity, manifest.asked, now.models)
        return Decision("skip", "finished, same recipe and inputs", plan)
    artifact.refuse_links()
    begun = Plan.read(artifact.path) if any(artifact.path.glob(progress)) else None
    if begun is None:
        plan = plan_of(recipe, artifact.run, accepts)
        return Decision("run", "nothing there yet", plan)
    now = plan_of(recipe, artifact.run, accepts, begun.asked)
    _refuse_other(artifact, recipe, begun.asked, now.asked, "was begun")
    # its checkpoints know the document it was begun with, and not fields that came later
    plan = Plan(begun.identity, begun.asked, now.models)
    return Decision("resume", "not finished, same recipe and inputs", plan)


def _refuse_other(artifact: Artifact, recipe: Recipe, old: Asked, new: Asked, verb: str) -> None:
    """Raise UserError (3) naming each field in which what was asked then differs from now."""
    if old == new:
        return
    same: set[str] = set()
    if old_recipe := _completed(recipe, old):
        stage = old.recipe.get("stage", recipe.stage)
        old = replace(old, recipe=document(old_recipe, stage))
        if meaning(old_recipe, old) == meaning(recipe, new):
            return
        then, now = meanings(old_recipe, old), meanings(recipe, new)
        same = {field for field, meant in now.items() if then.get(field) == meant}
    lines = [f"{artifact.path} {verb} with another recipe or other inputs:"]
    for field, before, after in changed_fields(old, new, same):
        lines.append(f"  {field}: {short(before)} there, {short(after)} now")
    hint = (
        f"--fresh moves {artifact.path} aside and starts anew; `name:` keeps both; "
        "or put the old values back"
    )
    raise UserError("\n".join(lines), hint, INTEGRITY)


def _completed(recipe: Recipe, old: Asked) -> Recipe | None:
    """What was asked as a recipe, a field that it does not know at its default.

    None where it has a field that is no more.
    """
    cosmetic = {"run": recipe.run, "stage": recipe.stage}
    try:
        return type(recipe).model_validate({**old.recipe, **cosmetic})
    except ValidationError:
        return None
