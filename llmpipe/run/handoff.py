"""Rows for a stage, and that they fit what its model was trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmpipe.data.prepared import PreparedRows
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.recipe.sections import Prepared
from llmpipe.run.job import Job

if TYPE_CHECKING:
    from llmpipe.data.kinds import Kind


def tokens(job: Job, kind: Kind) -> PreparedRows:
    """Rows -> tokens of a kind, the `prepare` of most stages that train.

    Returns what the trainer and the manifest need to know.
    """
    from llmpipe.run.artifact import Artifact

    recipe = job.recipe
    also = Artifact(job.artifact.run / f"{job.artifact.name}-merged")
    merges = recipe.adapter is not None and recipe.adapter.merge
    if merges and also.finished and also.manifest()["identity"] != job.plan.identity:
        raise UserError(
            f"{also.path}: is not of this adapter", "move it away, or set `name:`", INTEGRITY
        )
    prepared = tokenized(job, recipe.data, kind)
    _same_template(job, prepared)
    return prepared


def tokenized(job: Job, data: Prepared, kind: Kind) -> PreparedRows:
    """Prepare one section of rows."""
    from llmpipe.data.prepare import prepare as tokenize

    return tokenize(
        data,
        kind,
        job.model,
        job.prepared,
        seed=job.recipe.seed,
        say=job.say,
        pinned=job.plan.content,
    )


def _same_template(job: Job, prepared: PreparedRows) -> None:
    """Refuse another chat template than the one that the parent was trained with (3), hand-off contract, rule 2."""
    from llmpipe.files import read_json
    from llmpipe.run.artifact import MANIFEST

    start = job.plan.models["model"]
    if start.kind not in ("artifact", "merged"):
        return
    folder = start.folder
    assert folder is not None
    home = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    parent = read_json(home / MANIFEST)
    if not parent or parent["stage"] == "pretrain" or not parent["tokenizer"]["template"]:
        return  # nothing was learned with a template yet
    named = f"{'' if folder.is_absolute() else './'}{folder}"
    on_purpose = (
        "merge it (adapter.merge: true), and name the folder of that"
        if start.base
        else f"model: {named}"
    )
    asked = parent["asked"]["recipe"].get("data", {}).get("chat_template_kwargs", {})
    for field, there, here in (
        ("template", parent["tokenizer"]["template"][:12], (prepared.template or "none")[:12]),
        ("chat_template_kwargs", asked, job.recipe.data.preparation.template_kwargs),
    ):
        if there != here:
            raise UserError(
                f"data.{field}: {start.reference} was trained with {there}, and here it is {here}",
                f"set it as there, or, to teach another on purpose, {on_purpose}",
                INTEGRITY,
            )
