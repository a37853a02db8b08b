"""Whether an architecture keeps the documents of one row apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmpipe.models.generate import isolated_rng
from llmpipe.models.verify import PROBE
from llmpipe.run.context import tokens_of
from llmpipe.training.hosted import Durable


def crosstalk(trainer: Durable) -> float:
    """How much the document before it in a row changes one's logits, as a share of what it does
    where the two are one document.

    0: not at all; 1: the architecture reads no boundaries, as Falcon, or knows none on this
    machine. Otherwise it would learn across documents unseen.
    """
    ids = trainer.processing_class(PROBE)["input_ids"][: tokens_of(trainer.model.config.to_dict())]
    half = len(ids) // 2
    first, second, both = _row(ids[:half]), _row(ids[half:]), _row(ids)
    length = len(ids) - half
    was_training = trainer.model.training
    trainer.model.eval()
    with isolated_rng(), torch.no_grad(), trainer.hardware.autocast():
        try:
            packed = _last_logits(trainer, [first, second], length)
            alone = _last_logits(trainer, [second], length)
            joined = _last_logits(trainer, [both], length)
        except ValueError:  # hybrids of attention and state spaces need kernels for it, and say so
            return 1.0
        finally:
            trainer.model.train(was_training)
    most = (joined - alone).abs().mean().clamp(min=1e-9)
    return float((packed - alone).abs().mean() / most)


def _row(ids: list[int]) -> dict[str, Any]:
    """One document, as prepared rows have it."""
    return {"input_ids": ids, "labels": ids, "seq_lengths": [len(ids)]}


def _last_logits(trainer: Durable, rows: list[dict[str, Any]], length: int) -> Tensor:
    """Of the last `length` positions of the rows laid end to end, float32 [length, vocabulary]."""
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    batch.pop("labels")
    return trainer.model(**batch, use_cache=False).logits[0, -length:].float()
