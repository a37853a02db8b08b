"""Decide, before anything is written, what a command will do: run, resume, skip or refuse.

What a recipe asks for is written out as one document, `asked`: the recipe's science, the identity of the model it
starts from and the content of every file it names. An artifact holds the document it was made for; two equal documents
are one artifact, and where they differ the user is shown which fields do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files import digest, read_json, sha256_file, table, write_json
from llmpipe.recipe.sections import Recipe, is_local, science
from llmpipe.run.artifact import Artifact
from llmpipe.run.reference import Kinds, Model, _short, changes, resolve

Accepts = (
    Kinds | dict[str, Kinds]
)  # that a stage takes; by the first name of the field where fields differ

Action = Literal["run", "resume", "skip"]


@dataclass(frozen=True)
class Plan:
    """What an artifact is made of and from; plan.json holds it."""

    identity: str
    asked: dict[str, Any]
    """The document that decides the result: `recipe`, `models` and `content`."""
    models: dict[str, Model]
    """What the recipe's references mean, by the path of the field."""

    @property
    def content(self) -> dict[str, str]:
        """What every named file held, and which commit every Hub data set had."""
        return self.asked["content"]

    def write(self, folder: Path) -> None:
        models = {at: model.record() for at, model in self.models.items()}
        record = {"identity": self.identity, "asked": self.asked, "models": models}
        write_json(folder / "plan.json", record)

    @classmethod
    def read(cls, folder: Path) -> Plan:
        record = read_json(folder / "plan.json")
        models = {at: Model.of_record(model) for at, model in record["models"].items()}
        return cls(record["identity"], record["asked"], models)


@dataclass(frozen=True)
class Decision:
    """What a command will do, and why."""

    action: Action
    why: str
    plan: Plan


def content_of(recipe: Recipe, pinned: dict[str, str]) -> dict[str, str]:
    """{file: sha256, or Hub data set: commit} of every source of rows and other file that a recipe names."""
    from llmpipe.data.sources import files_of, hub_key, hub_revision

    found: dict[str, str] = {}
    for at, source in recipe.rows().items():
        if is_local(source.path):
            found |= {f"{at}:{file.name}": file.sha256 for file in files_of(source)}
        else:
            found[hub_key(source)] = pinned.get(hub_key(source)) or hub_revision(source)
    for at, name in recipe.files().items():
        path = Path(name).expanduser()
        if not path.exists():
            raise UserError(
                f"{at}: {name}: no such file", "a local path is looked up from the current folder"
            )
        found[f"{at}:{path.name}"] = digest(table(path)) if path.is_dir() else sha256_file(path)
    return found


def ask(
    recipe: Recipe, run: Path, accepts: Accepts, old: dict[str, Any]
) -> tuple[dict, dict[str, Model]]:
    """The document that decides the result, and the models it names. Hub revisions pinned in `old` stay pinned."""
    pins, content = old.get("models", {}), old.get("content", {})
    models = {}
    for at, wanted in recipe.references().items():
        kinds = accepts[at.partition(".")[0]] if isinstance(accepts, dict) else accepts
        models[at] = resolve(
            wanted, at, run, kinds, pins.get(at), recipe.keeps_adapters or at != "model"
        )
    identities = {at: model.identity for at, model in models.items()}
    document = science(recipe) | {"stage": recipe.narrows or recipe.stage}
    return {
        "recipe": document,
        "models": identities,
        "content": content_of(recipe, content),
    }, models


def decide(artifact: Artifact, recipe: Recipe, accepts: Accepts, progress: str) -> Decision:
    """Compare what is asked with what lies there; `progress` globs what an unfinished artifact goes on from.

    Raises UserError (3) when another recipe made it.
    """
    begun = read_json(artifact.path / "plan.json") if any(artifact.path.glob(progress)) else None
    old = artifact.manifest() if artifact.finished else begun
    asked, models = ask(recipe, artifact.run, accepts, old["asked"] if old else {})
    if old:
        _refuse_other(
            artifact, recipe, old["asked"], asked, "was made" if artifact.finished else "was begun"
        )
    if artifact.finished:
        wrong = [n for n, e in old["files"].items() if not _same_size(artifact.path / n, e["size"])]
        if wrong:
            raise UserError(
                f"{artifact.path / wrong[0]}: not as published",
                "restore it, or make the artifact again with --fresh",
                INTEGRITY,
            )
        return Decision("skip", "finished, same recipe and inputs", made_of(asked, models))
    if old:
        # the document it was begun with: its checkpoints know that one, and not fields that came later
        begun_with = Plan(old["identity"], old["asked"], models)
        return Decision("resume", "not finished, same recipe and inputs", begun_with)
    return Decision("run", "nothing there yet", made_of(asked, models))


def made_of(asked: dict[str, Any], models: dict[str, Model]) -> Plan:
    return Plan(digest(asked), asked, models)


def _same_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _refuse_other(artifact: Artifact, recipe: Recipe, old: dict, new: dict, verb: str) -> None:
    try:  # a field that the old document does not know takes its default
        filled = type(recipe).model_validate(
            {**old["recipe"], "run": recipe.run, "stage": recipe.stage}
        )
        old = {**old, "recipe": science(filled) | {"stage": old["recipe"]["stage"]}}
    except ValidationError:
        pass  # a field that no longer exists: shown as a difference
    if old == new:
        return
    lines = [f"{artifact.path} {verb} with another recipe or other inputs:"]
    lines += [f"  {path}: {_short(a)} there, {_short(b)} now" for path, a, b in changes(old, new)]
    raise UserError(
        "\n".join(lines),
        f"--fresh moves {artifact.path} aside and starts anew; `name:` keeps both; or put the old values back",
        INTEGRITY,
    )
