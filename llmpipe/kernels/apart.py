"""Attention within each of several documents in one row, as a padded batch of them, or under one
mask where that would be mostly padding: on any device, in any precision, with dropout or a window,
and without a word to the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

MOSTLY_PADDING = 4
"""Times the tokens of a row: what more a padded batch of its documents has is not computed."""


class Weighing(NamedTuple):
    """How a token weighs what comes before it."""

    dropout: float = 0.0
    scaling: float | None = None
    """Of the products; 1 / sqrt(dim) unless given."""
    window: int | None = None
    """Tokens that it sees at most, itself among them."""
    cap: float | None = None
    """c of c tanh(product / c) (Gemma 2)."""

    def slides(self, tokens: int) -> bool:
        """Whether the last of so many tokens does not see the first."""
        return self.window is not None and self.window < tokens


def attend_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    longest: int,
    how: Weighing,
) -> Tensor:
    """Causal attention within each document, without a bound of products.

    query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim]; `ends` int64 or int32
    [documents + 1]: where each begins, and where the last one ends; none has more than `longest`
    tokens. Returns [1, tokens, heads, dim] in the type of `value`. Memory: documents x longest, or
    tokens x tokens where the former is more than `MOSTLY_PADDING` times the tokens.
    """
    starts, lasts = ends[:-1].long(), ends[1:].long()
    tokens = torch.arange(query.shape[2], device=query.device)
    document = torch.searchsorted(lasts, tokens, right=True)
    if len(starts) * longest > MOSTLY_PADDING * len(tokens):
        return _under_a_mask(query, key, value, document, how)
    columns = torch.arange(longest, device=query.device)
    # what lies behind a document is computed with and never read: causal order hides it before
    places = (starts[:, None] + columns).clamp(max=len(tokens) - 1)
    heads = query.shape[1]
    queries, keys, values = (_batched(tensor, places, heads) for tensor in (query, key, value))
    attended = scaled_dot_product_attention(
        queries.to(value.dtype),
        keys.to(value.dtype),
        values,
        attn_mask=band(longest, how.window, query.device) if how.slides(longest) else None,
        is_causal=not how.slides(longest),
        dropout_p=how.dropout,
        scale=how.scaling,
    )
    return attended.transpose(1, 2)[document, tokens - starts[document]][None]


def _under_a_mask(
    query: Tensor, key: Tensor, value: Tensor, document: Tensor, how: Weighing
) -> Tensor:
    """The same, of the row as it is; `document`: which one each token is of, int64 [tokens]."""
    heads, tokens = query.shape[1:3]
    seen = band(tokens, how.window, query.device) & (document[:, None] == document)
    keys, values = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    attended = scaled_dot_product_attention(
        query.to(value.dtype),
        keys.to(value.dtype),
        values,
        attn_mask=seen,
        dropout_p=how.dropout,
        scale=how.scaling,
    )
    return attended.transpose(1, 2)


def _batched(tensor: Tensor, places: Tensor, heads: int) -> Tensor:
    """[documents, heads, longest, dim] of [1, kv_heads, tokens, dim]: shared heads are repeated,
    since a kernel that knows them may take all of the scores into memory.
    """
    chosen = tensor[0][:, places].transpose(0, 1)
    return chosen.repeat_interleave(heads // tensor.shape[1], 1)


def band(tokens: int, window: int | None, device: torch.device) -> Tensor:
    """Which tokens see which, bool [tokens, tokens]: the last `window` before them and itself."""
    places = torch.arange(tokens, device=device)
    distance = places[:, None] - places
    return (distance >= 0) & (distance < (window or tokens))
