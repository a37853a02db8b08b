"""What a stage that trains has in hand, and what the end of every stage asks of its trainer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.data.kinds import Kind
from llmpipe.data.prepared import PreparedRows
from llmpipe.data.stream import Stream
from llmpipe.errors import Say
from llmpipe.models.hardware import Hardware
from llmpipe.models.load import Setup
from llmpipe.models.moved import Start
from llmpipe.recipe import sections
from llmpipe.run.artifact import Artifact
from llmpipe.run.job import Job
from llmpipe.training import rows

R_co = TypeVar("R_co", bound=sections.Training, covariant=True)


@dataclass
class Training(Generic[R_co]):
    """One training, once there are tokens and a model: all that its parts share."""

    setup: Setup[R_co]
    kind: Kind
    """Of the rows."""
    model: PreTrainedModel | PeftModel
    stream: Stream | None = None
    """Rows that are tokenized while they are trained on, instead of prepared ones."""

    @property
    def job(self) -> Job[R_co]:
        return self.setup.job

    @property
    def recipe(self) -> R_co:
        return self.setup.job.recipe

    @property
    def preparation(self) -> sections.Preparation:
        return self.setup.recipe.data.preparation

    @property
    def prepared(self) -> PreparedRows:
        return self.setup.prepared

    @property
    def hardware(self) -> Hardware:
        return self.setup.hardware

    @property
    def tokenizer(self) -> Tokenizer:
        return self.setup.tokenizer

    @property
    def artifact(self) -> Artifact:
        return self.job.artifact

    @property
    def say(self) -> Say:
        return self.job.say

    @property
    def folder(self) -> Path:
        """Where the prepared rows lie, and the tokenizer that made them."""
        return self.prepared.folder(self.job.prepared)

    @property
    def identity(self) -> str:
        """Of the recipe and of the very tokens: a checkpoint of another one is refused."""
        digests = [self.job.plan.identity, self.prepared.content_digest]
        if self.prepared.mixture:
            digests.append(self.prepared.mixture.content_digest)
        return ":".join(digests)

    def cut(self, micro_batch_size: int) -> None:
        """Take so many sequences a forward pass."""
        hardware = self.hardware.cut(self.recipe.batch_size, micro_batch_size)
        self.setup = replace(self.setup, hardware=hardware)

    def compute_again(self, kind: str) -> None:
        """Compute activations of this kind again in the backward pass."""
        hardware = replace(self.hardware, activation_checkpointing=kind)
        self.setup = replace(self.setup, hardware=hardware)

    def train_rows(self) -> Dataset:
        return rows.dataset(self.folder / "train.arrow")

    def eval_rows(self) -> Dataset | None:
        """The held-out rows, where there are any."""
        if not self.prepared.rows.eval:
            return None
        return rows.dataset(self.folder / "eval.arrow")


class Trained(Protocol):
    """What samples and publishing ask of a trainer: one of TRL's in `hosted`, or `rl`'s loop."""

    accelerator: Accelerator
    artifact: Artifact
    start: Start
    """The weights that learn, before the first step."""
    recipe: Any
    """The stage's own; where it generates it has `samples`."""
    say: Say

    @property
    def resumes(self) -> bool:
        """Whether training goes on from a checkpoint."""

    def is_world_process_zero(self) -> bool:
        """Whether this process is the one that writes."""

    def plain_model(self) -> Any:
        """The model without what training puts around it, as a reader of the files has it."""

    def forget_optimizer(self) -> None:
        """Free gradients and optimizer state: what follows needs the memory."""

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the training: steps, tokens, seconds, ..."""
