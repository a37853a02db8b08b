"""Decide, before anything is written, what a command will do: run, resume, skip or refuse.

What a recipe asks for is written out as one document, `Asked`: its science, the identity of the
models it names and the content of every file. An artifact keeps the document it was made for; two
documents that mean the same are one artifact, and where they differ the user is shown in which
fields.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from llmpipe.data.sources import files_of, hub_key, hub_revision
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import digest, read_json, write_json
from llmpipe.files.paths import expanded, not_plain, unreachable
from llmpipe.files.tables import SMALL, hashing_once, sha256_file, table
from llmpipe.recipe.places import paths_in, portable_paths, with_values
from llmpipe.recipe.sections import Recipe, Training
from llmpipe.run.artifact import MANIFEST, PLAN, Artifact
from llmpipe.run.datasets import placed_rows, resolved
from llmpipe.run.identity import changed_fields, document, identity, meaning, meanings, short
from llmpipe.run.manifest import Asked
from llmpipe.run.reference import Kinds, Model, Use, resolve
from llmpipe.sums import fingerprint
from llmpipe.typed import record

Accepts = Kinds | dict[str, Kinds]
"""Kinds of artifacts that a stage takes; by the first name of the field where fields differ."""

Action = Literal["run", "resume", "skip"]

RECIPE = "recipe.yaml"

RESTORE = "restore it from a copy; --fresh moves what is there aside and starts anew"


@dataclass(frozen=True)
class Plan:
    """What an artifact is made of and from; plan.json holds it."""

    identity: str
    asked: Asked
    """The document that decides the result."""
    models: dict[str, Model]
    """What the recipe's references mean, by the path of the field."""
    datasets: dict[str, Model] = dataclass_field(default_factory=dict)
    """The artifacts that the recipe has rows of, by the path of the field."""
    places: dict[str, str] = dataclass_field(default_factory=dict)
    """Where what a recipe names lies, of which `asked` holds less: paths in full, and the rows of
    artifacts, by their fields."""
    recipe_file: str = ""
    """sha256 of recipe.yaml, which lies beside plan.json; an older plan does not know it."""
    artifact: str = ""
    """What is made, as it was called when this was written; an older plan does not know it."""

    @property
    def content(self) -> dict[str, str]:
        """What every named file held, and which commit every Hub data set had."""
        return self.asked.content

    @property
    def paths(self) -> list[str]:
        """Everything that it names which lies on this machine."""
        models = [model for start in self.models.values() for model in start.chain]
        return [*self.places.values(), *(str(model.place) for model in models if model.place)]

    def refuse_changed_models(self) -> None:
        """Raises UserError (3) where a model is not what was verified any more."""
        for model in self.models.values():
            model.refuse_changed()

    def write(self, folder: Path) -> None:
        """Write it down, after recipe.yaml was."""
        models = {field: model.record(folder) for field, model in self.models.items()}
        places = {field: os.path.relpath(path, folder) for field, path in self.places.items()}
        plan = {"identity": self.identity, "asked": self.asked, "models": models}
        if self.datasets:
            plan["datasets"] = {at: model.record(folder) for at, model in self.datasets.items()}
        plan |= {"places": places, "recipe_file": sha256_file(folder / RECIPE)}
        plan |= {"artifact": folder.name}
        write_json(folder / PLAN, plan | {"fingerprint": fingerprint(plan)})

    @classmethod
    def read(cls, folder: Path) -> Plan | None:
        """The plan in plan.json, or None where there is none.

        Raises UserError (3) where it is damaged, naming a field that is not what it may be.
        """
        path = folder / PLAN
        if not os.path.lexists(path):
            return None
        if problem := not_plain(path):
            raise UserError(f"{path}: {problem}", RESTORE, INTEGRITY)
        document = read_json(path)
        if not isinstance(document, dict):
            raise UserError(f"{path}: damaged: no JSON object", RESTORE, INTEGRITY)
        try:
            plan = record(_Recorded, document)
            if plan.fingerprint not in (None, fingerprint(document)):
                raise ValueError("it was changed")
            plan.asked.check()
            models, datasets = (
                {at: Model.of_record(each, f"{name}.{at}", folder) for at, each in named.items()}
                for name, named in (("models", plan.models), ("datasets", plan.datasets))
            )
        except ValueError as error:
            raise UserError(f"{path}: damaged: {error}", RESTORE, INTEGRITY) from None
        places = {at: os.path.abspath(folder / way) for at, way in plan.places.items()}
        known = (models, datasets, places, plan.recipe_file, plan.artifact)
        return cls(plan.identity, plan.asked, *known)


@dataclass(frozen=True)
class _Recorded:
    """A `Plan` as plan.json holds it."""

    identity: str
    asked: Asked
    models: dict[str, dict[str, Any]]
    datasets: dict[str, dict[str, Any]] = dataclass_field(default_factory=dict)
    places: dict[str, str] = dataclass_field(default_factory=dict)
    """The ways from the artifact."""
    recipe_file: str = ""
    artifact: str = ""
    fingerprint: str | None = None


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
    for field, source in placed_rows(recipe).items():
        if source.is_here:
            content |= {f"{field}:{file.name}": file.sha256 for file in files_of(source)}
        else:
            key = hub_key(source)
            content[key] = pinned.get(key) or hub_revision(source)
    for field, path in _files_beside_rows(recipe):
        content[f"{field}:{path.name}"] = _content(path)
    return content


def _files_beside_rows(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """Field and path of each file or folder. Raises UserError for one that is not there."""
    for field, name in recipe.files().items():
        path = expanded(name)
        if reason := unreachable(path):
            hint = "a local path is looked up from the current folder"
            raise UserError(f"{field}: {name}: {reason}", hint)
        yield field, path


def _content(path: Path) -> str:
    return digest(table(path)) if path.is_dir() else sha256_file(path)


def refuse_changed(recipe: Recipe, planned: Asked) -> None:
    """Raises UserError (3) for a file beside the rows that is not the one a plan was made with."""
    for field, path in _files_beside_rows(recipe):
        if _content(path) not in [sha256 for _, sha256 in planned.files(field)]:
            problem = f"{field}: {path}: was changed since the command began"
            raise UserError(problem, "run the same command again", INTEGRITY)


def plan_of(recipe: Recipe, run: Path, accepts: Accepts, old: Asked | None = None) -> Plan:
    """What a recipe asks for and the models that it names.

    Hub revisions pinned in `old` stay pinned. Raises UserError for what is not there, damaged, or
    of no use to the stage.
    """
    pinned = old or Asked()
    models = {}
    held = portable_paths(recipe)
    with hashing_once():
        for field, reference in recipe.references().items():
            keep = recipe.keeps_adapters or field != "model"
            use = Use(field, kinds_of(field, accepts), keep)
            model = resolve(reference, use, run, pinned.models.get(field))
            models[field] = replace(model, reference=held[field])
        datasets = resolved(recipe, run)
        content = content_of(recipe, pinned.content)
    asked = Asked(
        recipe=document(recipe, recipe.narrows or recipe.stage),
        models={field: model.identity for field, model in models.items()},
        content=content,
    )
    return Plan(identity(recipe, asked), asked, models, datasets, places_of(recipe))


def places_of(recipe: Recipe) -> dict[str, str]:
    """Where what a recipe names lies, as far as an artifact holds less of it, by the fields."""
    held = portable_paths(recipe)
    texts = paths_in(recipe)
    texts |= {f"{field}.path": source.path for field, source in placed_rows(recipe).items()}
    return {field: text for field, text in texts.items() if text != held[field]}


def decide(artifact: Artifact, recipe: Recipe, accepts: Accepts, progress: str) -> Decision:
    """Compare what is asked with what lies there.

    `progress` is what an unfinished artifact goes on from: its checkpoints, or a file. Raises
    UserError (3) when another recipe made the artifact, where it is not as published, or where a
    link lies in it.
    """
    if artifact.finished:
        manifest = artifact.manifest()
        now = plan_of(recipe, artifact.run, accepts, manifest.asked)
        _refuse_other(artifact, recipe, manifest.asked, now.asked, "was made")
        artifact.verify(SMALL)
        plan = replace(now, identity=manifest.identity, asked=manifest.asked)
        return Decision(
            "skip", f"finished, same recipe and inputs{_beside(artifact, recipe)}", plan
        )
    artifact.refuse_links()
    if not _is_begun(artifact, progress):
        plan = plan_of(recipe, artifact.run, accepts)
        return Decision("run", "nothing there yet", plan)
    begun = Plan.read(artifact.path)
    if begun is None:
        problem = f"{artifact.path / PLAN}: missing: what was begun here is not known any more"
        raise UserError(problem, RESTORE, INTEGRITY)
    now = plan_of(recipe, artifact.run, accepts, begun.asked)
    _refuse_other(artifact, recipe, begun.asked, now.asked, "was begun")
    # its checkpoints know the document it was begun with, and not fields that came later
    plan = replace(now, identity=begun.identity, asked=_made_portable(recipe, begun.asked))
    return Decision("resume", "not finished, same recipe and inputs", plan)


def _beside(artifact: Artifact, recipe: Recipe) -> str:
    """What to say of a merged model that was published beside an adapter: that it is gone, if it
    is. Raises UserError (3) where it is not as published.
    """
    if not isinstance(recipe, Training) or not recipe.adapter or not recipe.adapter.merge:
        return ""
    merged = artifact.merged
    if not os.path.lexists(merged.path):
        return f"; {merged.path} is gone, and --fresh makes both again"
    if not merged.finished:
        problem = f"{merged.path / MANIFEST}: missing"
        raise UserError(problem, f"restore it, or remove {merged.path}", INTEGRITY)
    merged.verify(SMALL)
    return ""


def _is_begun(artifact: Artifact, progress: str) -> bool:
    """Whether anything of what a stage goes on from is there."""
    path = artifact.path / progress
    if path == artifact.checkpoints:  # what else lies in it is somebody's own
        return bool(artifact.steps)
    return path.exists()


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


def _made_portable(recipe: Recipe, old: Asked) -> Asked:
    """What was asked, without the paths in full that older code left in it."""
    old_recipe = _completed(recipe, old)
    if old_recipe is None:
        return old
    return replace(old, recipe=with_values(old.recipe, portable_paths(old_recipe)))


def _completed(recipe: Recipe, old: Asked) -> Recipe | None:
    """What was asked as a recipe, a field that it does not know at its default.

    None where it has a field that is no more.
    """
    cosmetic = {"run": recipe.run, "stage": recipe.stage}
    try:
        return type(recipe).model_validate({**old.recipe, **cosmetic})
    except ValidationError:
        return None
