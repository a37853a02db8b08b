"""Layers whose weights bitsandbytes holds in 8 or 4 bits."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def keep_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at a model's first evaluation on a CPU with
    AVX-512 BF16.

    That rounds the constants of the quantization to bf16, so that a model which was evaluated
    trains on other weights than one which was not, and a resumed run differs from a straight one.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantized(layer: nn.Module) -> bool:
    """Whether bitsandbytes holds a layer's weight in few bits."""
    return type(layer).__name__ in ("Linear4bit", "Linear8bitLt")


def dequantized(layer: Any) -> Tensor:
    """The weight of a layer that is quantized, as it is computed with, in fp32, laid as the model
    has it in its files."""
    weight = layer.weight
    if type(layer).__name__ == "Linear4bit":
        return _as_in_files(_from_4_bits(weight), layer)
    scales = layer.state.SCB if weight.SCB is None else weight.SCB
    return _as_in_files(_from_8_bits(weight, scales), layer)


def quantized_again(layer: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight of a file as it is once it is quantized as `layer` is, from `dtype`, in fp32: as
    transformers does it when it loads one.
    """
    import bitsandbytes

    device = layer.weight.device
    weight = _as_in_files(weight, layer)  # and back: it is the same
    if type(layer).__name__ == "Linear4bit":
        names = ("quant_type", "compress_statistics", "blocksize", "quant_storage")
        options = {name: getattr(layer.weight, name) for name in names}
        value = weight.to(device, dtype)
        packed = bitsandbytes.nn.Params4bit(value, requires_grad=False, **options).to(device)
        return _as_in_files(_from_4_bits(packed), layer)
    value = weight.to("cpu", dtype)
    packed = bitsandbytes.nn.Int8Params(value, requires_grad=False).to(device)
    return _as_in_files(_from_8_bits(packed, packed.SCB), layer)


def _as_in_files(weight: Tensor, layer: Any) -> Tensor:
    """GPT-2's layers have theirs the other way round than linear ones, as which bitsandbytes holds
    them."""
    return weight.T.contiguous() if getattr(layer, "source_cls", None) is Conv1D else weight


def _from_4_bits(weight: Any) -> Tensor:
    import bitsandbytes

    plain: Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return plain.float()


def _from_8_bits(weight: Tensor, scales: Tensor) -> Tensor:
    import bitsandbytes

    plain: Tensor = bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scales)
    return plain.float()


def share_quantized(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer`, which is quantized, in the place of the one that has the weight `name`."""
    parent, _, child = name.rpartition(".")[0].rpartition(".")
    setattr(model.get_submodule(parent), child, copy.copy(layer))


def as_quantized(model: Any, like: Any) -> None:
    """Let PEFT see that a model's layers are quantized as those of another one are."""
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        if hasattr(like, name):
            setattr(model, name, getattr(like, name))
