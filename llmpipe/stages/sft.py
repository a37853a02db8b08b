"""`llmpipe sft`: supervised fine-tuning. Learn to answer from examples, loss on the assistant's turns.

Inputs: a causal language model and rows (text, alpaca, sharegpt, messages or prompt-completion). Makes: a `model`.
The story is `train`, top to bottom; the trainer underneath is TRL's SFTTrainer on rows that llmpipe prepared.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from llmpipe.recipe import Generating, owned
from llmpipe.stages import CHECKPOINTS, Job, tokens

ACCEPTS = ("model", "adapter")
MAKES = "model"  # or an adapter, with `adapter:`
PROGRESS = CHECKPOINTS
prepare = tokens


class Schema(Generating):
    stage: Literal["sft"] = "sft"
    """Supervised fine-tuning."""

    trainer_config: ClassVar[tuple[str, str, str]] = ("trl", "trainer.sft_config", "SFTConfig")
    trainer_owned: ClassVar[dict[str, str]] = owned("""
        activation_checkpointing=launch.activation_checkpointing max_length=data.max_length packing=data.packing
        packing_strategy=data.packing eval_packing=data.packing padding_free=data.packing
        truncation_mode=data.max_length chat_template_path=data.template assistant_only_loss=data.loss
        completion_only_loss=data.loss dataset_text_field=data.train.N.columns shuffle_dataset=data
        eos_token=data.template
    """)


def train(job: Job, prepared: dict[str, Any]) -> dict[str, Any]:
    """Train, publish `model/` and return what the manifest says of it."""
    from llmpipe.engine import models, supervised

    recipe, say = job.recipe, job.say
    hardware = models.hardware(recipe, say, job.weights)
    tokenizer = models.load_tokenizer(job.prepared / prepared["data"] / "tokenizer")
    base = job.bases.get("model")
    model = models.load(job.model, base, tokenizer, hardware, recipe, prepared, say)
    return supervised.train(job, prepared, hardware, tokenizer, model, base)
