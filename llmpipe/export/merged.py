"""A model folder of safetensors: the adapter is merged in fp32, and the sum is cast once."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from llmpipe.export.source import Source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_merged(source: Source, folder: Path, dtype: torch.dtype) -> list[str]:
    """Save the model in `dtype`, with tokenizer, template and generation configuration."""
    model = source.model
    config = model.config
    model.config = copy.deepcopy(config)
    model.config.dtype = dtype
    try:
        model.save_pretrained(folder, state_dict=_cast(model.state_dict(), dtype))
    finally:
        model.config = config
    source.tokenizer.save_pretrained(folder)
    return []


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in `dtype`; those that share their numbers still do."""
    cast: dict[int, Tensor] = {}
    for tensor in state.values():
        cast.setdefault(tensor.data_ptr(), tensor.to(dtype))
    return {name: cast[tensor.data_ptr()] for name, tensor in state.items()}
