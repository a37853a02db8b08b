"""Rows for a stage, and that they fit what its model was trained with."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmpipe.data.prepared import PreparedRows
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.recipe.reinforcement import Scored
from llmpipe.recipe.sections import Prepared, Source, Training
from llmpipe.run.artifact import Artifact
from llmpipe.run.job import Job
from llmpipe.run.manifest import Manifest
from llmpipe.run.reference import Model

if TYPE_CHECKING:
    from llmpipe.data.kinds import Kind


def tokens(job: Job[Any], kind: Kind, asked: Asked | None = None) -> PreparedRows:
    """Rows -> tokens of a kind, the `prepare` of most stages; those of `data`, unless
    they are `asked`.

    Raises UserError (3) when they do not fit what the model was trained with, and what `prepare` of
    the data raises.
    """
    if isinstance(job.recipe, Training):
        _refuse_anothers_merge(job)
    prepared = tokenized(job, job.recipe.data, kind, asked)
    refuse_another_template(job, prepared)
    return prepared


class Asked(NamedTuple):
    """Rows that the command itself has made."""

    source: Source
    sha256: str


def tokenized(
    job: Job[Any], data: Prepared, kind: Kind, asked: Asked | None = None
) -> PreparedRows:
    """Prepare one section of rows."""
    from llmpipe.data.prepare import prepare

    pinned = job.plan.content
    if asked:
        data = data.model_copy(update={"train": [asked.source]})
        pinned = pinned | {f"data.train:{asked.source.path}": asked.sha256}
    return prepare(
        data,
        kind,
        job.model,
        job.prepared,
        seed=job.recipe.seed,
        say=job.say,
        pinned=pinned,
    )


def refuse_another_template(job: Job[Any], prepared: PreparedRows) -> None:
    """Refuse another chat template than the parent's (hand-off contract, rule 2).

    Raises UserError (3).
    """
    start = job.plan.models["model"]
    parent = _manifest_of(start)
    if parent is None or parent.stage == "pretrain":
        return
    if parent.tokenizer is None or not parent.tokenizer.template:
        return  # nothing was learned with a template yet
    trained, now = parent.tokenizer.template[:12], (prepared.template or "none")[:12]
    if trained != now and not _opens_thought(job, start, prepared):
        raise _differs("template", start, trained, now)
    kwargs = job.recipe.data.preparation.template_kwargs
    if parent.asked.chat_template_kwargs != kwargs:
        raise _differs("chat_template_kwargs", start, parent.asked.chat_template_kwargs, kwargs)


def _opens_thought(job: Job[Any], start: Model, prepared: PreparedRows) -> bool:
    """Whether the template is the parent's and `rollout.think` beside it, and nothing else."""
    from llmpipe.data.template import thinking
    from llmpipe.data.tokenizer import Tokenizer

    recipe = job.recipe
    if not isinstance(recipe, Scored) or not recipe.rollout.think or start.folder is None:
        return False
    learned = Tokenizer(start.folder)
    if learned.template is None:
        return False
    text = thinking(learned.template, learned.special, recipe.data.chat_template_kwargs)
    return prepared.template == sha256(text.encode()).hexdigest()


def _refuse_anothers_merge(job: Job[Training]) -> None:
    """Raises UserError (3) where the merged model would replace that of another adapter."""
    adapter = job.recipe.adapter
    if adapter is None or not adapter.merge:
        return
    merged = job.artifact.merged
    if merged.finished and merged.manifest().identity != job.plan.identity:
        hint = "move it away, or set `name:`"
        raise UserError(f"{merged.path}: is not of this adapter", hint, INTEGRITY)


def _manifest_of(model: Model) -> Manifest | None:
    """The manifest of the artifact that a model is of, where there is one and it is finished."""
    if model.kind not in ("artifact", "merged"):
        return None
    assert model.folder is not None
    checkpoint = model.folder.parent.name == "checkpoints"
    artifact = Artifact(model.folder.parent.parent if checkpoint else model.folder.parent)
    return artifact.manifest() if artifact.finished else None


def _differs(field: str, start: Model, trained: object, now: object) -> UserError:
    on_purpose = f"model: {_as_path(start.folder)}"
    if start.base:
        on_purpose = "merge it (adapter.merge: true), and name the folder of that"
    return UserError(
        f"data.{field}: {start.reference} was trained with {trained}, and here it is {now}",
        f"set it as there, or, to teach another on purpose, {on_purpose}",
        INTEGRITY,
    )


def _as_path(folder: Path | None) -> str:
    """As a recipe names a folder."""
    return str(folder) if folder and folder.is_absolute() else f"./{folder}"
