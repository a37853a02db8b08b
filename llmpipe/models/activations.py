"""What a pass forward and backward takes of a device's memory beside weights, by a model's shape.

An estimate, to begin with: `training.memory` measures. It counts what each layer keeps for its
backward pass as Korthikanti 2022 does (https://arxiv.org/abs/2205.05198, section 4), with a gated
MLP, attention whose scores are in no memory, and a head whose logits are in none either. On an
H100 (SmolLM2-1.7B's shape) it was 5 to 15 % above what was seen.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from llmpipe.models.hardware import Hardware

COMPILED = 0.6
"""Of what a layer keeps where it is compiled: norms and activations are computed again there."""

HEAD = 1 << 30
"""Bytes of the logits that exist at once."""


def of_a_pass(model: PreTrainedModel, hardware: Hardware, kind: str, tokens: int) -> float:
    """Bytes that a pass of so many tokens takes; `kind`: of what is computed again."""
    layer = _layer(model, hardware)
    layers = model.config.get_text_config().num_hidden_layers
    # the gradients of a layer, or what is computed again of it, exist beside what is kept
    return HEAD + tokens * (layers * layer[kind] + layer["none"])


def copies(model: PreTrainedModel, hardware: Hardware) -> float:
    """Bytes of the bf16 copies that a pass makes of weights in fp32."""
    if not hardware.bf16:
        return 0.0
    looked_up = {id(p) for p in model.get_input_embeddings().parameters()}
    cast = (p for p in model.parameters() if p.dtype.itemsize == 4 and id(p) not in looked_up)
    return sum(2.0 * p.numel() for p in cast)


def _layer(model: PreTrainedModel, hardware: Hardware) -> dict[str, float]:
    """Bytes that a layer keeps of a token, by what is computed again."""
    config = model.config.get_text_config()
    width = config.hidden_size
    heads = _number(config, "num_attention_heads") or 1
    dim = _number(config, "head_dim") or width // heads
    queries = heads * dim
    keys = (_number(config, "num_key_value_heads") or heads) * dim
    inner = _inner(config, width)
    number = 2 if hardware.bf16 else 4
    rounded = 2 if hardware.bf16 else 0  # beside the fp32 that it was
    stream = max(p.dtype.itemsize for p in model.get_input_embeddings().parameters())
    norms = 2 * width * (stream + 4 + rounded)
    attention = number * (2 * queries + 2 * keys)
    adapters = (number + 1) * _adapted(model) / config.num_hidden_layers
    none = norms + attention + 4 * number * inner + adapters
    selective = stream * width + attention + number * (2 * width + 2 * inner)
    if hardware.compiles:
        none = COMPILED * none
        selective = min(selective, none)
    return {"none": none, "selective": selective, "full": float(stream * width)}


def _inner(config: Any, width: int) -> int:
    """Width of the MLP, or of all experts of a token."""
    inner = _number(config, "intermediate_size") or _number(config, "ffn_dim") or 4 * width
    experts = _number(config, "num_experts_per_tok")
    if not experts:
        return inner
    return experts * (_number(config, "moe_intermediate_size") or inner)


def _number(config: Any, name: str) -> int:
    """A number of a configuration, 0 where it has none or several."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def _adapted(model: PreTrainedModel) -> int:
    """Numbers that go into the adapters of a token."""
    layers = (module for module in model.modules() if hasattr(module, "lora_A"))
    return sum(int(getattr(layer, "in_features", 0)) for layer in layers)
