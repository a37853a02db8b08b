"""TRL's SFTTrainer on tokens that llmpipe prepared: of `sft`, what narrows it, and `pretrain`."""

from __future__ import annotations

from typing import Any

from trl import SFTConfig, SFTTrainer

from llmpipe.errors import UserError
from llmpipe.recipe import sections
from llmpipe.training.arguments import arguments
from llmpipe.training.crosstalk import keeps_documents_apart
from llmpipe.training.heldout import Batch, Sum
from llmpipe.training.hosted import Durable
from llmpipe.training.rows import stand_in
from llmpipe.training.training import Training


class SupervisedTrainer(Durable, SFTTrainer):
    """TRL's SFTTrainer, durable."""


def nats(trainer: Any, batch: Batch) -> dict[str, Sum]:
    """Held-out loss in nats per supervised token."""
    # TRL's head; there is no collective in it
    outputs = trainer.model(**batch, use_cache=False, fused_lm_head=True)
    return {"loss": (-outputs.log_probs.double().sum(), outputs.label_mask.sum())}


def supervised_trainer(training: Training[sections.Hosted]) -> SupervisedTrainer:
    """A trainer of the prepared rows, or of the stream of them.

    Raises UserError when the recipe packs rows, and the architecture does not keep them apart; rows
    that are not packed are padded then.
    """
    packed = training.preparation.packing
    hardware = training.hardware
    # unpacked rows too are laid end to end instead of padded, where attention keeps them apart free
    padding_free = packed or hardware.device == "cpu" or hardware.attention != "sdpa"
    configuration = arguments(
        SFTConfig,
        training,
        max_length=training.preparation.max_length if packed else None,  # rows are cut already
        packing=packed,
        padding_free=padding_free,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SupervisedTrainer(
        training,
        nats,
        args=configuration,
        train_dataset=stand_in(packed) if training.stream else training.train_rows(),
        eval_dataset=training.eval_rows(),
    )
    row = training.preparation.max_length
    if padding_free and not keeps_documents_apart(trainer, row):
        kind = trainer.model.config.model_type
        problem = f"{kind} does not keep documents of one row apart"
        if packed:
            raise UserError(f"data: {problem}", f"set data.{training.kind.packing_field}: false")
        training.say(f"data: rows are padded: {problem}")
        trainer.data_collator.padding_free = False
    return trainer
