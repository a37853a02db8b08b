"""`llmpipe dpo`: direct preference optimization (Rafailov 2023), and its relatives by name.

Inputs: a policy, mostly what `sft` or `lora` made, and pairs of answers. Makes: a `model`, or an
adapter. The reference is the parent, never the untuned base: a frozen copy, the parent with the new
adapter off, or the parent's own adapter. `simpo` and `orpo` have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmpipe.errors import Mistake, UserError
from llmpipe.recipe.sections import Generating, Optim, Pairs, Start
from llmpipe.recipe.trainer import TrainerConfig
from llmpipe.stages import CHECKPOINTS

if TYPE_CHECKING:  # they read the whole of a run, which checking a recipe does not need
    from llmpipe.data.prepared import PreparedRows
    from llmpipe.models.load import Setup
    from llmpipe.run.job import Job
    from llmpipe.run.made import Made
    from llmpipe.run.outlook import Outlook
    from llmpipe.training.policy import PolicyTrainer
    from llmpipe.training.reference_free import ReferenceFreeTrainer
    from llmpipe.training.training import Training

ACCEPTS = ("model", "adapter")
MAKES = "model"  # or an adapter, with `adapter:`
PROGRESS = CHECKPOINTS
Objective = Literal[
    "sigmoid",
    "ipo",
    "hinge",
    "robust",
    "exo_pair",
    "nca_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "sft",
    "aot",
    "aot_unpaired",
    "bco_pair",
    "simpo",
    "orpo",
]
REFERENCE_FREE = ("simpo", "orpo")
"""Not of TRL's DPOTrainer: `training/reference_free.py`."""
Weight = Annotated[float, Field(gt=0)]

TRAINER = TrainerConfig(
    package="trl",
    module="trainer.dpo_config",
    name="DPOConfig",
    owned={
        "activation_checkpointing": "launch.activation_checkpointing",
        "max_length": "data.max_length",
        "truncation_mode": "data.max_length",
        "padding_free": None,
        "beta": "beta",
        "loss_type": "objective",
        "loss_weights": "objective",
        "label_smoothing": "label_smoothing",
        "precompute_ref_log_probs": "precompute",
        "precompute_ref_batch_size": "precompute",
        "sync_ref_model": None,
        "ref_model_mixup_alpha": None,
        "ref_model_sync_steps": None,
        "pad_to_multiple_of": None,
        "ld_alpha": None,
        "f_divergence_type": None,
        "f_alpha_divergence_coef": None,
        "use_weighting": None,
        "disable_dropout": "adapter.dropout",
    },
)


class Schema(Generating):
    trainer_config: ClassVar[TrainerConfig] = TRAINER

    stage: Literal["dpo"] = "dpo"
    """Direct preference optimization."""
    model: Start
    data: Pairs
    """Preferences."""
    optim: Optim
    """The optimizer and its schedule."""
    objective: Objective | Annotated[dict[Objective, Weight], Field(min_length=1)] = "sigmoid"
    """TRL's loss by name, or several with their weights: `{sigmoid: 1.0, sft: 0.2}`. sft, aot and
    aot_unpaired need whole steps: launch.micro_batch_size as large as optim.batch_size, and one
    process. simpo (Meng 2024) and orpo (Hong 2024) need no reference, and stand alone."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the policy is held to the reference. Of simpo the scale of its reward, to be
    given: 2.0 to 2.5 in its paper, where 0.1 learns next to nothing. Of orpo the weight of the
    odds ratio, called lambda there."""
    gamma: Annotated[float, Field(ge=0)] | None = None
    """By how much the reward of a chosen answer shall exceed that of the rejected one, after beta:
    read by simpo, which needs it; 0.3 to 1.6 in its paper."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs whose answers are taken to be exchanged; read by robust, exo_pair, aot and
    aot_unpaired."""
    precompute: bool = False
    """Compute the reference's log-probabilities once, beforehand: no second model in memory."""

    @model_validator(mode="after")
    def _reference(self) -> Schema:
        if self.adapter and self.adapter.rewrites and self.has_reference:
            raise ValueError(
                f"adapter.init: {self.adapter.init} rewrites the model, which is the reference"
            )
        smoothed = {"robust", "exo_pair", "aot", "aot_unpaired"} & set(self.weights)
        if self.label_smoothing and not smoothed:
            raise ValueError(
                f"label_smoothing: {', '.join(self.weights)} does not read it; robust does"
            )
        if (needs := {"exo_pair", "robust"} & set(self.weights)) and not self.label_smoothing:
            raise ValueError(
                f"objective: {needs.pop()} needs label_smoothing, such as 0.001 (Ji 2024)"
            )
        uneven, launch = self.whole_steps, self.launch
        if uneven and launch.micro_batch_size not in ("auto", self.optim.batch_size):
            raise ValueError(
                f"objective: {uneven[0]} depends on how a step is cut into micro-batches; "
                f"set launch.micro_batch_size: {self.optim.batch_size} and launch.processes: 1"
            )
        return self

    @model_validator(mode="after")
    def _reference_free(self) -> Schema:
        alone = [name for name in REFERENCE_FREE if name in self.weights]
        if "simpo" in alone and (self.gamma is None or "beta" not in self.model_fields_set):
            raise ValueError(
                "objective: simpo needs beta and gamma, such as 2.0 and 1.0 (Meng 2024); the "
                f"default of beta, {self.beta:g}, is made for a reference"
            )
        if self.gamma is not None and "simpo" not in alone:
            raise ValueError(f"gamma: {', '.join(self.weights)} does not read it; simpo does")
        if not alone:
            return self
        if isinstance(self.objective, dict):
            raise ValueError(
                f"objective: {alone[0]} has no reference and is mixed with nothing; "
                f"write `objective: {alone[0]}`"
            )
        if self.precompute:
            raise ValueError(f"precompute: {alone[0]} has no reference to compute")
        if self.adapter and self.adapter.rewrites:
            raise ValueError(
                f"adapter.init: {self.adapter.init} rewrites the model, which TRL's trainer of "
                "pairs would do twice"
            )
        return self

    @property
    def has_reference(self) -> bool:
        return self.objective not in REFERENCE_FREE

    @property
    def whole_steps(self) -> list[str]:
        """Objectives that are no sums over pairs: how a step is cut would change what they mean."""
        return [name for name in self.weights if name in ("sft", "aot", "aot_unpaired")]

    @property
    def is_whole(self) -> bool:
        return bool(self.whole_steps)

    @property
    def weights(self) -> dict[str, float]:
        """The objectives and their weights."""
        if isinstance(self.objective, dict):
            return {str(name): weight for name, weight in self.objective.items()}
        return {self.objective: 1.0}


def foresee(recipe: Schema, outlook: Outlook) -> Iterator[Mistake]:
    """Whether an objective needs whole steps, and this machine would cut them."""
    from llmpipe.run.machine import gpus, micro_batch_size, process_count

    if not outlook.works:
        return
    try:
        size = micro_batch_size(recipe, process_count(recipe), gpus() > 0)
    except UserError:
        return  # which is said of the batch
    try:
        _refuse_micro_batches(recipe, recipe.batch_size // size)
    except UserError as error:
        yield Mistake("objective", error)


def shapes(recipe: Schema) -> dict[str, tuple[type, ...]]:
    from llmpipe.data.kinds.pairs import PAIRS

    return dict.fromkeys(recipe.rows(), PAIRS.shapes)


def prepare(job: Job[Schema]) -> PreparedRows:
    """Preferences -> tokens."""
    from llmpipe.data.kinds.pairs import PAIRS
    from llmpipe.run.handoff import tokens

    return tokens(job, PAIRS)


def train(job: Job[Schema], prepared: PreparedRows) -> Made:
    """Train, publish `model/` and return what the manifest says of it."""
    from llmpipe.data.kinds.pairs import PAIRS
    from llmpipe.models.load import load_policy, set_up
    from llmpipe.training.conclude import conclude
    from llmpipe.training.samples import answer_samples
    from llmpipe.training.training import Training

    setup = set_up(job, prepared)
    _refuse_micro_batches(job.recipe, setup.hardware.accumulation * setup.hardware.processes)
    training = Training(setup, PAIRS, load_policy(setup))
    learn = _against_parent if job.recipe.has_reference else _without_reference
    trainer, final = learn(setup, training)
    answer_samples(trainer, setup.tokenizer, "after")
    return conclude(trainer, training, final)


def _against_parent(
    setup: Setup[Schema], training: Training[Schema]
) -> tuple[PolicyTrainer, dict[str, Any]]:
    """A trainer that has trained, and its last metrics."""
    from trl import DPOConfig

    from llmpipe.run.machine import micro_batch_size
    from llmpipe.training import reference
    from llmpipe.training.arguments import arguments
    from llmpipe.training.policy import Collator, PolicyTrainer, collapse, improvement
    from llmpipe.training.samples import answer_samples

    recipe, hardware, say = setup.recipe, setup.hardware, training.say
    by_rule = micro_batch_size(recipe, hardware.processes, hardware.device == "cuda")
    configuration = arguments(
        DPOConfig,
        training,
        max_length=None,
        beta=recipe.beta,
        loss_type=list(recipe.weights),
        loss_weights=list(recipe.weights.values()),
        label_smoothing=recipe.label_smoothing,
        precompute_ref_log_probs=recipe.precompute,
        precompute_ref_batch_size=by_rule,  # not by memory: they are kept, and read again
        disable_dropout=True,
    )
    trainer = PolicyTrainer(
        training,
        improvement,
        args=configuration,
        data_collator=Collator(setup.tokenizer.pad_token_id),
        train_dataset=training.train_rows(),
        eval_dataset=training.eval_rows(),
        ref_model=reference.copied(setup, precompute=recipe.precompute),
    )
    say(f"reference: {trainer.begin_reference()}")

    before = trainer.reference_hash()
    answer_samples(trainer, setup.tokenizer, "before")
    final = trainer.fit()
    trainer.refuse_changed_reference(before)
    trainer.forget_reference()
    if before:
        final["reference"] = before
    if fallen := collapse(trainer.metrics_log.lines(), recipe.beta):
        say(
            "warning: the log-probability of chosen answers fell from "
            f"{fallen.reference:.1f} to {fallen.policy:.1f}: the policy leaves what it was "
            "taught; raise beta, or lower optim.learning_rate"
        )
    return trainer, final


def _without_reference(
    setup: Setup[Schema], training: Training[Schema]
) -> tuple[ReferenceFreeTrainer, dict[str, Any]]:
    """A trainer that has trained, and its last metrics."""
    from trl import DPOConfig

    from llmpipe.training.arguments import arguments
    from llmpipe.training.policy import Collator
    from llmpipe.training.reference_free import (
        ORPO,
        ReferenceFreeTrainer,
        SimPO,
        decline,
        separation,
    )
    from llmpipe.training.samples import answer_samples

    recipe, say = setup.recipe, training.say
    trainer = ReferenceFreeTrainer(
        training,
        separation,
        objective=ORPO(recipe.beta) if recipe.gamma is None else SimPO(recipe.beta, recipe.gamma),
        args=arguments(
            DPOConfig,
            training,
            max_length=None,
            beta=recipe.beta,
            precompute_ref_log_probs=True,  # so that TRL takes no second model; none is computed
            disable_dropout=True,
        ),
        data_collator=Collator(setup.tokenizer.pad_token_id),
        train_dataset=training.train_rows(),
        eval_dataset=training.eval_rows(),
    )
    say(f"reference: none, {recipe.objective} compares what the policy itself finds likely")

    answer_samples(trainer, setup.tokenizer, "before")
    final = trainer.fit()
    if fallen := decline(trainer.metrics_log.lines()):
        say(
            "warning: the log-probability of chosen answers fell from "
            f"{fallen.before:.2f} to {fallen.after:.2f} per token: the policy leaves what it was "
            "taught; lower optim.learning_rate, or beta"
        )
    return trainer, final


def _refuse_micro_batches(recipe: Schema, parts: int) -> None:
    """Some objectives are no sum over pairs: what they mean depends on how a step is cut."""
    uneven = recipe.whole_steps
    if uneven and parts > 1:
        raise UserError(
            f"objective: {uneven[0]} depends on how a step is cut into micro-batches",
            f"set launch.micro_batch_size to optim.batch_size ({recipe.batch_size}), "
            "with one process",
        )
