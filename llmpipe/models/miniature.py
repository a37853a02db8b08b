"""The same architecture in small: two layers, or as many as it takes to have one of each kind, with
random weights in fp32. What an architecture does is seen in it exactly and at once, where in a deep
model, in bf16, it hides among what rounding does.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmpipe.faults import of_memory
from llmpipe.models.adapters import plain_layer
from llmpipe.models.rng import isolated_rng
from llmpipe.parallel.parts import plain_class
from llmpipe.upstream.attention import read_ends

LAYERS = 2  # at least, so that one reads what another wrote
VOCABULARY = 64
WINDOW = 4  # tokens, of what slides or comes in chunks where the model's rows are longer than that
EXPERTS = 4
POSITIONS = 64
MOST = 100_000_000  # weights: 0.4 GB, drawn in a second

HEADS = ("num_attention_heads", "num_heads", "n_mamba_heads")
"""Where a configuration has the number of heads: all widths are cut by what is left of the first
one that it has."""

WIDTHS = (
    "hidden_size word_embed_proj_dim embedding_size mamba_d_ssm mamba_hidden_dim block_dim "
    "block_ff_dim conv_dim conv_dim_out lru_width attention_hidden_size"
).split()
COUNTS = (
    "num_attention_heads num_heads n_mamba_heads mamba_n_heads mamba_num_heads num_linear_heads "
    "linear_num_key_heads linear_num_value_heads"
).split()
"""Widths and numbers of heads that only fit one another as they are: the width of a head stays."""

FREE = (
    "intermediate_size ffn_dim n_inner ffn_hidden_size moe_intermediate_size d_inner "
    "shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp "
    "moe_shared_expert_intermediate_size hidden_size_per_layer_input"
).split()
"""Widths that may be anything."""

GROUPS = ("num_key_value_heads", "num_kv_heads", "num_key_value_groups")
"""Heads that several of the queries' share."""

ROUTED = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts")
WINDOWS = ("sliding_window", "attention_window_size", "window_size", "attention_chunk_size")
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id")


def miniatures(
    model: PreTrainedModel, row: int, device: torch.device | None = None
) -> Iterator[PreTrainedModel]:
    """Small models of the class and the configuration of `model`, on its device or on another, in
    evaluation mode, with the attention that it has. The first is the smallest; each of the others
    may compute where that one does not, since other things of it are as they were.

    `row`: tokens that the model sees at once; a window that is shorter stays shorter than a row.
    """
    kinds = [_kind(layer) for layer in _layers(model)]
    firsts = sorted({kinds.index(kind) for kind in kinds})
    few = firsts if len(firsts) >= LAYERS else [*range(min(LAYERS, len(kinds)))]
    up_to_the_last = [*range(max(few, default=-1) + 1)]  # where kinds follow from the places
    for layers in (few, up_to_the_last) if few != up_to_the_last else (few,):
        for share in _shares(model.config.get_text_config()) if layers else ():
            config = _cut(model.config, layers, share, row)
            if _weights(model, config) > MOST:
                break
            small = _build(model, config, device or model.device)
            if small is not None and {_kind(layer) for layer in _layers(small)} == set(kinds):
                yield small


# --- which layers there are ---


def _layers(model: Any) -> list[nn.Module]:
    """The layers, in the list that has as many modules as the configuration has layers."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((list(layers) for layers in lists if len(layers) == depth), [])


def _kind(layer: nn.Module) -> frozenset[Any]:
    """What a layer is made of: the classes of its parts and what is switched on in them, whatever
    their widths, and whatever an adapter or a quantization puts around them.
    """
    return frozenset(_parts(layer, ""))


def _parts(module: nn.Module, name: str) -> Iterator[Any]:
    module = plain_layer(module)
    if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
        return  # of which there are others for few bits
    switches = tuple(
        (key, value if isinstance(value, bool | str) else value is None)
        for key, value in sorted(vars(module).items())
        if key[0] != "_" and key != "training" and isinstance(value, bool | str | None)
    )
    yield re.sub(r"\d+", "*", name), plain_class(module).__name__, switches
    for child, inside in module.named_children():
        yield from _parts(inside, f"{name}.{child}")


# --- a smaller configuration ---


def _shares(text: PretrainedConfig) -> Iterator[float]:
    """What shares of the heads to try: two, some more where their number has to divide by
    something, and all of them.
    """
    count = next((count for name in HEADS if (count := _number(text, name))), 16)
    yield from (few / count for few in (2, 4, 8) if few < count)
    yield 1.0


def _cut(config: PretrainedConfig, layers: list[int], share: float, row: int) -> PretrainedConfig:
    """`config` with these layers, this share of the heads and widths, and few of what there may be
    any number of.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config()
    numbers = _numbers(text, share, row)
    depth = getattr(text, "num_hidden_layers", None)
    for name, value in list(vars(text).items()):  # what is said of each layer
        if isinstance(value, list | tuple) and len(value) == depth:
            setattr(text, name, [value[i] for i in layers])
    text.num_hidden_layers = len(layers)
    text.vocab_size = VOCABULARY
    for name, number in numbers.items():
        setattr(text, name, number)
    for part in (small, text):
        for name in SPECIAL:
            if getattr(part, name, None) is not None:
                setattr(part, name, 0)
        part.__dict__.pop("quantization_config", None)
        part.__dict__.pop("distributed_config", None)
    for name in small.sub_configs:  # what sees or hears, and is asked nothing
        tower: Any = getattr(small, name, None)
        if tower is not text and _number(tower, "num_hidden_layers"):
            tower.num_hidden_layers = 1
    return small


def _numbers(text: PretrainedConfig, share: float, row: int) -> dict[str, int]:
    """The numbers that a configuration has, cut."""
    chosen = next((count for name in CHOSEN if (count := _number(text, name))), 1)
    experts = max(EXPERTS, 2 * chosen, 2 * _number(text, "n_group"))
    rules: list[tuple[Sequence[str], Callable[[int], int]]] = [
        (WIDTHS, lambda width: 8 * math.ceil(width * share / 8)),  # as kernels want them
        (COUNTS, lambda count: max(1, round(count * share))),
        (FREE, lambda width: max(8, int(width * share) // 8 * 8)),
        (GROUPS, lambda count: max(1, int(count * share))),
        (ROUTED, lambda count: min(count, experts)),
        (WINDOWS, lambda window: WINDOW if window < row else window),
        (("max_position_embeddings",), lambda positions: max(positions, POSITIONS)),
    ]
    return {
        name: cut(number)
        for names, cut in rules
        for name in names
        if (number := _number(text, name)) > 0
    }


def _number(text: Any, name: str) -> int:
    """A number of a configuration; 0 where it has none of that name."""
    value = getattr(text, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


# --- a model of it ---


def _weights(model: PreTrainedModel, config: PretrainedConfig) -> int:
    """How many weights such a model would have; 0 where there is none of these numbers."""
    try:
        with torch.device("meta"):
            return plain_class(model)._from_config(copy.deepcopy(config)).num_parameters()
    except Exception:  # whatever a class thinks of numbers that do not fit one another
        return 0


def _build(
    model: PreTrainedModel, config: PretrainedConfig, device: torch.device
) -> PreTrainedModel | None:
    """A model with random weights; None where there is none of these numbers."""
    attention = model.config._attn_implementation
    with isolated_rng():
        try:
            small = plain_class(model)._from_config(config, dtype=torch.float32)
            small.set_attn_implementation(attention)
        except Exception as error:  # whatever a class thinks of numbers that do not fit
            if of_memory(error):
                raise
            return None
        _draw(small)
    read_ends(small)
    return small.to(device).eval()


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    """Weights with which every part has a say: outputs are as large as inputs, and nothing is 0."""
    for weight in model.parameters():
        if weight.ndim >= 2:
            weight.normal_(std=weight.shape[-1] ** -0.5)
        else:
            weight.add_(torch.randn_like(weight), alpha=0.1)
