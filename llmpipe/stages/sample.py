"""`llmpipe sample`: rows to learn from, made of what a model itself answers.

Inputs: a model, mostly what `sft` or `lora` made, prompts, and one or several rewards, as for
`ppo`. Makes: a `dataset`. Every prompt is answered several times, every answer scored; the best
against the worst is a preference for `dpo` (on-policy DPO), the best alone an answer for `sft`
(rejection sampling). Other stages read it as `path: artifact:sample`.

    samples.jsonl    every prompt with all of its answers, scores and what became of them
    rows.jsonl       what is learned from
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmpipe.errors import UserError
from llmpipe.recipe.sample import SampleRecipe
from llmpipe.stages import ppo

if TYPE_CHECKING:  # they read the whole of a run, which checking a recipe does not need
    from llmpipe.data.prepared import PreparedRows
    from llmpipe.run.job import Job
    from llmpipe.run.made import Made

ACCEPTS = ppo.ACCEPTS
MAKES = "dataset"
PROGRESS = "samples.jsonl"

foresee = ppo.foresee
shapes = ppo.shapes


class Schema(SampleRecipe):
    stage: Literal["sample"] = "sample"
    """Answers of a model, as rows to learn from."""


def prepare(job: Job[Schema]) -> PreparedRows:
    """Prompts -> tokens. Raises UserError (2) where the template needs tokens that the model has
    never seen."""
    prepared = ppo.prompts(job)
    if prepared.added_tokens:
        added = ", ".join(prepared.added_tokens)
        problem = f"data.template: it needs {added}, which the model has not, and would answer at"
        raise UserError(f"{problem} random", "sft first, which teaches and publishes them")
    return prepared


def train(job: Job[Schema], prepared: PreparedRows) -> Made:
    """Draw, score, and write what is made of it; returns what the manifest says of that."""
    from llmpipe.rl import sample

    return sample.train(job, prepared)
