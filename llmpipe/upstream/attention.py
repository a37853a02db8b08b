"""An attention of transformers' for rows in which documents lie end to end: no mask is made for
them, since the batch says where they end (`cu_seq_lens_q`, as TRL's padding-free collator has it).

A padded batch is laid end to end before the first layer and padded again behind the last, so that
no layer computes padding. Of all else the mask says what is seen: see `documents_mask`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmpipe.kernels import apart, cpu, cuda
from llmpipe.kernels.apart import Weighing

DOCUMENTS = "llmpipe_documents"
"""The `attn_implementation` of attention document by document."""

KNOWN = {"full_attention", "sliding_attention"}
"""Kinds of layers whose attention is all that the ends of documents decide."""


def attend_by_document(model: PreTrainedModel, device_type: str) -> None:
    """Let `model` attend document by document, where `fits` says that it can, and where it has
    attention that looks back alone: BERT's looks both ways, Doge's chooses by its mask.

    The saved configuration names no attention, so nothing of this is left in an artifact.
    """
    AttentionInterface.register(DOCUMENTS, documents_attention)
    AttentionMaskInterface.register(DOCUMENTS, documents_mask)
    looks_back = any(getattr(module, "is_causal", False) for module in model.modules())
    attention = model.config._attn_implementation
    if looks_back and fits(type(model), model.config, attention, device_type):
        model.set_attn_implementation(DOCUMENTS)
        read_ends(model)


def fits(
    model: type[PreTrainedModel], config: PretrainedConfig, attention: str, device_type: str
) -> bool:
    """Whether a model of this class, loaded with some `attention`, attends as
    `documents_attention` can: to a document, or to a window of it. Bounded products (Gemma 2) are
    computed document by document on a CPU alone.
    """
    text = config.get_text_config()
    bounds = getattr(text, "attn_logit_softcapping", None)  # then the class knows no sdpa
    if bounds and device_type != "cpu":
        return False
    loaded = attention == "sdpa" or (attention == "eager" and bounds and not model._supports_sdpa)
    kinds = set(getattr(text, "layer_types", None) or KNOWN)
    in_chunks = getattr(text, "attention_chunk_size", None)
    known = bool(loaded) and kinds <= KNOWN and not in_chunks
    return known and model._can_set_attn_implementation()


def read_ends(model: PreTrainedModel) -> None:
    """Let the body of `model` make no mask where it is known where documents end: where the batch
    says so, and in a padded batch, whose rows it then lays end to end.
    """
    body = model.base_model
    if body is model:  # Mllama's text, whose body has no name
        return
    if model.config._attn_implementation == DOCUMENTS:
        body.register_forward_pre_hook(_lay_out, with_kwargs=True)
        body.register_forward_hook(_pad_again)


def read_real_tokens(model: PreTrainedModel) -> None:
    """Let a pass of `model` also take `real_tokens`, int64 [tokens]: the places of what is no
    padding among the tokens of all rows. The host knows them, and a device is not asked.
    """
    plain, body = model.forward, model.base_model

    def forward(self: Any, *args: Any, real_tokens: Tensor | None = None, **kwargs: Any) -> Any:
        body.real_tokens = real_tokens
        return plain(*args, **kwargs)

    model.forward = MethodType(forward, model)


def _lay_out(body: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The arguments of a body's forward pass, without a mask where none is needed."""
    body.places = None
    places = vars(body).pop("real_tokens", None)
    if body.config._attn_implementation != DOCUMENTS:
        return arguments, options
    ends = options.get("cu_seq_lens_q")
    if ends is not None:
        mask = _as_mask(ends, options["max_length_q"])
        return arguments, {**options, "attention_mask": mask}
    ids = arguments[0] if len(arguments) == 1 else options.get("input_ids")
    if len(arguments) > 1 or ids is None or not _is_padded(body, ids, options):
        return arguments, options
    mask = options["attention_mask"].bool()
    if places is None:
        places = mask.flatten().nonzero().flatten()
    body.places = (places, mask.shape)
    positions = options.get("position_ids")
    if positions is None:
        positions = torch.arange(mask.shape[1], device=mask.device)
    positions = positions.expand(mask.shape).flatten()
    ends = nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    return (), {
        **options,
        "input_ids": ids.flatten()[places][None],
        "position_ids": positions[places][None],
        "attention_mask": _as_mask(ends, mask.shape[1]),
    }


def _as_mask(ends: Tensor, longest: int) -> Tensor:
    """The ends, int32 [documents + 1], in a mask's place: [1, 1, longest, documents + 1].

    transformers takes a mask of four dimensions as it is, and hands it to every layer; keyword
    arguments reach the attention of some architectures only. No memory is taken.
    """
    return ends.view(1, 1, 1, -1).expand(1, 1, longest, -1)


def _is_padded(body: Any, ids: Tensor, options: dict[str, Any]) -> bool:
    """Whether only the last states are asked for, of rows of which a mask of two dimensions says
    which tokens are real, with no cache.
    """
    text = body.config.get_text_config()
    mask = options.get("attention_mask")
    more = ("past_key_values", "output_hidden_states", "output_attentions", "output_router_logits")
    asked = any(options.get(name) or getattr(text, name, None) for name in more)
    caches = options.get("use_cache") is not False
    plain = isinstance(mask, Tensor) and mask.shape == ids.shape
    beside = ("inputs_embeds", "token_type_ids")
    alone = all(options.get(name) is None for name in beside)
    return plain and alone and not asked and not caches


def _pad_again(body: Any, _: Any, out: Any) -> Any:
    """States of tokens end to end, as a padded batch [rows, tokens, width]; 0 for padding."""
    laid = vars(body).pop("places", None)
    if laid is not None:
        places, shape = laid
        states = out.last_hidden_state[0]
        padded = states.new_zeros(shape.numel(), states.shape[1])
        out.last_hidden_state = padded.index_copy(0, places, states).view(*shape, -1)
    return out


def documents_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """What stands for the mask in `documents_attention`; called as `sdpa_mask` is.

    Returns None (plain causal), the documents' lengths of a packed row as int64 [documents], or
    sdpa's bool [batch, 1, q_length, kv_length] where neither is enough: left padding, a cache, a
    sliding window, bidirectional blocks.
    """
    local_size = options.get("local_size")
    looks_far = local_size is None or local_size >= q_length
    may_be_causal = options.get("allow_is_causal_skip", True)  # not so where a row is packed
    if q_length == kv_length and looks_far and not options.get("use_vmap", False):
        if attention_mask is not None and may_be_causal and _padded_right(attention_mask):
            return None  # no real token comes after the padding, so causal order hides it
        if attention_mask is None and not may_be_causal and options["batch_size"] == 1:
            lengths = _document_lengths(mask_function, q_length, options.get("device", "cpu"))
            if lengths is not None:
                return lengths
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **options,
    )


def _padded_right(attention_mask: Tensor) -> bool:
    """Whether no row of a bool mask [batch, tokens] begins again after padding."""
    return not bool((attention_mask[:, 1:] & ~attention_mask[:, :-1]).any())


def _document_lengths(
    mask_function: Callable[..., Tensor], tokens: int, device: torch.device | str
) -> Tensor | None:
    """Lengths of the documents of a packed row, int64 [documents]; None where a token sees the one
    that comes after it. `mask_function(batch, head, query, key)` says which tokens see which.
    """
    later = torch.arange(1, tokens, device=device)
    zero = torch.zeros_like(later)
    if mask_function(zero, zero, later - 1, later).any():
        return None
    sees_the_one_before = mask_function(zero, zero, later, later - 1)
    starts = (~sees_the_one_before).nonzero().flatten() + 1
    return torch.cat([starts.new_zeros(1), starts, starts.new_full((1,), tokens)]).diff()


def documents_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention within each document of one packed row; all else goes to transformers' sdpa.

    query [batch, heads, tokens, dim], key and value [batch, kv_heads, tokens, dim], attention_mask
    from `documents_mask` or `_as_mask`. Returns [batch, tokens, heads, dim] and None (no weights).
    Raises ValueError for what is more than attention between queries and keys.
    """
    more = [name for name in ("position_bias", "s_aux") if options.get(name) is not None]
    if more:
        raise ValueError(f"attention by document knows no {more[0]}: load the model with `eager`")
    how = Weighing(
        options.get("dropout", 0.0),
        options.get("scaling"),
        options.get("sliding_window"),
        options.get("softcap"),
    )
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        ends, longest = attention_mask[0, 0, 0], attention_mask.shape[2]
    elif attention_mask is not None and attention_mask.ndim == 1:
        ends, longest = _ends(attention_mask)
    elif how.cap is not None:
        return _bounded(query, key, value, attention_mask, how), None
    else:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if query.is_cuda and how.cap is None:
        return cuda.attend_documents(query, key, value, ends, longest, how), None
    return _on_the_host(query, key, value, ends, how), None


def _ends(lengths: Tensor) -> tuple[Tensor, int]:
    """Where documents of these lengths begin and end, int32 [documents + 1], and the longest."""
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return ends.int(), int(lengths.max())


def _bounded(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, how: Weighing
) -> Tensor:
    """Attention with bounded products in a plain batch, which sdpa does not know."""
    seen = attention_mask
    if seen is None and query.shape[2] > 1:
        seen = apart.band(query.shape[2], None, query.device)
    return cpu.bounded(query, key, value, seen, how).transpose(1, 2).contiguous()


@torch.compiler.disable
def _on_the_host(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, how: Weighing) -> Tensor:
    """`cpu.attend_documents`, which a compiler is not shown: its lengths are others each time."""
    lengths = [length for length in ends.diff().tolist() if length]
    return cpu.attend_documents(query, key, value, lengths, how)
