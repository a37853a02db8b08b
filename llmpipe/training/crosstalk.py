"""Whether an architecture keeps the documents of one row apart, as a trainer lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from llmpipe.models.apart import Road, keeps_apart
from llmpipe.training.hosted import Durable

OF_TRAINING = ("labels", "tokens", "predictors")
"""What a batch has beside what a model reads."""


def keeps_documents_apart(trainer: Durable, row: int) -> bool:
    """Whether a document in a row of so many tokens is read as if it were alone.

    Not so: as in Falcon, which looks at everything before, whatever the positions say. Such an
    architecture would learn across documents unseen.
    """

    def packed(model: Any, documents: Sequence[list[int]]) -> list[Tensor]:
        batch = trainer._prepare_inputs(trainer.data_collator([_row(ids) for ids in documents]))
        asked = {name: batch[name] for name in batch if name not in OF_TRAINING}
        logits = model(**asked, use_cache=False).logits[0].float()
        lengths = [len(ids) for ids in documents]
        return list(logits[: sum(lengths)].split(lengths))

    def alone(model: Any, document: list[int]) -> Tensor:
        ids = torch.tensor([document], device=model.device)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits[0].float()

    model = trainer.plain_model()
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    return keeps_apart(causal, Road(packed, alone, row), trainer.hardware, trainer.say)


def _row(ids: list[int]) -> dict[str, Any]:
    """One document, as prepared rows have it."""
    return {"input_ids": ids, "labels": ids, "seq_lengths": [len(ids)]}
