"""What a model says of a probe, and what rounding alone may move that by."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.models.pretrained import rows_of
from llmpipe.models.rng import isolated_rng
from llmpipe.models.verify.saved import PROBE, refuse
from llmpipe.run.context import tokens_of

PROBE_TOKENS = 64

NEWEST = 8  # of these are the last ids of the vocabulary

AGAIN = 2
"""Units in the last place of the largest logit that one layer may move a logit by where the same
sums are computed once more. They are equal to the bit on a CPU."""

OTHERWISE = 256
"""The same where a sum is computed in another order, in fp32: a merged adapter's logits move by 1
to 10 units, a wrong scale moves them by tens of thousands."""


def probe_logits(
    model: Any, tokenizer: Tokenizer, device: torch.device | None = None
) -> torch.Tensor:
    """Logits on the probe text, with the model in evaluation mode: [1, tokens, vocabulary], or
    scores [1, 1] of a reward model. `device`: where it computes, if not where its weights lie.
    """
    was_training = model.training
    model.eval()
    with isolated_rng(), torch.no_grad():
        logits: torch.Tensor = model(probe_of(model, tokenizer).to(device or model.device)).logits
    model.train(was_training)
    return logits


def probe_of(model: Any, tokenizer: Tokenizer) -> torch.Tensor:
    """The last token ids of the vocabulary, which may be new ones, and those of the probe text:
    [1, PROBE_TOKENS]; fewer where the text has few, or the model takes few.
    """
    rows = rows_of(tokenizer)
    newest = list(range(max(rows - NEWEST, 0), rows))
    ids = newest + tokenizer(PROBE)["input_ids"] * 4
    most = min(PROBE_TOKENS, tokens_of(model.config.to_dict()) or PROBE_TOKENS)
    return torch.tensor([ids[:most]], device=model.device)


def rounding(model: Any, logits: torch.Tensor, dtype: torch.dtype, units: int) -> float:
    """What rounding alone may make two computations of these logits differ by, in `dtype`: units in
    the last place of the largest, in each layer anew, as in a random walk.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    largest = max(float(logits.abs().max()), 1.0)
    return units * torch.finfo(dtype).eps * math.sqrt(depth + 1) * largest


def same_logits(model: Any, logits: torch.Tensor, again: torch.Tensor, dtype: torch.dtype) -> float:
    """The greatest difference of logits and the reloaded model's, which is rounding."""
    difference = float((logits - again).abs().max())
    # where a part of the weights was taken out of them, the sums are others once it is back in
    units = OTHERWISE if hasattr(model, "began_with") else AGAIN
    if not difference <= rounding(model, logits, dtype, units):
        outputs = "logits" if model.can_generate() else "scores"
        refuse(f"{outputs} on a probe differ by {difference:.2e} after reloading")
    return difference


def same_merged(model: Any, before: torch.Tensor, after: torch.Tensor) -> float:
    """The greatest difference of logits in fp32 of an adapter on its base, and merged into it."""
    difference = float((before - after).abs().max())
    if not difference <= rounding(model, before, torch.float32, OTHERWISE):
        shown = f"differ by {difference:.2e}"
        refuse(f"merged into its base, the adapter's logits on a probe {shown}")
    return difference
