"""`llmpipe kto`: learn from responses that were judged good or bad, one by one (Ethayarajh 2024).

Inputs: a policy, mostly what `sft` or `lora` made, and rows with a prompt, a response and a column
`label`; pairs of preferences are taken apart. Makes: a `model`, or an adapter. The reference is the
parent, never the untuned base: a frozen copy, the parent with the new adapter off, or the parent's
own adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from llmpipe.recipe.sections import Generating, Length, Optim, Start, Templated
from llmpipe.recipe.trainer import TrainerConfig
from llmpipe.stages import CHECKPOINTS

if TYPE_CHECKING:
    from datasets import Dataset

    from llmpipe.data.prepared import PreparedRows
    from llmpipe.run.job import Job
    from llmpipe.run.made import Made

ACCEPTS = ("model", "adapter")
MAKES = "model"  # or an adapter, with `adapter:`
PROGRESS = CHECKPOINTS

Weight = Annotated[float, Field(gt=0)]

TRAINER = TrainerConfig(
    package="trl",
    module="trainer.kto_config",
    name="KTOConfig",
    owned={
        "activation_checkpointing": "launch.activation_checkpointing",
        "max_length": "data.max_length",
        "beta": "beta",
        "loss_type": "objective",
        "desirable_weight": "desirable_weight",
        "undesirable_weight": "undesirable_weight",
        "precompute_ref_log_probs": None,
        "precompute_ref_batch_size": None,
        "sync_ref_model": None,
        "ref_model_mixup_alpha": None,
        "ref_model_sync_steps": None,
        "pad_to_multiple_of": None,
        "disable_dropout": "adapter.dropout",
    },
)


class Judged(Templated):
    """Responses, each with a column `label`: true or false, 1 or 0. A preference is two of them."""

    max_length: Length = 1024
    """Longest prompt with its response, in tokens; a longer response is cut there (counted as
    truncated), and a row whose prompt leaves no room is rejected."""


class Schema(Generating):
    trainer_config: ClassVar[TrainerConfig] = TRAINER

    stage: Literal["kto"] = "kto"
    """Kahneman-Tversky optimization."""
    model: Start
    data: Judged
    """Judged responses."""
    optim: Optim
    """The optimizer and its schedule."""
    objective: Literal["kto", "apo_zero_unpaired"] = "kto"
    """TRL's loss by name; kto estimates how far the policy is from the reference from the rows of a
    step, and takes steps of eight rows or more to do it well."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the policy is held to the reference."""
    desirable_weight: Weight = 1.0
    """What a good response counts. Where there are fewer good rows than bad ones, raise it until
    weight times rows are about equal (eq. 8 of the paper)."""
    undesirable_weight: Weight = 1.0
    """What a bad response counts."""

    @model_validator(mode="after")
    def _reference(self) -> Schema:
        if self.adapter and self.adapter.rewrites:
            raise ValueError(
                f"adapter.init: {self.adapter.init} rewrites the model, which is the reference"
            )
        if self.objective == "kto" and 1 in (self.launch.micro_batch_size, self.optim.batch_size):
            raise ValueError("objective: kto needs two rows or more in a pass; see launch")
        return self

    @property
    def least_micro_batch(self) -> int:
        return 2 if self.objective == "kto" else 1


def shapes(recipe: Schema) -> dict[str, tuple[type, ...]]:
    from llmpipe.data.kinds.labels import LABELS

    return dict.fromkeys(recipe.rows(), LABELS.shapes)


def prepare(job: Job[Schema]) -> PreparedRows:
    """Judged responses -> tokens."""
    from llmpipe.data.kinds.labels import LABELS
    from llmpipe.run.handoff import tokens

    return tokens(job, LABELS)


def train(job: Job[Schema], prepared: PreparedRows) -> Made:
    """Train, publish `model/` and return what the manifest says of it."""
    from trl import KTOConfig

    from llmpipe.data.kinds.labels import LABELS
    from llmpipe.models.load import load_policy, set_up
    from llmpipe.training import reference
    from llmpipe.training.arguments import arguments
    from llmpipe.training.conclude import conclude
    from llmpipe.training.judged import Collator, JudgedTrainer, judgement
    from llmpipe.training.samples import answer_samples
    from llmpipe.training.training import Training

    recipe, say = job.recipe, job.say
    setup = set_up(job, prepared)
    training = Training(setup, LABELS, load_policy(setup))
    say(f"labels: {_balance(training.train_rows(), recipe)}")
    configuration = arguments(
        KTOConfig,
        training,
        max_length=None,
        beta=recipe.beta,
        loss_type=recipe.objective,
        desirable_weight=recipe.desirable_weight,
        undesirable_weight=recipe.undesirable_weight,
        disable_dropout=True,
    )
    trainer = JudgedTrainer(
        training,
        judgement,
        args=configuration,
        data_collator=Collator(setup.tokenizer.pad_token_id, recipe.data.max_length),
        train_dataset=training.train_rows(),
        eval_dataset=training.eval_rows(),
        ref_model=reference.copied(setup, precompute=False),
    )
    say(f"reference: {trainer.begin_reference()}")

    before = trainer.reference_hash()
    answer_samples(trainer, setup.tokenizer, "before")
    final = trainer.fit()
    trainer.refuse_changed_reference(before)
    trainer.forget_reference()
    final["reference"] = before
    answer_samples(trainer, setup.tokenizer, "after")
    return conclude(trainer, training, final)


def _balance(rows: Dataset, recipe: Schema) -> str:
    """How many rows of either label there are, and a remark where one outweighs the other."""
    good = sum(rows["label"])
    bad = len(rows) - good
    counts = f"{good:,} good, {bad:,} bad"
    if not good or not bad:
        return f"{counts}: with one label alone there is nothing to tell apart"
    ratio = recipe.desirable_weight * good / (recipe.undesirable_weight * bad)
    if 0.75 <= ratio <= 4 / 3:
        return counts
    return f"{counts}; weighted {ratio:.2f} to 1, and KTO is made for 3/4 to 4/3 (eq. 8)"
