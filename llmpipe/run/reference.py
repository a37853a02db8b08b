"""What a recipe's reference to a model means: a Hub id, a folder, a GGUF file or an artifact."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import digest
from llmpipe.files.paths import expanded, unreachable
from llmpipe.files.tables import sha256_file, stamp, table
from llmpipe.recipe.names import ARTIFACT
from llmpipe.recipe.places import is_here, is_narrow, nearest_here, portable
from llmpipe.recipe.sections import ELSEWHERE, Recipe, is_local
from llmpipe.run import checkpoints, hub
from llmpipe.run.artifact import MANIFEST, Artifact, artifacts, is_artifact, is_reward_model
from llmpipe.run.folders import check_folder
from llmpipe.run.identity import changes, short
from llmpipe.run.manifest import (
    Base,
    Identity,
    ModelKind,
    Parent,
    check_identity,
    check_reference,
)
from llmpipe.run.whereabouts import cache, noted
from llmpipe.sums import SUMS, is_sealed
from llmpipe.typed import record

Kinds = tuple[str, ...]
"""Kinds of artifacts."""

TRAINED = ("model", "adapter", "reward-model")
"""Kinds that an adapter's base may be of."""

LONGEST_CHAIN = 20
"""Adapters on one another, each on the one before it as it was merged."""

SHIPPED = "SmolLM2-135M-Instruct.gguf"
"""What `make models` fetches."""


@dataclass(frozen=True)
class Model:
    """What a reference means.

    `merged`: an adapter (in `folder`) to be merged into its `base` first. An `artifact` with a base
    is an adapter.
    """

    kind: ModelKind
    reference: str
    identity: Identity
    """Decides which model it is."""
    folder: Path | None
    """Where it lies now; None where it is still to be fetched."""
    parents: list[Parent] = field(default_factory=list)
    base: Model | None = None
    stamp: str | None = None
    """Of its folder or file before that was verified, as `files.stamp` has it."""

    @property
    def converts(self) -> bool:
        """Whether it, or its base, is no folder yet that can be loaded."""
        return self.kind in ("gguf", "merged") or (self.base is not None and self.base.converts)

    @property
    def is_adapter(self) -> bool:
        """Whether it is used as an adapter on its base, unmerged."""
        return self.kind == "artifact" and self.base is not None

    @property
    def place(self) -> Path | None:
        """What a recipe would name to mean it: its folder, its file or its artifact."""
        is_artifact = self.kind in ("artifact", "merged")
        return self.folder.parent if self.folder and is_artifact else self.folder

    @property
    def chain(self) -> Iterator[Model]:
        """The model and, where it is an adapter, what lies under it."""
        yield self
        if self.base:
            yield from self.base.chain

    def refuse_changed(self) -> None:
        """Raises UserError (3) where it, or what lies under it, is not what was verified any more.

        Nothing is hashed once more: that would cost what loading costs.
        """
        for model in self.chain:
            if model.stamp and model.folder and _stamp_now(model.folder) != model.stamp:
                problem = f"{model.reference}: {model.folder}: was changed since it was verified"
                raise UserError(problem, "run the same command again", INTEGRITY)

    def seen_from(self, artifact: Path) -> str | None:
        """The way from an artifact to a model that lies near it and that its reference does not
        lead to; else None."""
        if self.kind == "hub" or (
            self.kind == "folder" and not self.reference.startswith(ELSEWHERE)
        ):
            return None
        folder = model_folder(self, artifact.parent / ".prepared")
        if folder.is_relative_to(cache()):
            return None  # which is this user's, and no part of what is moved
        near = os.path.commonpath([os.path.abspath(artifact), os.path.abspath(folder)])
        return os.path.relpath(folder, artifact) if is_narrow(near) else None

    @classmethod
    def of_record(cls, document: Any, at: str, artifact: Path) -> Model:
        """What plan.json of an artifact holds, read again.

        Raises ValueError where it is not that.
        """
        model = record(_Recorded, document, at)
        check_reference(f"{at}.reference", model.reference)
        check_identity(f"{at}.identity", model.identity)
        return cls(
            model.kind,
            model.reference,
            model.identity,
            Path(os.path.normpath(artifact / model.folder)) if model.folder else None,
            model.parents,
            cls.of_record(model.base, f"{at}.base", artifact) if model.base else None,
            model.stamp,
        )

    def record(self, artifact: Path) -> dict[str, Any]:
        """As plan.json holds it: the way to its folder, since a run may be moved."""
        record: dict[str, Any] = {
            "kind": self.kind,
            "reference": self.reference,
            "identity": self.identity,
            "parents": [asdict(parent) for parent in self.parents],
        }
        if self.base:
            record["base"] = self.base.record(artifact)
        if self.folder and self.kind != "hub":
            record["folder"] = os.path.relpath(self.folder, artifact)
            record["stamp"] = self.stamp
        return record


@dataclass(frozen=True)
class _Recorded:
    """A `Model` as plan.json holds it."""

    kind: ModelKind
    reference: str
    identity: Identity
    folder: str | None = None
    parents: list[Parent] = field(default_factory=list)
    base: dict[str, Any] | None = None
    stamp: str | None = None


@dataclass(frozen=True)
class Use:
    """For what a model is asked for."""

    field: str
    """Of the recipe, for messages."""
    accepts: Kinds
    """Kinds of artifacts that the stage can use."""
    keep: bool = True
    """Leave an adapter unmerged."""
    glance: bool = False
    """Look at names and records alone: hash nothing, and ask nobody for a commit."""
    below: int = 0
    """Adapters that lie on it."""

    def check(self, reference: str, kind: str) -> None:
        """Raises UserError (3) where the stage cannot use an artifact of this kind."""
        if kind not in self.accepts:
            takes = " or ".join(self.accepts)
            problem = f"{self.field}: {reference} is of kind '{kind}'; this stage takes {takes}"
            raise UserError(problem, code=INTEGRITY)


def resolve(reference: str, use: Use, run: Path, pinned: Identity | None = None) -> Model:
    """What a reference means in a run.

    `pinned` is the identity that an earlier start of the same work came to: a Hub revision stays.
    Raises UserError for what is not there, damaged, or not to be used so. What is only glanced at
    has no identity.
    """
    if reference.startswith(ARTIFACT):
        name, _, step = reference.removeprefix(ARTIFACT).partition("@")
        if step:
            return _of_checkpoint(Artifact(run / name), step, reference, use)
        return _of_artifact(Artifact(run / name), reference, use)
    try:
        here = is_here(reference, "model", pinned="hub" in (pinned or {}))
    except UserError as error:
        raise UserError(f"{use.field}: {error.message}", error.hint) from None
    if not here:
        return _of_hub(reference, use, pinned)
    path = expanded(reference)
    if reason := unreachable(path):
        raise UserError(f"{use.field}: {reference}: {reason}", _instead(reference))
    if path.is_file():
        return _of_file(path, reference, use)
    if not path.is_dir():
        raise UserError(f"{use.field}: {reference}: is neither a file nor a folder")
    if is_artifact(path) or _is_unfinished(path):
        return _of_artifact(Artifact(path), reference, use)
    return _of_folder(path, reference, use)


def _stamp_now(place: Path) -> str | None:
    """The stamp of a place; None where nothing lies there any more."""
    try:
        return stamp(place)
    except OSError:
        return None


def parents_of(recipe: Recipe, run: Path) -> list[Artifact]:
    """The artifacts that a recipe names and the bases of those that are adapters, each once; of a
    chain without end, which `resolve` refuses, the beginning."""
    parents: dict[Path, Artifact] = {}
    for reference in (*recipe.references().values(), *recipe.datasets().values()):
        artifact = _named(reference, run)
        for _ in range(LONGEST_CHAIN):
            if artifact is None or artifact.path.resolve() in parents:
                break
            parents[artifact.path.resolve()] = artifact
            artifact = _trained_on(artifact)
    return list(parents.values())


def model_folder(model: Model, converted: Path, weights: bool = True) -> Path:
    """Where a model lies: fetched from the Hub at its pinned commit, or made in `converted`. A GGUF
    file is read for all runs, into this user's cache, unless this run has it itself.
    """
    if model.kind == "gguf":
        own = converted / f"gguf-{model.identity['gguf'][:16]}"
        return own if is_sealed(own) else cache() / "models" / own.name
    if model.kind == "merged":
        return converted / f"merged-{model.identity['fingerprint'][:16]}"
    if model.kind == "hub":
        return hub.download(model.reference, model.identity["revision"], weights=weights)
    assert model.folder is not None
    return model.folder


def _named(reference: str, run: Path) -> Artifact | None:
    """The artifact that a reference names, whatever state it is in."""
    if reference.startswith(ARTIFACT):
        return Artifact(run / reference.removeprefix(ARTIFACT).partition("@")[0])
    path = expanded(reference)
    return Artifact(path) if is_local(reference) and is_artifact(path) else None


def _trained_on(artifact: Artifact) -> Artifact | None:
    """The artifact of the same run that is this one's base."""
    try:
        base = artifact.manifest().base if artifact.finished else None
    except UserError:
        return None  # damaged: to be said when it is used
    if base is None or not base.reference.startswith(ARTIFACT):
        return None
    return _named(base.reference, artifact.run)


def _instead(reference: str) -> str:
    """What to do about a path at which nothing lies."""
    if Path(reference).name == SHIPPED:
        return "in a checkout of llmpipe, `make models` fetches it"
    if near_it := nearest_here(reference):
        return f"did you mean {near_it}?"
    return "a local path is looked up from the current folder"


def _of_file(path: Path, reference: str, use: Use) -> Model:
    if path.suffix != ".gguf":
        problem = f"{use.field}: {reference}: a single file must be .gguf"
        raise UserError(problem, "give the folder of the model instead")
    before = stamp(path)
    identity = {} if use.glance else {"gguf": sha256_file(path)}
    return Model("gguf", reference, identity, path, stamp=before)


def _of_folder(path: Path, reference: str, use: Use) -> Model:
    if made := _models_in(path):
        problem = f"{use.field}: {reference}: is a run, not a model"
        raise UserError(problem, f"name an artifact of it: {', '.join(made)}")
    before = stamp(path)
    check_folder(path, weights=use.field != "tokenizer")
    if (path / "adapter_config.json").exists():
        problem = f"{use.field}: {reference}: an adapter whose base no manifest names"
        raise UserError(problem, "merge it into its base first", INTEGRITY)
    identity = {} if use.glance else {"files": digest(table(path))}
    return Model("folder", reference, identity, path, stamp=before)


def _is_unfinished(path: Path) -> bool:
    """Whether a folder is that of an artifact to be."""
    return (path / "recipe.yaml").is_file() and not (path / "config.json").exists()


def _models_in(path: Path) -> list[str]:
    """The paths of the artifacts in a folder that is a run, and no model."""
    if (path / "config.json").exists() or (path / "adapter_config.json").exists():
        return []
    return [str(artifact.path) for artifact in artifacts(path) if artifact.model.exists()]


def _of_hub(reference: str, use: Use, pinned: Identity | None) -> Model:
    if pinned and pinned.get("hub") == reference:
        return Model("hub", reference, pinned, None)
    if use.glance:
        return Model("hub", reference, {}, None)
    snapshot = hub.snapshot_of(reference, use.field)
    identity = {"hub": reference, "revision": snapshot.commit}
    return Model("hub", reference, identity, snapshot.folder)


def _of_checkpoint(parent: Artifact, step: str, reference: str, use: Use) -> Model:
    checkpoint = checkpoints.folder(parent.checkpoints, int(step))
    if not checkpoint.exists():
        steps = ", ".join(sorted(map(str, parent.steps))) or "none"
        raise UserError(f"{use.field}: {reference}: no such checkpoint; there are: {steps}")
    before = stamp(checkpoint)
    problems = [] if use.glance else checkpoints.verify(checkpoint)
    sums = checkpoints.Sums.read(checkpoint)
    if problems or sums is None:
        problem = problems[0] if problems else f"{SUMS}: damaged or missing"
        raise UserError(f"{checkpoint}/{problem}", "take another checkpoint", INTEGRITY)
    if (checkpoint / "adapter_config.json").exists():
        problem = f"{use.field}: {reference} is a checkpoint of an adapter"
        raise UserError(problem, f"take {ARTIFACT}{parent.name}", INTEGRITY)
    if (checkpoint / checkpoints.SHARDED).exists():
        problem = f"{use.field}: {reference} is a checkpoint in parts (launch.strategy: fsdp, zero)"
        raise UserError(problem, f"take {ARTIFACT}{parent.name}", INTEGRITY)
    use.check(reference, "reward-model" if is_reward_model(checkpoint) else "model")
    fingerprint = digest(sums.files)
    identity = {"artifact": parent.name, "checkpoint": int(step), "fingerprint": fingerprint}
    parents = [Parent(f"{parent.name}@{step}", fingerprint)]
    return Model("artifact", reference, identity, checkpoint, parents, stamp=before)


def _of_artifact(parent: Artifact, reference: str, use: Use) -> Model:
    if not parent.finished:
        state = " is not finished" if parent.path.exists() else ": no such artifact in this run"
        hint = f"make it first; it would lie in {parent.path}"
        raise UserError(f"{use.field}: {reference}{state}", hint)
    before = stamp(parent.model) if parent.model.exists() else None
    manifest = parent.manifest() if use.glance else parent.verify()
    use.check(reference, manifest.kind)
    identity: Identity = {"artifact": parent.name, "fingerprint": manifest.fingerprint}
    parents = [Parent(parent.name, manifest.fingerprint)]
    # a reward model may be an adapter, too
    if not (parent.model / "adapter_config.json").exists():
        return Model("artifact", reference, identity, parent.model, parents, stamp=before)
    if manifest.base is None or manifest.kind == "model":
        lacks = "base: is missing" if manifest.base is None else "kind: is model"
        problem = f"{parent.path / MANIFEST}: {lacks}, and model/ holds an adapter"
        raise UserError(problem, "make the artifact again", INTEGRITY)
    base = base_of(parent, manifest.base, use)
    if use.keep:
        return Model("artifact", reference, identity, parent.model, parents, base, before)
    identity["merged"] = True
    return Model("merged", reference, identity, parent.model, parents, base, before)


def ways_to(adapter: Artifact, base: Base) -> list[str]:
    """References by which an adapter's base may be meant here, the likeliest last.

    One that names a path in full, or no more than its name, leads nowhere once things were moved,
    and one from the current folder leads nowhere from another: then the base is looked for where it
    was, seen from the adapter, beside the run, and where this machine saw it last. Not in that last
    place where something lies where it was: who changed it there has to know.
    """
    reference = base.reference
    if base.kind == "hub" or not is_local(reference):
        return [reference]
    places = [str(_beside(adapter, reference))]
    if base.folder and base.kind in ("folder", "artifact"):
        folder = Path(os.path.normpath(adapter.path / base.folder))
        places.append(str(folder.parent if base.kind == "artifact" else folder))
    if not os.path.exists(places[-1]) and (seen := noted(base.identity)):
        places.insert(0, seen)
    ways = [os.path.abspath(place) for place in places if place and os.path.exists(place)]
    leads = not reference.startswith(ELSEWHERE)
    moved = not os.path.exists(expanded(reference))
    return [*ways, reference] if leads and not (ways and moved) else ways


def _beside(adapter: Artifact, reference: str) -> Path:
    """Where a base is put that was not found."""
    return adapter.run.parent / os.path.basename(reference.rstrip("/"))


def _names_another_kind(base: Base) -> bool:
    """Whether a base is a folder and its reference a GGUF file's, or the other way round."""
    named = base.reference.endswith(".gguf")
    if base.kind == "gguf":
        return not named
    return base.kind == "folder" and named and not (base.folder or "").endswith(".gguf")


def base_of(adapter: Artifact, trained_on: Base, use: Use) -> Model:
    """The very model that an adapter was trained on.

    Raises UserError (3) when another one lies in its place.
    """
    if use.below >= LONGEST_CHAIN:
        problem = f"{adapter.path / MANIFEST}: base: more than {LONGEST_CHAIN} adapters"
        hint = "none can be trained on itself; make the artifacts again"
        raise UserError(f"{problem} on one another, or a circle of them", hint, INTEGRITY)
    field = use.field if use.below else f"{use.field}: base of {adapter.name}"
    keep = trained_on.kind != "merged"
    base_use = Use(field, TRAINED, keep, use.glance, use.below + 1)
    reference = portable(trained_on.reference)
    if _names_another_kind(trained_on):
        problem = f"{adapter.path / MANIFEST}: base: a {trained_on.kind} is not called {reference}"
        raise UserError(problem, "make the artifact again", INTEGRITY)
    ways = ways_to(adapter, trained_on)
    if not ways and trained_on.kind == "gguf":
        read_already = Model("gguf", reference, trained_on.identity, None)
        if is_sealed(model_folder(read_already, adapter.run / ".prepared")):
            return read_already
    if not ways:
        beside = _beside(adapter, reference)
        problem = f"{field}: {reference}: lies neither where it was nor at {beside}"
        hint = "put it there, or a link to it; its content says whether it is the right one"
        raise UserError(problem, hint, INTEGRITY)
    for way in reversed(ways):
        base = resolve(way, base_use, adapter.run, trained_on.identity)
        if use.glance or base.identity == trained_on.identity:
            return replace(base, reference=reference)
    problem = f"its base {reference} is not the one it was trained on:"
    lines = [f"{adapter.path}: {problem}"]
    for name, before, after in changes(trained_on.identity, base.identity):
        lines.append(f"  {name}: {short(before)} in training, {short(after)} now")
    hint = "put the old base back; an adapter is of no use on another one"
    raise UserError("\n".join(lines), hint, INTEGRITY)
