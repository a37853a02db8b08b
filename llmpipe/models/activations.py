"""What a pass forward and backward takes of a device's memory beside weights, by a model's shape.

An estimate (`run.footprint`), to begin with: `training.memory` measures.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from llmpipe.models.hardware import Hardware
from llmpipe.run.footprint import Layer


def of_a_pass(model: PreTrainedModel, hardware: Hardware, kind: str, tokens: int) -> float:
    """Bytes that a pass of so many tokens takes; `kind`: of what is computed again."""
    layer = Layer.of(model.config.get_text_config().to_dict())
    kept = layer.kept(
        bf16=hardware.bf16,
        stream=max(p.dtype.itemsize for p in model.get_input_embeddings().parameters()),
        compiles=hardware.compiles,
        adapted=_adapted(model) / layer.layers,
    )
    return layer.of_a_pass(kept, kind, tokens)


def copies(model: PreTrainedModel, hardware: Hardware) -> float:
    """Bytes of the bf16 copies that a pass makes of weights in fp32."""
    if not hardware.bf16:
        return 0.0
    looked_up = {id(p) for p in model.get_input_embeddings().parameters()}
    cast = (p for p in model.parameters() if p.dtype.itemsize == 4 and id(p) not in looked_up)
    return sum(2.0 * p.numel() for p in cast)


def _adapted(model: PreTrainedModel) -> int:
    """Numbers that go into the adapters of a token."""
    layers = (module for module in model.modules() if hasattr(module, "lora_A"))
    return sum(int(getattr(layer, "in_features", 0)) for layer in layers)
