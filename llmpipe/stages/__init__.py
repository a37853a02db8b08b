"""One light file per stage: its recipe and its story. `STAGES` is the one table of them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from llmpipe.errors import Mistake, Say, UserError, near

if TYPE_CHECKING:
    from llmpipe.data.prepared import PreparedFolder
    from llmpipe.recipe.sections import Recipe
    from llmpipe.run.artifact import Artifact
    from llmpipe.run.job import Job
    from llmpipe.run.made import Made
    from llmpipe.run.outlook import Outlook
    from llmpipe.run.plan import Accepts

STAGES = {
    "pretrain": "pretraining: from raw text to a model",
    "sft": "supervised fine-tuning: learn to answer from examples",
    "lora": "sft of a low-rank adapter on a frozen model",
    "qlora": "sft of an adapter on a model held in 4 or 8 bits",
    "reward": "reward modelling: learn which of two answers people prefer",
    "ppo": "proximal policy optimization: answer so that a reward is high",
    "grpo": "group relative policy optimization: ppo without a critic",
    "dpo": "direct preference optimization: answer as people prefer",
    "kto": "Kahneman-Tversky optimization: answer as people judged good",
    "sample": "sampling: answers of a model, scored, as rows to learn from",
    "eval": "evaluation: measure models on the same items, with intervals",
    "export": "for other engines: write, read back there, and compare",
}

# what an unfinished artifact of a stage that trains goes on from
CHECKPOINTS = "checkpoints"


class Stage(Protocol):
    """What the module of a stage offers.

    A stage knows its own classes of recipe and of prepared rows, which nobody else asks for; so
    `Any` stands for them.
    """

    Schema: type[Recipe]
    """The recipe."""
    ACCEPTS: Accepts
    """Kinds of artifacts that the models it names may be."""
    MAKES: str
    """The kind of artifact that comes of it."""
    PROGRESS: str
    """What an unfinished artifact goes on from: its checkpoints, or a file."""

    def shapes(self, recipe: Any) -> dict[str, tuple[type, ...]]:
        """The shapes of examples that rows may have, by the path of each source's field."""

    def prepare(self, job: Job[Any]) -> PreparedFolder:
        """Read rows and make of them what `train` needs; without torch."""

    def train(self, job: Job[Any], prepared: Any) -> Made:
        """Do the work and publish `model/`; returns what the manifest says of it."""


@runtime_checkable
class Preparing(Protocol):
    """A stage whose `prepare` leaves another record in prepared.json than `PreparedRows`."""

    PREPARED: type[PreparedFolder]


@runtime_checkable
class Judging(Protocol):
    """A stage that holds what it made against the recipe's conditions, each time it is called."""

    def judge(self, recipe: Any, artifact: Artifact, say: Say) -> None:
        """Raises UserError (4) naming every condition that fails."""


@runtime_checkable
class Foreseeing(Protocol):
    """A stage that can tell ahead of more mistakes than those that every stage may have."""

    def foresee(self, recipe: Any, outlook: Outlook) -> Iterator[Mistake]:
        """What is wrong with a recipe in the place that it has."""


def prepared_by(module: Stage) -> type[PreparedFolder]:
    """What a stage's `prepare` leaves in prepared.json, and its `train` is given."""
    from llmpipe.data.prepared import PreparedRows  # no recipe is checked with it

    return module.PREPARED if isinstance(module, Preparing) else PreparedRows


def stage(name: str) -> Stage:
    """The module of a stage. Raises UserError where there is none of that name."""
    if name not in STAGES:
        raise UserError(
            f"stage: '{name}' is not a stage{near(name, STAGES)}",
            f"there are: {', '.join(STAGES)}",
        )
    return cast(Stage, importlib.import_module(f"llmpipe.stages.{name}"))


def schema(name: str) -> type[Recipe]:
    """The recipe class of a stage."""
    return stage(name).Schema
