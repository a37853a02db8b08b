"""Weights in 8 bits by torchao, for transformers.

Imported only where torchao is installed: pip install 'llmpipe[torchao]'.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.export.merged import write_merged
from llmpipe.export.readers.of_transformers import Loaded, named
from llmpipe.export.source import Source
from llmpipe.export.tensors import same_weights, weights_of
from llmpipe.faults import reading
from llmpipe.models.pretrained import load_tokenizer


def _config() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def write_weight_only(source: Source, folder: Path) -> list[str]:
    """Save the model with linear layers in 8 bits, a scale a row; all else stays in fp32.

    Raises UserError (2) for a model that has none.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        whole = Path(place)
        write_merged(source, whole, torch.float32)
        model = _load(whole, _config())
    if not any(type(weight) is not nn.Parameter for weight in model.parameters()):
        kind = source.model.config.model_type
        problem = f"formats.torchao: no layer of {kind} is a linear one: nothing would be in 8 bits"
        raise UserError(problem, "take gguf, or merged")
    model.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    return []


def read_weight_only(folder: Path, source: Source) -> Loaded:
    """As transformers and torchao load it. Raises UserError (3) where the weights are not the
    source's."""
    model = _load(folder, None)
    seen = {
        name: weight.dequantize() if hasattr(weight, "dequantize") else weight
        for name, weight in weights_of(model).items()
    }
    tensors = same_weights(source.weights, seen, None, updates=source.updates)
    return Loaded(named("torchao"), model, load_tokenizer(folder), source, tensors)


def _load(folder: Path, config: TorchAoConfig | None) -> Any:
    with reading(folder, "a model of torchao's", Exception, code=INTEGRITY):
        options = {"quantization_config": config} if config else {}
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            **options,
        ).eval()
