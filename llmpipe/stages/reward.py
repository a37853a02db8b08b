"""`llmpipe reward`: a reward model from preferences.

By Bradley and Terry's model (Christiano 2017; Ouyang 2022).
Inputs: a model, of which everything but the head is taken over, and pairs of answers, of which the
thoughts in front are left out, as `ppo` and `grpo` do. Makes: a `reward-model`, which gives a
conversation one score. An adapter as `model:` is merged into its base first.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from llmpipe.recipe.sections import Hosted, Optim, Pairs, Start
from llmpipe.recipe.trainer import TrainerConfig
from llmpipe.stages import CHECKPOINTS

if TYPE_CHECKING:  # they read the whole of a run, which checking a recipe does not need
    from llmpipe.data.prepared import PreparedRows
    from llmpipe.run.job import Job
    from llmpipe.run.made import Made

ACCEPTS = ("model", "adapter")
MAKES = "reward-model"
PROGRESS = CHECKPOINTS

TRAINER = TrainerConfig(
    package="trl",
    module="trainer.reward_config",
    name="RewardConfig",
    owned={
        "activation_checkpointing": "launch.activation_checkpointing",
        "max_length": "data.max_length",
        "pad_to_multiple_of": None,
        "chat_template_path": "data.template",
        "eos_token": "data.template",
        "center_rewards_coefficient": "center",
        "disable_dropout": "adapter.dropout",
    },
)


class Schema(Hosted):
    trainer_config: ClassVar[TrainerConfig] = TRAINER

    stage: Literal["reward"] = "reward"
    """Reward modelling."""
    model: Start
    data: Pairs
    """Preferences; a column `margin` says by how much the chosen answer is better (Touvron 2023,
    section 3.2.2)."""
    optim: Optim
    """The optimizer and its schedule."""
    center: Annotated[float, Field(ge=0)] = 0.0
    """Pulls the sum of a pair's two scores towards zero by this much (Eisenstein 2023)."""

    @property
    def keeps_adapters(self) -> bool:
        return False


def shapes(recipe: Schema) -> dict[str, tuple[type, ...]]:
    from llmpipe.data.kinds.pairs import JUDGED

    return dict.fromkeys(recipe.rows(), JUDGED.shapes)


def prepare(job: Job[Schema]) -> PreparedRows:
    """Preferences -> tokens."""
    from llmpipe.data.kinds.pairs import JUDGED
    from llmpipe.run.handoff import tokens

    return tokens(job, JUDGED)


def train(job: Job[Schema], prepared: PreparedRows) -> Made:
    """Train, publish `model/` and return what the manifest says of it."""
    from trl import RewardConfig

    from llmpipe.data.kinds.pairs import JUDGED
    from llmpipe.models.load import load_ranker, set_up
    from llmpipe.training.arguments import arguments
    from llmpipe.training.conclude import conclude
    from llmpipe.training.ranking import Collator, RankingTrainer, describe, ranking, score
    from llmpipe.training.training import Training

    recipe = job.recipe
    setup = set_up(job, prepared)
    training = Training(setup, JUDGED, load_ranker(setup))
    configuration = arguments(
        RewardConfig,
        training,
        max_length=None,
        center_rewards_coefficient=recipe.center,
        disable_dropout=True,
    )
    trainer = RankingTrainer(
        training,
        ranking,
        args=configuration,
        data_collator=Collator(setup.tokenizer.pad_token_id),
        train_dataset=training.train_rows(),
        eval_dataset=training.eval_rows(),
    )
    final = trainer.fit()

    held_out = training.eval_rows()
    pairs = held_out or training.train_rows()
    quality = describe(score(trainer, pairs), recipe.seed, held_out=held_out is not None)
    job.say(str(quality))
    final["ranking"] = asdict(quality)
    return conclude(trainer, training, final)
