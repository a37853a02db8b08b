"""Overrides of TRL and transformers internals that are not a trainer's methods (`training`, `preference`).
`tests/engine/test_upstream.py` fails when one of any of them moves.

On CPU an SFT step loses most of its time in two places, and both are mended by `speed_up` without changing the result:

- the head: TRL projects every position to the vocabulary unless the device runs Triton, folds the logits in a dozen
  fp32 passes and multiplies the gradients in fp32. `LogProbs` scores only the positions that have a label, and its
  forward pass leaves the gradients behind (the idea of Liger's fused cross-entropy, https://arxiv.org/abs/2410.10989);
- attention: a packed row [d1 d2 d3] costs (d1+d2+d3)^2 under one dense block mask, d1^2+d2^2+d3^2 document by document.
  `documents_attention` does the latter.

On CUDA both have better answers upstream (Triton kernels, flash-attention's varlen path), and nothing is changed.
"""

import logging
import warnings
from contextlib import contextmanager

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available
from trl.kernels import ChunkedLogProbFunction

DOCUMENTS = "llmpipe_documents"
TILE = 256  # tokens that are multiplied with the head at once
CACHED = 3 << 18  # fp32 logits that exist at once: 3 MB stay in the cache, and are made in memory that is there already


def choose_attention(device_type: str, packed: bool) -> tuple[str, str]:
    """The `attn_implementation` to load a model with for training, and a sentence that says why."""
    if device_type == "cpu":
        return "sdpa", "on CPU sdpa, which then runs document by document instead of under one dense mask"
    if packed and device_type == "cuda" and is_flash_attn_2_available():
        return "flash_attention_2", "flash-attention's varlen kernel keeps packed documents apart without a mask"
    return "sdpa", "PyTorch's scaled dot product attention; a packed row gets one dense block mask"


def speed_up(model, *, device_type: str) -> None:
    """On CPU: `model`'s sdpa document by document, and TRL's fused head through `LogProbs`. Elsewhere nothing.

    Call before training. A model that was loaded with another attention (or knows no sdpa) keeps it. The saved
    configuration names no attention, so nothing of this is left in the artifact.
    """
    if device_type != "cpu":
        return
    import trl.trainer.utils  # here, since it imports bitsandbytes, which `silence` has to precede

    AttentionInterface.register(DOCUMENTS, documents_attention)
    AttentionMaskInterface.register(DOCUMENTS, documents_mask)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(DOCUMENTS)
    trl.trainer.utils._use_triton = lambda device: device.type in ("cpu", "cuda", "xpu")  # decides `compact`
    trl.trainer.utils._ChunkedLogProbFunction = LogProbs


@contextmanager
def contiguous_head(model):
    """Hand the head whole rows. transformers hands it a slice, the last positions; where the weight is frozen, a matmul
    of PyTorch on CPU then copies all of it once per row, 3.6 GB and 10 s for 64 rows of a vocabulary of 49,152."""
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))
    try:
        yield
    finally:
        hook.remove()


def attention_of(kind, wanted):
    """The attention that a model class can be loaded with: the wanted one, else sdpa, else eager."""
    flash = getattr(
        kind, "_compatible_flash_implementations", None
    )  # else transformers takes another kernel, of the Hub
    able = {
        "flash_attention_2": getattr(kind, "_supports_flash_attn", True)
        and (not flash or "flash_attention_2" in flash),
        "sdpa": getattr(kind, "_supports_sdpa", True),
    }
    return next(name for name in (wanted, "sdpa", "eager") if able.get(name, True))


def as_loaded(model) -> None:
    """Leave what only training computes with: an attention that may run in half precision alone, and the routing that
    a mixture of experts returns, by TRL's order in the configuration: with it a cached step of generation breaks."""
    model.set_attn_implementation(attention_of(model, "sdpa"))
    unrouted(model.config)


def unrouted(config) -> None:
    if getattr(config.get_text_config(), "output_router_logits", False):
        config.get_text_config().output_router_logits = False


@contextmanager
def generating(model):
    """Compute padded batches with a cache: as a model is loaded, and with whole rows for the head."""
    attention, config = model.config._attn_implementation, model.config.get_text_config()
    routed = getattr(config, "output_router_logits", False)
    as_loaded(model)
    try:
        with contiguous_head(model):
            yield
    finally:
        model.set_attn_implementation(attention)
        if routed:
            config.output_router_logits = True


@contextmanager
def ranking(kind):
    """Make reward models of causal ones, of the class `kind`, without a word of the head that is new and of the one
    that is left out. TRL has the same for heads called `lm_head` only; Pythia's is `embed_out`."""
    names = ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected")
    old = [getattr(kind, name) for name in names]
    for name, known, head in zip(names, old, (r"^score\.", r"^(lm_head|embed_out)\."), strict=True):
        setattr(kind, name, [*(known or []), head])
    try:
        yield
    finally:
        for name, known in zip(names, old, strict=True):
            setattr(kind, name, known)


def documents_mask(batch_size, q_length, kv_length, q_offset=0, mask_function=None, attention_mask=None,
                   local_size=None, use_vmap=False, allow_is_causal_skip=True, device="cpu", **kwargs):  # fmt: skip
    """What stands for the mask in `documents_attention`.

    Returns None (plain causal), the documents' lengths of a packed row as int64 [documents], or sdpa's bool [batch, 1,
    q_length, kv_length] where neither is enough: left padding, a cache, a sliding window, bidirectional blocks.
    """
    whole = q_length == kv_length and not use_vmap and (local_size is None or local_size >= q_length)
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


def documents_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Causal attention within each document of one packed row; everything else goes to transformers' sdpa.

    query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim], attention_mask from `documents_mask`.
    Returns [1, tokens, heads, dim] and None (no weights).
    """
    if attention_mask is None or attention_mask.ndim != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise ValueError("attention by document knows no soft cap and no position bias: load the model with `eager`")
    lengths = attention_mask.tolist()
    gqa = query.shape[1] != key.shape[1]
    # fp32 also under autocast: the backward pass of PyTorch's CPU kernel takes 2.8 ms in fp32 and 9.1 ms in bf16 at 150
    # tokens, and the same at 1,000. `split`, not slices: a slice's gradient is a row of zeros for each document.
    parts = zip(*(tensor.float().split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    with torch.autocast("cpu", enabled=False):
        done = [
            scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=gqa)
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
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        learning = torch.is_grad_enabled()  # inside `forward` it is always off
        found = super(LogProbs, LogProbs).apply(hidden, weight, targets, learning, dtype, frozenset(outputs))
        logprobs, *more = found
        names = ("entropy", "mean_logits", "is_top1")
        entropy, mean, top1 = (value if name in outputs else None for name, value in zip(names, more, strict=True))
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
                    expected = torch.stack([torch.dot(*pair) for pair in zip(p, z, strict=True)])  # of z under p
                    entropy[rows] = log_z.squeeze(1) - expected / total.squeeze(1)
                if "is_top1" in outputs:  # looked for where the target may be it; of equal ones the first counts
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


def with_bias(model):
    """`model`; PEFT's wrapper of a tied head that learns new tokens lacks the `bias` that TRL's fused head reads."""
    head = model.get_output_embeddings()
    if head is not None and not hasattr(head, "bias"):
        head.bias = None
    return model


def keep_unpacked(model) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at a model's first evaluation on a CPU with AVX-512 BF16.

    That rounds the constants of the quantization to bf16, so that a model which was evaluated trains on other weights
    than one which was not, and a resumed run differs from a straight one.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


NOISE = {  # logger -> words of a line that is of no use to the user, and why
    # bitsandbytes probes an optional 4-bit kernel of the Hub at import; without it the built-in one runs
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # a tied head is in no checkpoint; that a checkpoint is whole is checked by its sums
    "transformers.trainer": "There were missing keys in the checkpoint model loaded: ['lm_head.weight']",
    # said for micro-batches of one, which cost nothing where documents are attended one by one
    "trl.trainer.sft_trainer": "You are using a per_device_train_batch_size of 1 with padding-free training",
}


def silence() -> None:
    """Drop the lines that say nothing to a user. Call before TRL's trainers, and so bitsandbytes, are imported."""
    for name, words in NOISE.items():
        logging.getLogger(name).addFilter(lambda record, words=words: words not in record.getMessage())
    # TRL still spells `gradient_checkpointing` as transformers used to: no act of the user's
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    # and PEFT asks a model for it under its old name
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # and of experts held in one tensor it looks for the ranks among the modules, though it has set and heeds them
    warnings.filterwarnings("ignore", r"The following .*_pattern keys .*\['[^',]*gate_up_proj'\]", RuntimeWarning)
    warnings.filterwarnings(
        "ignore", "Paged optimizers are not supported on CPU", UserWarning
    )  # said once, by `hardware`
