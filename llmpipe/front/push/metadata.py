"""The metadata that a card begins with, which the Hub reads: licence, base, data sets, tags, and
`model-index` with every number as the evaluation's file has it
(https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmpipe.front.push.facts import GGUF, Facts
from llmpipe.front.push.measured import Measured, asked_in_training
from llmpipe.report.measures import measure
from llmpipe.run.results import Cell

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def metadata(facts: Facts) -> str:
    """The YAML that a card begins with, less its rules."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        **facts.licences.model.metadata,
        library_name=_library(facts),
        pipeline_tag="text-classification" if facts.scores else "text-generation",
        **_base(facts),
        datasets=list(dict.fromkeys(one.path for one in facts.rows if one.is_of_hub)) or None,
        tags=list(dict.fromkeys(_tags(facts))),
        model_name=facts.name,
        eval_results=list(_eval_results(facts)) or None,
    )
    if data.eval_results is None:
        data.pop("model_name")
    text: str = data.to_yaml()
    return text


def _library(facts: Facts) -> str:
    if facts.adapter:
        return "peft"
    is_gguf = facts.export and facts.export.kind == GGUF
    return "llama.cpp" if is_gguf else "transformers"


def _tags(facts: Facts) -> Iterator[str]:
    yield "llmpipe"
    yield from (one.manifest.stage for one in facts.ancestry.made)
    if facts.export:
        yield from facts.export.packages
        yield from [GGUF] if facts.export.kind == GGUF else []
    if facts.template and not facts.scores:
        yield "conversational"


def _base(facts: Facts) -> dict[str, Any]:
    """`base_model`, and what this is of it.

    `quantized` is what has the numbers of a model of the Hub in other ones, `merge` what was made
    of several; what was trained is `finetune`, whatever its numbers, where the Hub has not the very
    model that they were made of.
    """
    if facts.adapter:
        return {"base_model": facts.adapter.base.name, "base_model_relation": "adapter"}
    source = facts.export.source if facts.export else []
    if len(source) > 1:
        names = [one.name for one in source]
        return {"base_model": names, "base_model_relation": "merge"}
    if source:
        return {"base_model": source[0].name, "base_model_relation": "quantized"}
    if base := facts.base_on_hub:
        return {"base_model": base.name, "base_model_relation": "finetune"}
    return {}


def _eval_results(facts: Facts) -> Iterator[EvalResult]:
    """Every finite number of the artifact, as its evaluation's file has it.

    None of an export, which is not what was measured; but an adapter is the same one there.
    """
    from huggingface_hub import EvalResult

    if facts.export and not facts.adapter:
        return
    for one in facts.measured:
        for name, task in one.results.tasks.items():
            for metric, cells in task.metrics.items():
                cell = cells.get(one.label)
                if cell is None or not math.isfinite(cell.value):
                    continue
                yield EvalResult(
                    task_type="text-classification" if facts.scores else "text-generation",
                    task_name=task.task,
                    metric_type=metric,
                    metric_name=f"{measure(metric).title} ({one.name})",
                    metric_value=cell.value,
                    metric_args=_bounds(cell, asked_in_training(task, facts.ancestry)),
                    **_dataset(one, name),
                )


def _bounds(cell: Cell, seen: int) -> dict[str, Any]:
    """The interval, the items, and how many of these were asked in training."""
    interval = {"low": cell.low, "high": cell.high} if cell.has_interval else {}
    return interval | {"n": cell.n} | ({"asked_in_training": seen} if seen else {})


def _dataset(one: Measured, task: str) -> dict[str, Any]:
    """What a number was measured on, as `EvalResult` calls it.

    `dataset_type` is a name on the Hub; rows from elsewhere have one that is none, and of their
    own, since the Hub keeps together what has the same.
    """
    rows = one.rows.get(task, [])
    sums = {name: sha256 for source in rows for name, sha256 in source.files}
    of_hub = next((source for source in rows if source.is_of_hub), None)
    values: dict[str, Any] = {
        "dataset_name": task,
        "dataset_type": of_hub.path if of_hub else f"llmpipe-{one.name}-{task}",
        "dataset_revision": of_hub.revision if of_hub else None,
    }
    if sums:
        values["dataset_args"] = {"sha256": sums}
    return values
