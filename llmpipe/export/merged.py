"""A model folder of safetensors: the adapter is merged in fp32, and the sum is cast once."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmpipe.export.source import Source
from llmpipe.files.json import read_json, write_json
from llmpipe.run.folders import CONFIG

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_merged(source: Source, folder: Path, dtype: torch.dtype) -> list[str]:
    """Save the model in `dtype`, with tokenizer, template and generation configuration."""
    model = source.model
    model.save_pretrained(folder, state_dict=_cast(model.state_dict(), dtype))
    # transformers says there what the model in memory has
    path = folder / CONFIG
    write_json(path, read_json(path) | {"dtype": str(dtype).removeprefix("torch.")})
    source.tokenizer.save_pretrained(folder)
    return []


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in `dtype`; those that share their numbers still do."""
    cast: dict[int, Tensor] = {}
    for tensor in state.values():
        cast.setdefault(tensor.data_ptr(), tensor.to(dtype))
    return {name: cast[tensor.data_ptr()] for name, tensor in state.items()}
