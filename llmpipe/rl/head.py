"""Log-probabilities of tokens under a head, by the form that is fastest where they are computed.

on a GPU    TRL's fused head: tiles of the vocabulary, folded by Triton as they come
else        `kernels.log_probs`: a kernel of ours for a plain head on a CPU; tiles of tokens for
            draws from a part of the vocabulary, anywhere, and for what the kernel does not know
"""

from __future__ import annotations

from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

from llmpipe.kernels import log_probs as tiles
from llmpipe.kernels.log_probs import Allowed, Head
from llmpipe.upstream.head import CHUNK


def log_probs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: float,
    allowed: Allowed | None = None,
    learns_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `kernels.log_probs.log_probs`."""
    if hidden.device.type == "cuda" and allowed is None:
        return fused(hidden, head, targets, temperature)
    return tiles.log_probs(hidden, head, targets, temperature, allowed, learns_entropy)


def fused(hidden: Tensor, head: Head, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """By TRL's kernel, on any device; gradients flow through the entropy as well, where it is
    learned from."""
    weight, bias = head.linear.weight, head.linear.bias
    options = (temperature, CHUNK, head.cap, head.scale, ("entropy",))
    scores, entropy, *_ = ChunkedLogProbFunction.apply(hidden, weight, bias, targets, *options)
    return scores, entropy
