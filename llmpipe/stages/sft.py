"""`llmpipe sft`: supervised fine-tuning.

Learn to answer from examples, loss on the assistant's turns.

Inputs: a causal language model and rows (text, alpaca, sharegpt, messages or prompt-completion).
Makes: a `model`. The story is `train`, top to bottom; the trainer underneath is TRL's SFTTrainer on
rows that llmpipe prepared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from llmpipe.recipe.sections import Data, Generating, Optim, Start
from llmpipe.recipe.trainer import TrainerConfig
from llmpipe.stages import CHECKPOINTS

if TYPE_CHECKING:  # they read the whole of a run, which checking a recipe does not need
    from llmpipe.data.prepared import PreparedRows
    from llmpipe.run.job import Job
    from llmpipe.run.made import Made

ACCEPTS = ("model", "adapter")
MAKES = "model"  # or an adapter, with `adapter:`
PROGRESS = CHECKPOINTS

TRAINER = TrainerConfig(
    package="trl",
    module="trainer.sft_config",
    name="SFTConfig",
    owned={
        "activation_checkpointing": "launch.activation_checkpointing",
        "max_length": "data.max_length",
        "packing": "data.packing",
        "packing_strategy": "data.packing",
        "eval_packing": "data.packing",
        "padding_free": "data.packing",
        "truncation_mode": "data.max_length",
        "chat_template_path": "data.template",
        "assistant_only_loss": "data.loss",
        "completion_only_loss": "data.loss",
        "dataset_text_field": "data.train.N.columns",
        "shuffle_dataset": "data",
        "eos_token": "data.template",
    },
)


class Supervised(Generating):
    """The recipe of `sft`, and of the stages that narrow it."""

    trainer_config: ClassVar[TrainerConfig] = TRAINER

    model: Start
    data: Data
    """Rows and how they become tokens."""
    optim: Optim
    """The optimizer and its schedule."""


class Schema(Supervised):
    stage: Literal["sft"] = "sft"
    """Supervised fine-tuning."""


def shapes(recipe: Supervised) -> dict[str, tuple[type, ...]]:
    from llmpipe.data.kinds.rows import ROWS

    return dict.fromkeys(recipe.rows(), ROWS.shapes)


def prepare(job: Job[Supervised]) -> PreparedRows:
    """Texts and conversations -> tokens."""
    from llmpipe.data.kinds.rows import ROWS
    from llmpipe.run.handoff import tokens

    return tokens(job, ROWS)


def train(job: Job[Supervised], prepared: PreparedRows) -> Made:
    """Train, publish `model/` and return what the manifest says of it."""
    from llmpipe.data.kinds.rows import ROWS
    from llmpipe.models.load import load_policy, set_up
    from llmpipe.training.conclude import conclude
    from llmpipe.training.samples import answer_samples
    from llmpipe.training.supervised import supervised_trainer
    from llmpipe.training.training import Training

    setup = set_up(job, prepared)
    training = Training(setup, ROWS, load_policy(setup))
    trainer = supervised_trainer(training)
    answer_samples(trainer, setup.tokenizer, "before")
    final = trainer.fit()
    answer_samples(trainer, setup.tokenizer, "after")
    return conclude(trainer, training, final)
