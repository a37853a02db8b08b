"""TRL's SFTTrainer on tokens that llmpipe prepared: of `sft`, what narrows it, and `pretrain`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from trl import SFTConfig, SFTTrainer

from llmpipe.errors import UserError
from llmpipe.parallel.parts import looking
from llmpipe.recipe import sections
from llmpipe.training.arguments import arguments
from llmpipe.training.crosstalk import keeps_documents_apart
from llmpipe.training.heldout import Batch, Measure, Sum
from llmpipe.training.hosted import Durable
from llmpipe.training.laid import EndToEnd
from llmpipe.training.rows import stand_in
from llmpipe.training.training import Training
from llmpipe.upstream.attention import DOCUMENTS
from llmpipe.upstream.head import read_predictors


class SupervisedTrainer(Durable, SFTTrainer):
    """TRL's SFTTrainer, durable."""

    def __init__(self, training: Training[sections.Hosted], measure: Measure, **arguments: Any):
        super().__init__(training, measure, **arguments)
        if training.hardware.device == "cuda" or training.hardware.compiles:
            self._leave_the_device_alone(training)

    def _leave_the_device_alone(self, training: Training[sections.Hosted]) -> None:
        """Give it batches that it need not be asked about."""
        model = training.model
        if model.config._attn_implementation != DOCUMENTS:
            return
        longest = training.preparation.max_length
        packed = training.hardware.compiles and training.preparation.packing
        tokens = longest * training.hardware.micro_batch_size if packed else 1
        pad = training.tokenizer.pad_token_id
        balances = self.aux_loss_enabled
        self.data_collator = EndToEnd(self.data_collator, pad, longest, tokens, balances)
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        read_predictors(causal, ("entropy", "is_top1"))

    def cut(self, micro_batch_size: int) -> None:
        """With rows of as many tokens."""
        before = self.hardware.micro_batch_size
        super().cut(micro_batch_size)
        laid = self.data_collator
        if isinstance(laid, EndToEnd) and laid.tokens > 1:
            tokens = laid.tokens // before * micro_batch_size
            self.data_collator = replace(laid, tokens=tokens)

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss of plain next-token prediction, and what it watches, as tensors: TRL reads
        seven numbers a micro-batch, and a device computes nothing while it is waited for.
        """
        if return_outputs or num_items_in_batch is None or not self._predicts_plainly():
            inputs.pop("predictors", None)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        self._watch(outputs)
        loss = -outputs.log_probs.sum() / torch.as_tensor(num_items_in_batch).clamp(min=1)
        # DDP takes the mean of gradients; the items are those of all processes
        return loss * self.accelerator.num_processes

    def _predicts_plainly(self) -> bool:
        smooths = self.label_smoother is not None or self.compute_loss_func is not None
        return self.args.loss_type == "nll" and not smooths and not self.aux_loss_enabled

    @torch.no_grad()
    def _watch(self, outputs: Any) -> None:
        """Note entropy and accuracy of a micro-batch of all processes."""
        seen = (outputs.label_mask, outputs.entropy, outputs.is_top1)
        sums = self.accelerator.reduce(torch.stack([value.sum().double() for value in seen]))
        entropy, accuracy = (sums[1:] / sums[0].clamp(min=1)).float()
        averages = self._metrics["train" if self.model.training else "eval"]
        averages["entropy"].append(entropy)
        averages["mean_token_accuracy"].append(accuracy)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the tokens of all processes. Collective."""
        if self.model.training:
            self._metrics["train"]["num_tokens"] = [self.metrics_log.total()]
        super().log(logs, start_time)


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
    # unpacked rows too are laid end to end instead of padded, where attention keeps them apart free
    attention = training.model.config._attn_implementation
    free = attention in (DOCUMENTS, "flash_attention_2") or training.hardware.device == "cpu"
    padding_free = packed or free
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
    with looking(training.model):
        apart = not padding_free or keeps_documents_apart(trainer, row)
    if not apart:
        kind = trainer.model.config.model_type
        problem = f"{kind} does not keep documents of one row apart"
        if packed:
            raise UserError(f"data: {problem}", f"set data.{training.kind.packing_field}: false")
        training.say(f"data: rows are padded: {problem}")
        trainer.library_collator.padding_free = False
    return trainer
