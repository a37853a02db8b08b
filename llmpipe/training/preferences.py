"""TRL's trainers of preferences on rows that llmpipe prepared: what `reward` and `dpo` share.

An example weighs the same in every step, however the step is cut into micro-batches and processes:
TRL takes the mean of a micro-batch, and `Preferences` weighs those means by the examples in them,
which a collator counts in `examples`. None is cut or dropped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer

from llmpipe import upstream
from llmpipe.errors import UserError
from llmpipe.parallel.world import World
from llmpipe.recipe import sections
from llmpipe.training.laid import Placed, told
from llmpipe.upstream.attention import read_real_tokens
from llmpipe.upstream.head import read_targets
from llmpipe.upstream.later import now, reading_later

DROPOUT = "lora_dropout.default"  # of the adapter that is trained

Pair = dict[str, Any]
"""As `kinds.pairs` writes it; `margin` is NaN for a filler."""


def real_pairs(pairs: list[Pair]) -> list[Pair]:
    """Those that are no fillers (`rows.with_fillers`)."""
    return [pair for pair in pairs if not math.isnan(pair["margin"])]


def leave_out(mask: Tensor, prompt: list[int], context: list[int]) -> None:
    """Take what users and tools say in an answer out of its mask.

    `context` is counted from the answer's first token, and may lie behind where a mask was cut.
    """
    places = torch.tensor(context, dtype=torch.long) + len(prompt)
    mask[places[places < len(mask)]] = 0


def scored(model: Any, batch: dict[str, Any], prefix: str = "", **options: Any) -> Any:
    """TRL's outputs of whole responses: [rows, tokens - 1] each, 0 where nothing is learned.

    `prefix`: of another response in the batch than its first.
    """
    ids = batch[f"{prefix}input_ids"]
    return model(
        input_ids=ids,
        attention_mask=batch[f"{prefix}attention_mask"],
        labels=ids.masked_fill(batch[f"{prefix}completion_mask"] == 0, -100),
        fused_lm_head=True,
        use_cache=False,
        **told(batch, prefix),
        **options,
    )


class Preferences(Trainer):
    """Mixed in between `Durable` and one of TRL's trainers of preferences."""

    aux_loss_enabled: bool
    ref_model: Any
    watched: tuple[str, ...]
    """What is noted of each token that is learned, of TRL's outputs of its head."""
    recipe: sections.Hosted
    world: World
    data_collator: Any
    _total_train_tokens: Any  # by TRL's count, a tensor once a step was computed
    _even = True  # whether every micro-batch of this step is full, in all processes

    def __init__(self, **arguments: Any):
        """Raises UserError when TRL refuses the model or the configuration."""
        try:
            super().__init__(**arguments)
        except (ValueError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.recipe.stage}: TRL refuses: {reason}") from error
        if self.recipe.adapter and self.recipe.adapter.dropout:
            self._drop_out(self.recipe.adapter.dropout)

    def _tell_targets(self, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        """Give a device padded responses of which it need not be asked what is learned.

        `autocast`: what the reference computes in.
        """
        if self.aux_loss_enabled:
            return
        more = ("log_sum_sq_probs",) if getattr(self, "use_weighting", False) else ()
        read_targets(self._policy(), (*self.watched, *more))
        if self.ref_model is not None:
            reference = self.accelerator.unwrap_model(self.ref_model)
            read_targets(reference, (), autocast)
            read_real_tokens(reference)
        self._tell_places()

    def _tell_places(self) -> None:
        """Give a device padded rows of which it need not be asked what is padding."""
        self.data_collator = Placed(self.data_collator)
        read_real_tokens(self._policy())

    def _policy(self) -> Any:
        """What learns, without an adapter's wrapper."""
        model: Any = self.model
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def _drop_out(self, share: float) -> None:
        """Dropout of the trained adapter alone: a reference is no random function."""
        for name, module in self.model.named_modules():
            if name.endswith(DROPOUT):
                module.p = share

    def _hold_still(self) -> None:
        """Let policy and reference be one function where they have the same weights."""
        upstream.without_dropout(self.model, DROPOUT, self.args.gradient_checkpointing)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As it is: the rows are prepared."""
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        """All columns, since the collator is llmpipe's."""
        self._signature_columns = list(self.train_dataset.column_names)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step, each with what its mean counts in the step's."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._hold_still()  # for what is measured before the step's first loss
        world, count = self.world.size, len(batches)
        total = int(self.world.sum(torch.tensor(sum(batch["examples"] for batch in batches))))
        self._even = total == count * world * self.args.per_device_train_batch_size
        for batch in batches:
            batch["weight"] = batch.pop("examples") * count * world / max(total, 1)
        return batches, items

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._hold_still()
        weight = inputs.pop("weight", 1.0)
        with reading_later(self.accelerator, even=self._even):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        self._total_train_tokens = now(self._total_train_tokens)
        return loss * weight
