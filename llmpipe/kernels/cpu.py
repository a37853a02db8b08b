"""Attention document by document and log-probabilities under a head, on a CPU."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmpipe.kernels.apart import Weighing, band

TILE = 256
"""Tokens that are multiplied with the head at once."""

CACHED = 3 << 18
"""fp32 logits that exist at once: 3 MB stay in the cache, in memory that is used again."""


# --- attention ---


def attend_documents(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], how: Weighing
) -> Tensor:
    """Causal attention within each document of one packed row.

    query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim]; `lengths` of the
    documents add up to the tokens. Returns [1, tokens, heads, dim] in the type of `value`.
    """
    # fp32 also under autocast: the backward pass of PyTorch's CPU kernel takes 2.8 ms in fp32 and
    # 9.1 ms in bf16 at 150 tokens, and the same at 1,000. `split`, not slices: a slice's gradient
    # is a row of zeros for each document.
    queries, keys, values = (tensor.float().split(lengths, dim=2) for tensor in (query, key, value))
    attend = _attend if how.cap is None else _attend_bounded
    with torch.autocast("cpu", enabled=False):
        attended = [attend(q, k, v, how) for q, k, v in zip(queries, keys, values, strict=True)]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous().to(value.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, how: Weighing) -> Tensor:
    """One document's."""
    tokens = query.shape[2]
    slides = how.slides(tokens)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=band(tokens, how.window, query.device) if slides else None,
        dropout_p=how.dropout,
        scale=how.scaling,
        is_causal=not slides,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_bounded(query: Tensor, key: Tensor, value: Tensor, how: Weighing) -> Tensor:
    """One document's, with bounded products."""
    return bounded(query, key, value, band(query.shape[2], how.window, query.device), how)


def bounded(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, how: Weighing
) -> Tensor:
    """Attention whose products are bounded, softly.

    query [batch, heads, queries, dim], key and value [batch, kv_heads, keys, dim]; `seen`: bool,
    which key a query sees, of a shape that fits [batch, heads, queries, keys]; None: all. Returns
    [batch, heads, queries, dim].
    """
    assert how.cap is not None
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scaling = query.shape[-1] ** -0.5 if how.scaling is None else how.scaling
    products = how.cap * torch.tanh(query @ key.transpose(2, 3) * scaling / how.cap)
    if seen is not None:
        products = products.masked_fill(~seen, torch.finfo(products.dtype).min)
    weights = products.softmax(-1, dtype=torch.float32).to(value.dtype)
    return torch.dropout(weights, how.dropout, train=True) @ value


# --- log-probabilities ---


class TokenScores(NamedTuple):
    """What is known of tokens under the distributions of a head, [tokens] each; None where it was
    not asked for.
    """

    log_probs: Tensor
    entropy: Tensor | None
    """In nats."""
    mean_logits: Tensor | None
    is_top1: Tensor | None
    """Whether the token is the likeliest; of equally likely ones the first is."""


def log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, outputs: Collection[str]
) -> TokenScores:
    """Log-probabilities of `targets` [tokens] under softmax(hidden @ weight.T), and what else of
    `TokenScores` is named in `outputs`. Gradients reach hidden and weight through the
    log-probabilities alone.

    hidden [tokens, width], weight [vocabulary, width]; products are in the type of `hidden`, or
    of autocast; the rest is fp32.
    """
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else hidden.dtype
    learns = torch.is_grad_enabled()  # inside `forward` it is always off
    scores, *more = _LogProbs.apply(hidden, weight, targets, dtype, frozenset(outputs), learns)
    names = TokenScores._fields[1:]
    asked = (value if name in outputs else None for name, value in zip(names, more, strict=True))
    return TokenScores(scores, *asked)


class _LogProbs(torch.autograd.Function):
    """d log p_t / d logits = onehot(t) - p needs nothing from the backward pass but one factor per
    token, so the forward pass keeps it (in the products' precision: tokens x vocabulary x 2 bytes
    in bf16) along with its product with the weight. The idea is that of Liger's fused cross-entropy
    (Hsu 2024, https://arxiv.org/abs/2410.10989).
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # it would round the entropy's product
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        outputs: frozenset[str],
        learns: bool,
    ) -> tuple[Tensor, ...]:
        head = weight.to(dtype)
        states = hidden.to(dtype)
        tokens, vocabulary = len(targets), len(weight)
        folded = _Folded(tokens, vocabulary, outputs)
        grad_logits = torch.empty(tokens, vocabulary if learns else 0, dtype=dtype)
        grad_hidden = torch.empty_like(states)
        for tile in _slices(0, tokens, TILE):
            logits = states[tile] @ head.T
            for rows in _slices(tile.start, tile.stop, folded.rows):
                part = logits[rows.start - tile.start : rows.stop - tile.start]
                target = targets[rows, None]
                powers, total = folded.fold(rows, part, target)
                if learns:  # onehot - p
                    gradient = powers.div_(-total)
                    grad_logits[rows] = gradient.scatter_add_(1, target, torch.ones_like(total))
            if learns:
                grad_hidden[tile] = grad_logits[tile] @ head
        ctx.save_for_backward(states, grad_hidden, grad_logits)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(folded.entropy, folded.mean_logits, folded.is_top1)
        return folded.log_probs, folded.entropy, folded.mean_logits, folded.is_top1

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        states, grad_hidden, grad_logits = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        factor = grad[:, None]
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (grad_logits.T @ (states * factor).to(states.dtype)).to(weight_dtype)
        return (grad_hidden * factor).to(hidden_dtype), to_weight, None, None, None, None


class _Folded:
    """Logits folded to numbers per token, a few rows at a time in memory that is used again."""

    def __init__(self, tokens: int, vocabulary: int, outputs: frozenset[str]):
        self.outputs = outputs
        self.log_probs = torch.empty(tokens)
        self.entropy = torch.empty(tokens)
        self.mean_logits = torch.empty(tokens)
        self.is_top1 = torch.zeros(tokens, dtype=torch.bool)
        self.rows = min(TILE, max(1, CACHED // vocabulary))
        """How many rows there is room for."""
        self._shifted = torch.empty(self.rows, vocabulary)
        self._powers = torch.empty(self.rows, vocabulary)

    def fold(self, rows: slice, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Note what is known of the tokens in `rows`. logits [rows, vocabulary], target [rows, 1].

        Returns e^z [rows, vocabulary], where z are the logits less their greatest, and its sums
        [rows, 1]. The next call overwrites the former.
        """
        count = rows.stop - rows.start
        z = self._shifted[:count].copy_(logits)
        if "mean_logits" in self.outputs:
            self.mean_logits[rows] = z.mean(-1)
        z.sub_(z.amax(-1, keepdim=True))
        powers = torch.exp(z, out=self._powers[:count])
        total = powers.sum(-1, keepdim=True)
        log_total = total.log()
        target_z = z.gather(1, target)
        self.log_probs[rows] = (target_z - log_total).squeeze(1)
        if "entropy" in self.outputs:  # log sum e^z - E[z]
            weighted = torch.stack([torch.dot(*pair) for pair in zip(powers, z, strict=True)])
            self.entropy[rows] = log_total.squeeze(1) - weighted / total.squeeze(1)
        if "is_top1" in self.outputs:  # looked for where the target may be it
            places = (target_z == 0).squeeze(1).nonzero().squeeze(1)
            self.is_top1[rows.start + places] = z[places].argmax(-1) == target[places, 0]
        return powers, total


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """From `start` to `stop` in slices of `size`; the last one may be shorter."""
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))
