"""Whether an architecture keeps the documents of one row apart."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.models.generate import isolated_rng
from llmpipe.models.verify import PROBE


def crosstalk(trainer: Any, tokenizer: Tokenizer, hardware: Any) -> float:
    """How much the document before it in a row changes one's logits, as a share of what it does where they are one
    document: 0 not at all, 1 where the architecture reads no boundaries, as Falcon, or knows none on this machine.
    Otherwise it would learn across documents unseen."""
    ids = tokenizer(PROBE)["input_ids"]
    parts = [ids[: len(ids) // 2], ids[len(ids) // 2 :]]
    rows = [
        {"input_ids": part, "labels": part, "seq_lengths": [len(part)]} for part in (*parts, ids)
    ]

    def last(*chosen: dict) -> torch.Tensor:
        batch = trainer._prepare_inputs(trainer.data_collator(list(chosen)))
        batch.pop("labels")
        return trainer.model(**batch, use_cache=False).logits[0, -len(parts[1]) :].float()

    was_training = trainer.model.training
    trainer.model.eval()
    with isolated_rng(), torch.no_grad(), hardware.autocast():
        try:
            packed, alone, joined = last(rows[0], rows[1]), last(rows[1]), last(rows[2])
        except ValueError:  # hybrids of attention and state spaces need kernels for it, and say so
            return 1.0
        finally:
            trainer.model.train(was_training)
    return float((packed - alone).abs().mean() / (joined - alone).abs().mean().clamp(min=1e-9))
