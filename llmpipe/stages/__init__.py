"""One light file per stage: its recipe and its story. `STAGES` is the one table of them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llmpipe.errors import INTEGRITY, UserError

if TYPE_CHECKING:
    from llmpipe.recipe import Recipe
    from llmpipe.rundir import Artifact

STAGES = {
    "pretrain": "pretraining: from raw text to a model",
    "sft": "supervised fine-tuning: learn to answer from examples",
    "lora": "sft of a low-rank adapter on a frozen model",
    "qlora": "sft of an adapter on a model held in 4 or 8 bits",
    "reward": "reward modelling: learn which of two answers people prefer",
    "ppo": "proximal policy optimization: answer so that a reward is high",
    "dpo": "direct preference optimization: answer as people prefer",
    "eval": "evaluation: measure models on the same items, with intervals",
}

CHECKPOINTS = "checkpoints/step-*"  # what an unfinished artifact of a stage that trains goes on from


@dataclass
class Job:
    """One artifact being made: what a stage's `prepare` and `train` are given."""

    artifact: Artifact
    recipe: Recipe
    models: dict[str, Path]
    """Folders of the models that the recipe names, as safetensors and JSON, by the path of the field."""
    bases: dict[str, Path]
    """Folders of the bases of those that are adapters."""
    plan: dict[str, Any]
    """plan.json: what was asked, its identity and the models."""
    say: Callable[[str], None]
    """Prints a line and keeps it in log.txt."""
    signals: Any
    """`launch.Signals`: whether a stop was asked for."""
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


def stage(name: str) -> ModuleType:
    """The module of a stage: `Schema`; `ACCEPTS` and `MAKES`, artifact kinds; `PROGRESS`, a glob of what an unfinished
    artifact goes on from; `prepare(job)` and `train(job, prepared)`; where it has one, `judge(recipe, artifact)`."""
    if name not in STAGES:
        match = difflib.get_close_matches(str(name), STAGES, n=1)
        hint = f"; did you mean '{match[0]}'?" if match else ""
        raise UserError(f"stage: '{name}' is not a stage{hint}", f"there are: {', '.join(STAGES)}")
    return importlib.import_module(f"llmpipe.stages.{name}")


def schema(name: str) -> type[Recipe]:
    """The recipe class of a stage."""
    return stage(name).Schema


def tokens(job: Job) -> dict[str, Any]:
    """Rows -> tokens, the `prepare` of most stages that train; what the trainer and the manifest need to know."""
    from llmpipe import rundir

    recipe = job.recipe
    also = rundir.Artifact(job.artifact.run / f"{job.artifact.name}-merged")
    merges = recipe.adapter is not None and recipe.adapter.merge
    if merges and also.finished and also.manifest()["identity"] != job.plan["identity"]:
        raise UserError(f"{also.path}: is not of this adapter", "move it away, or set `name:`", INTEGRITY)
    prepared = tokenized(job, recipe.data)
    _same_template(job, prepared)
    return prepared


def tokenized(job: Job, data: Any) -> dict[str, Any]:
    """Prepare one section of rows: its folder's name as `data`, and what is known of them."""
    from llmpipe import rundir
    from llmpipe.data.prepare import prepare as tokenize

    pinned = job.plan["asked"]["content"]
    folder = tokenize(data, job.model, job.prepared, seed=job.recipe.seed, say=job.say, pinned=pinned)
    return {"data": folder.name, **rundir.read_json(folder / "prepared.json")}


def _same_template(job: Job, prepared: dict[str, Any]) -> None:
    """Refuse another chat template than the one that the parent was trained with (3), hand-off contract, rule 2."""
    from llmpipe import rundir

    start = job.plan["models"]["model"]
    if start["kind"] not in ("artifact", "merged"):
        return
    folder = Path(start["folder"]).expanduser()
    home = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    parent = rundir.read_json(home / rundir.MANIFEST)
    if not parent or parent["stage"] == "pretrain" or not parent["tokenizer"]["template"]:
        return  # nothing was learned with a template yet
    named = f"{'' if folder.is_absolute() else './'}{folder}"
    on_purpose = "merge it (adapter.merge: true), and name the folder of that" if "base" in start else f"model: {named}"
    asked = parent["asked"]["recipe"].get("data", {}).get("chat_template_kwargs", {})
    for field, there, here in (
        ("template", parent["tokenizer"]["template"][:12], (prepared["template"] or "none")[:12]),
        ("chat_template_kwargs", asked, job.recipe.data.chat_template_kwargs),
    ):
        if there != here:
            raise UserError(
                f"data.{field}: {start['reference']} was trained with {there}, and here it is {here}",
                f"set it as there, or, to teach another on purpose, {on_purpose}",
                INTEGRITY,
            )
