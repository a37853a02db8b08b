"""Log-probabilities of chosen tokens from hidden states: logits exist for a tile of tokens only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from llmpipe.kernels import cpu

TILE = 256  # tokens whose logits exist at once
TILE_ON_GPU = 2048  # where a launch costs more than a logit


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: a linear layer, a factor, and a bound."""

    linear: nn.Linear
    scale: float
    cap: float | None
    """c of c tanh(logit / c) (Gemma 2)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [tokens, vocabulary] of hidden states [tokens, width]."""
        logits = linear(hidden, self.linear.weight, self.linear.bias).float() * self.scale
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()


@dataclass(frozen=True)
class Allowed:
    """Which token ids could be drawn at each target."""

    ids: Tensor
    """Those of one target after the other's, int32."""
    rows: Tensor
    """Which target each of them is of, int64."""
    ends: list[int]
    """Where those of each target begin, and where the last one's end, [targets + 1]."""

    def __getitem__(self, tile: slice) -> Allowed:
        """Of some targets."""
        ends = self.ends[tile.start : tile.stop + 1]
        those = slice(ends[0], ends[-1])
        return Allowed(self.ids[those], self.rows[those] - tile.start, ends)

    def mask(self, vocabulary: int) -> Tensor:
        """bool [targets, vocabulary]."""
        targets = len(self.ends) - 1
        flat = torch.zeros(targets * vocabulary, dtype=torch.bool, device=self.ids.device)
        return flat.index_fill_(0, self.rows * vocabulary + self.ids, True).view(targets, -1)


def head_of(model: Any) -> Head:
    """The head of a causal language model, as far as configurations tell of it."""
    config = model.config.get_text_config()
    scale = 1.0
    # Cohere; Muse; Falcon-H1
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = getattr(config, name)
            break
    # Granite; HyperCLOVA X multiplies by it
    divisor = getattr(config, "logits_scaling", None) or 1.0
    scale = scale * divisor if config.model_type == "hyperclovax" else scale / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(model.get_output_embeddings(), scale, cap)


def log_probs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: float,
    allowed: Allowed | None = None,
    learns_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` and the entropy in nats of the distribution that they are
    drawn from, float32 [tokens] each.

    hidden [tokens, width]; targets int64 [tokens]; `allowed`: which token ids could be drawn at
    each place; `learns_entropy`: gradients flow through the entropy as well.
    """
    plain = head.linear.bias is None and head.cap is None
    if hidden.device.type == "cpu" and allowed is None and not learns_entropy and plain:
        scaled = hidden * (head.scale / temperature)
        scores = cpu.log_probs(scaled, head.linear.weight, targets, ("entropy",))
        assert scores.entropy is not None  # it was asked for
        return scores.log_probs, scores.entropy
    parts = []
    size = TILE_ON_GPU if hidden.device.type == "cuda" else TILE
    for start in range(0, len(targets), size):
        tile = slice(start, start + size)
        arguments = (hidden[tile], head, targets[tile], temperature, allowed and allowed[tile])
        if torch.is_grad_enabled():
            again = checkpoint(_of_tile, *arguments, use_reentrant=False, preserve_rng_state=False)
            parts.append(again)
        else:
            parts.append(_of_tile(*arguments))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _of_tile(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: float,
    allowed: Allowed | None,
) -> tuple[Tensor, Tensor]:
    logits = head.logits(hidden) / temperature
    if allowed is not None:
        logits = logits.masked_fill(~allowed.mask(logits.shape[1]), -torch.inf)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), entropy
