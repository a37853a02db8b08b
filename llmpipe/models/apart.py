"""Whether an architecture keeps texts apart that lie end to end in one row.

It is asked of a miniature, in fp32, where the answer is a matter of architecture: the difference is
rounding, a millionth, or what another text does, a tenth at least. Of a model of any size in bf16
there is no number that tells the two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmpipe.errors import Say
from llmpipe.faults import of_memory
from llmpipe.models.hardware import Hardware
from llmpipe.models.miniature import VOCABULARY, miniatures
from llmpipe.models.rng import isolated_rng

TOLERANCE = 1e-4
"""Of what a text before it does to another, where the two are one; in fp32."""

ROUNDED = 0.15
"""The same where attention computes in half precision only, or no miniature can be made: in bf16
SmolLM2 shows 0.04, and OPT, which mixes, 0.29."""

LENGTHS = (5, 9, 7)  # tokens of the texts; together fewer than any model takes
EFFECT = 1e-3  # of a text before it: in a model with less of it nothing could be seen

Texts = Sequence[list[int]]
Packed = Callable[[Any, Texts], list[Tensor]]
"""What a model says of texts in one row as they are trained on, a tensor for each."""
Alone = Callable[[Any, list[int]], Tensor]
"""What it says of one text by its plain forward pass: the same numbers. Of less than all of a text:
of its end."""


@dataclass(frozen=True)
class Road:
    """How texts are laid end to end, and what is said of them, in training and without it."""

    packed: Packed
    alone: Alone
    row: int
    """Tokens of a row in training."""


def keeps_apart(model: Any, road: Road, hardware: Hardware, say: Say) -> bool:
    """Whether a model's architecture says of texts in one row what it says of each alone.

    Where no miniature can be asked, the model itself is, within rounding, and that is said.
    """
    with isolated_rng(), torch.no_grad():
        # there is an attention that computes in half precision alone
        rounds = model.config._attn_implementation == "flash_attention_2"
        for small in miniatures(model, road.row):
            with hardware.autocast() if rounds else nullcontext():
                share = mixed_share(small, road)
            if share is not None:
                return share <= (ROUNDED if rounds else TOLERANCE)
        kind = model.config.model_type
        say(
            f"model: no small {kind} can be made: whether texts of one row stay apart is asked of "
            "the model itself, within rounding"
        )
        was_training = model.training
        model.eval()
        with hardware.autocast():
            share = mixed_share(model, road)
        model.train(was_training)
    return share is not None and share <= ROUNDED


def mixed_share(model: Any, road: Road) -> float | None:
    """How much the texts before it in a row change what is said of one, as a share of what they do
    where they are one text with it.

    0: not at all; 1: the architecture reads no boundaries, or cannot be asked to. None: the model
    does not compute, or one text does nothing to the next. Want of memory is no verdict, and is
    raised as it came.
    """
    ids = torch.randint(1, VOCABULARY, (sum(LENGTHS),)).tolist()
    ends = [sum(LENGTHS[: i + 1]) for i in range(len(LENGTHS))]
    texts = [ids[end - length : end] for end, length in zip(ends, LENGTHS, strict=True)]
    try:
        apart = [road.alone(model, text) for text in texts]
        last = apart[-1]
        joined = road.alone(model, ids)[-len(last) :]
    except Exception as error:  # a model whose numbers do not fit one another
        if of_memory(error):
            raise
        return None
    effect = float((joined - last).abs().mean())
    if not EFFECT < effect < float("inf"):
        return None
    try:
        together = road.packed(model, texts)
    except (ValueError, RuntimeError, TypeError) as error:
        if of_memory(error):
            raise
        return 1.0  # hybrids of attention and state spaces need kernels for it, and say so
    pairs = zip(together, apart, strict=True)
    return max(float((one - other).abs().mean()) for one, other in pairs) / effect
