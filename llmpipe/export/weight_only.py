"""Weights of 8 and 4 bits for transformers, by torchao and by bitsandbytes.

torchao is imported only where it is installed: pip install 'llmpipe[torchao]'.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.export.merged import write_merged
from llmpipe.export.readers.of_transformers import Loaded, named, same_head
from llmpipe.export.source import Source
from llmpipe.export.tensors import same_weights, weights_of
from llmpipe.faults import reading
from llmpipe.models.pretrained import load_tokenizer, saved_in
from llmpipe.upstream import few_bits

GROUP = 32
"""Weights that share a scale of torchao's 4 bits, as in the models that PyTorch has made for
phones."""

# --- torchao ---


def write_torchao(source: Source, folder: Path, bits: str) -> list[str]:
    """Save the model with linear layers in 8 bits, a scale a row, or in 4 bits, a scale a group;
    all else stays in fp32.

    Raises UserError (2) for a model that has none, or one that groups do not divide.
    """
    if bits == "int4":
        _refuse_undivided(source)
    layers = _write(source, folder, _of_torchao(bits), torch.float32)
    if not layers:
        kind, few = source.model.config.model_type, bits.removeprefix("int")
        problem = f"formats.torchao: no layer of {kind} is a linear one"
        hint = "take bitsandbytes: [int8], gguf, or merged"
        raise UserError(f"{problem}: nothing would be in {few} bits", hint)
    if bits == "int8":
        return []
    return [f"4 bits in groups of {GROUP}, each in a byte: the folder is as large as one of int8"]


def _of_torchao(bits: str) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    few: dict[str, Any] = {
        "int8": Int8WeightOnlyConfig(),
        "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)),
    }
    return TorchAoConfig(few[bits])


def _refuse_undivided(source: Source) -> None:
    """Raise UserError (2) naming the first layer that groups do not divide."""
    head = source.model.get_output_embeddings()
    for name, layer in source.model.named_modules():
        if isinstance(layer, nn.Linear) and layer is not head and layer.in_features % GROUP:
            problem = f"formats.torchao: int4: {name} is {layer.in_features} wide"
            hint = "take int8, which has a scale for each row, or bitsandbytes: [nf4]"
            raise UserError(f"{problem}, which groups of {GROUP} weights do not divide", hint)


def read_torchao(folder: Path, source: Source) -> Loaded:
    """As transformers and torchao load it. Raises UserError (3) where the weights are not the
    source's."""
    model = _load(folder)
    seen = {
        name: weight.dequantize() if hasattr(weight, "dequantize") else weight
        for name, weight in weights_of(model).items()
    }
    return _held(folder, source, model, seen, "torchao")


# --- bitsandbytes ---

BESIDE = (".SCB", ".weight_format", ".absmax", ".quant_map", "_absmax", "_quant_map", "__nf4")
"""What stands beside a weight of bitsandbytes'."""


def write_bitsandbytes(source: Source, folder: Path, bits: str) -> list[str]:
    """Save the model with linear layers, GPT-2's too, by LLM.int8() (Dettmers et al. 2022,
    arXiv:2208.07339) or in NF4 with double quantization (2023, arXiv:2305.14314); all else is in
    bf16, in which 4 bits are computed with.

    Raises UserError (2) for a model that has none.
    """
    layers = _write(source, folder, _of_bitsandbytes(bits), torch.bfloat16)
    if not layers:
        kind = source.model.config.model_type
        problem = f"formats.bitsandbytes: no layer of {kind} is one that it takes"
        raise UserError(f"{problem}: nothing would be in few bits", "take gguf, or merged")
    return [f"{layers} layers in {bits}, all else in bf16"]


def _of_bitsandbytes(bits: str) -> BitsAndBytesConfig:
    if bits == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def read_bitsandbytes(folder: Path, source: Source) -> Loaded:
    """As transformers and bitsandbytes load it. Raises UserError (3) where the weights are not the
    source's."""
    model = _load(folder)
    weights = weights_of(model).items()
    seen = {name: weight for name, weight in weights if not name.endswith(BESIDE)}
    for name, layer in model.named_modules():
        if few_bits.is_quantized(layer):  # before it computes, which lays them out anew
            seen[f"{name}.weight"] = few_bits.dequantized(layer)
    return _held(folder, source, model, seen, "bitsandbytes")


# --- both ---


def _write(source: Source, folder: Path, config: Any, dtype: torch.dtype) -> int:
    """How many layers have few bits, all else in `dtype`; where none has, nothing is saved.

    They are rounded from fp32: bf16 would take an adapter's update away first, where it is shorter
    than half a step of a base that was in bf16 itself.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        whole = Path(place)
        write_merged(source, whole, torch.float32)
        model = _load(whole, quantization_config=config)
    rest = [weight for weight in model.parameters() if type(weight) is nn.Parameter]
    layers = len(list(model.parameters())) - len(rest)
    for weight in rest:
        weight.data = weight.data.to(dtype)
    if layers:
        model.save_pretrained(folder)
        source.tokenizer.save_pretrained(folder)
    return layers


def _load(folder: Path, **options: Any) -> Any:
    """In the precision of the folder: transformers casts only a part of what lies beside few
    bits."""
    with reading(folder, "a model of few bits", Exception, code=INTEGRITY):
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=saved_in(folder),
            device_map="cpu",
            trust_remote_code=False,
            local_files_only=True,
            **options,
        ).eval()


def _is_of_8_bits(model: Any) -> bool:
    config = model.config.quantization_config
    if isinstance(config, BitsAndBytesConfig):
        return bool(config.load_in_8bit)
    return type(config.quant_type).__name__.startswith("Int8")


def _held(
    folder: Path, source: Source, model: Any, seen: dict[str, Tensor], library: str
) -> Loaded:
    same_head(model, source)
    updates = source.updates if _is_of_8_bits(model) else {}
    tensors = same_weights(source.weights, seen, None, updates=updates)
    return Loaded(named(library), model, load_tokenizer(folder), source, tensors)
