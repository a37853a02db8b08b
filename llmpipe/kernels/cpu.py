"""Attention document by document and log-probabilities of the head, on a CPU."""

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.kernels import ChunkedLogProbFunction

DOCUMENTS = "llmpipe_documents"

TILE = 256  # tokens that are multiplied with the head at once

CACHED = (
    3 << 18
)  # fp32 logits that exist at once: 3 MB stay in the cache, and are made in memory that is there already


def documents_mask(batch_size, q_length, kv_length, q_offset=0, mask_function=None, attention_mask=None,
                   local_size=None, use_vmap=False, allow_is_causal_skip=True, device="cpu", **kwargs):  # fmt: skip
    """What stands for the mask in `documents_attention`.

    Returns None (plain causal), the documents' lengths of a packed row as int64 [documents], or sdpa's bool [batch, 1,
    q_length, kv_length] where neither is enough: left padding, a cache, a sliding window, bidirectional blocks.
    """
    whole = (
        q_length == kv_length and not use_vmap and (local_size is None or local_size >= q_length)
    )
    padded = attention_mask is not None and allow_is_causal_skip
    if whole and padded and not (attention_mask[:, 1:] & ~attention_mask[:, :-1]).any():
        return None  # padding on the right: no real token comes after it, so causal order hides it
    if whole and attention_mask is None and not allow_is_causal_skip and batch_size == 1:
        here = torch.arange(1, q_length, device=device)
        zero = torch.zeros_like(here)
        if not mask_function(zero, zero, here - 1, here).any():  # nothing looks ahead
            starts = (~mask_function(zero, zero, here, here - 1)).nonzero().flatten() + 1
            return torch.cat([starts.new_zeros(1), starts, starts.new_full((1,), q_length)]).diff()
    return sdpa_mask(batch_size, q_length, kv_length, q_offset=q_offset, mask_function=mask_function, device=device,
                     attention_mask=attention_mask, local_size=local_size, use_vmap=use_vmap,
                     allow_is_causal_skip=allow_is_causal_skip, **kwargs)  # fmt: skip


def documents_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs
):
    """Causal attention within each document of one packed row; everything else goes to transformers' sdpa.

    query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim], attention_mask from `documents_mask`.
    Returns [1, tokens, heads, dim] and None (no weights).
    """
    if attention_mask is None or attention_mask.ndim != 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise ValueError(
            "attention by document knows no soft cap and no position bias: load the model with `eager`"
        )
    lengths = attention_mask.tolist()
    gqa = query.shape[1] != key.shape[1]
    # fp32 also under autocast: the backward pass of PyTorch's CPU kernel takes 2.8 ms in fp32 and 9.1 ms in bf16 at 150
    # tokens, and the same at 1,000. `split`, not slices: a slice's gradient is a row of zeros for each document.
    parts = zip(
        *(tensor.float().split(lengths, dim=2) for tensor in (query, key, value)), strict=True
    )
    with torch.autocast("cpu", enabled=False):
        done = [
            scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=gqa
            )
            for q, k, v in parts
        ]
    return torch.cat(done, dim=2).transpose(1, 2).contiguous().to(value.dtype), None


class LogProbs(torch.autograd.Function):
    """`trl.kernels.ChunkedLogProbFunction` on CPU: the same arguments and outputs, fewer passes.

    hidden [n, width], weight [vocab, width], targets [n] -> log-probabilities, and entropy, None, mean_logits, is_top1
    as far as `outputs` names them, each [n].
    d log p_t / d logits = onehot(t) - p needs nothing from the backward pass but one factor per token, so the forward
    pass keeps it (in the products' precision: n x vocab x 2 bytes in bf16) along with its product with the weight.
    """

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
        plain = bias is None and softcap is None and scale == temperature == 1.0
        if hidden.device.type != "cpu" or not plain or "log_sum_sq_probs" in outputs:
            return ChunkedLogProbFunction.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs
            )
        dtype = (
            torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        )
        learning = torch.is_grad_enabled()  # inside `forward` it is always off
        found = super(LogProbs, LogProbs).apply(
            hidden, weight, targets, learning, dtype, frozenset(outputs)
        )
        logprobs, *more = found
        names = ("entropy", "mean_logits", "is_top1")
        entropy, mean, top1 = (
            value if name in outputs else None for name, value in zip(names, more, strict=True)
        )
        return logprobs, entropy, None, mean, top1

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # it would round the entropy's product
    def forward(ctx, hidden, weight, targets, learning, dtype, outputs):
        h, w, n = hidden.to(dtype), weight.to(dtype), len(targets)
        logprobs, entropy, mean = torch.empty(n), torch.empty(n), torch.empty(n)
        top1 = torch.zeros(n, dtype=torch.bool)
        grad_logits = torch.empty(n, len(w) if learning else 0, dtype=dtype)
        grad_hidden = torch.empty_like(h)
        most = min(TILE, max(1, CACHED // len(w)))
        z_room, p_room = torch.empty(most, len(w)), torch.empty(most, len(w))
        for start in range(0, n, TILE):
            logits = h[start : start + TILE] @ w.T
            for first in range(start, min(start + TILE, n), most):
                rows = slice(first, min(first + most, start + TILE, n))
                count, t = rows.stop - first, targets[rows, None]
                z = z_room[:count].copy_(logits[first - start : rows.stop - start])
                if "mean_logits" in outputs:
                    mean[rows] = z.mean(-1)
                z.sub_(z.amax(-1, keepdim=True))
                p = torch.exp(z, out=p_room[:count])
                total = p.sum(-1, keepdim=True)
                log_z, z_t = total.log(), z.gather(1, t)
                logprobs[rows] = (z_t - log_z).squeeze(1)
                if "entropy" in outputs:
                    expected = torch.stack(
                        [torch.dot(*pair) for pair in zip(p, z, strict=True)]
                    )  # of z under p
                    entropy[rows] = log_z.squeeze(1) - expected / total.squeeze(1)
                if (
                    "is_top1" in outputs
                ):  # looked for where the target may be it; of equal ones the first counts
                    best = (z_t == 0).squeeze(1).nonzero().squeeze(1)
                    top1[first + best] = z[best].argmax(-1) == t[best, 0]
                if learning:
                    grad_logits[rows] = p.div_(-total).scatter_add_(1, t, torch.ones_like(total))
            if learning:
                tile = slice(start, start + TILE)
                grad_hidden[tile] = grad_logits[tile] @ w
        ctx.save_for_backward(h, grad_hidden, grad_logits)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(entropy, mean, top1)
        return logprobs, entropy, mean, top1

    @staticmethod
    def backward(ctx, grad, *_):
        h, grad_hidden, grad_logits = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (grad_logits.T @ (h * grad[:, None]).to(h.dtype)).to(weight_dtype)
        return (grad_hidden * grad[:, None]).to(hidden_dtype), to_weight, None, None, None, None
