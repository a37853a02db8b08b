"""A GGUF file of a model: its shape, its weights and its vocabulary, as llama.cpp reads them.

The names of metadata and tensors are the library gguf's. What is done to weights beside renaming
is llama.cpp's convention for each architecture: rows of queries and keys in the order of another
rotary layout (Llama), 1 added to norms (Gemma), matrices on their side (GPT-2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from torch import Tensor

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.export.source import Source
from llmpipe.export.tensors import refuse, same_weights
from llmpipe.export.vocabulary import Vocabulary, vocabulary_of
from llmpipe.faults import reading

TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""What is written here; all else llama.cpp makes of an f32 file."""


@dataclass(frozen=True)
class Kind:
    """How llama.cpp knows an architecture."""

    arch: MODEL_ARCH
    activations: tuple[str, ...]
    """What stands in its code."""
    rotary_rows: bool = False
    """Whether rows of queries and keys lie in pairs of a rotation."""
    norms_from_one: bool = False
    """Whether norms are stored as what is added to 1."""
    on_their_side: bool = False
    """Whether matrices are stored inputs first."""


GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
KINDS = {
    "llama": Kind(MODEL_ARCH.LLAMA, ("silu",), rotary_rows=True),
    "mistral": Kind(MODEL_ARCH.LLAMA, ("silu",), rotary_rows=True),
    "qwen2": Kind(MODEL_ARCH.QWEN2, ("silu",)),
    "qwen3": Kind(MODEL_ARCH.QWEN3, ("silu",)),
    "gpt2": Kind(MODEL_ARCH.GPT2, GELU, on_their_side=True),
    "gemma2": Kind(MODEL_ARCH.GEMMA2, GELU, norms_from_one=True),
    "gemma3_text": Kind(MODEL_ARCH.GEMMA3, GELU, norms_from_one=True),
}


def write_gguf(source: Source, file: Path, numbers: str) -> None:
    """Write a model's weights as `numbers` (a key of `TYPES`), with its vocabulary.

    Raises UserError (2) for what llama.cpp would not compute as transformers does.
    """
    kind, config = kind_of(source), source.model.config
    vocabulary = _vocabulary(source)
    weight_type, file_type = TYPES[numbers]
    with writing_of(file, kind) as writer:
        _describe(writer, config, len(vocabulary.tokens))
        writer.add_file_type(file_type)
        vocabulary.write(writer)
        for name, weight in renamed(source, kind):
            _add(writer, name, weight.float().numpy(), weight_type)


class writing_of:
    """A writer whose file is whole when it is left without an error."""

    def __init__(self, file: Path, kind: Kind):
        self.writer = GGUFWriter(file, gguf.MODEL_ARCH_NAMES[kind.arch])

    def __enter__(self) -> GGUFWriter:
        return self.writer

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.writer.write_header_to_file()
                self.writer.write_kv_data_to_file()
                self.writer.write_tensors_to_file()
        finally:
            self.writer.close()


def kind_of(source: Source) -> Kind:
    """How llama.cpp knows a model. Raises UserError (2) where it does not, as far as is known
    here."""
    config = source.model.config
    kind = KINDS.get(config.model_type)
    if kind is None:
        known = ", ".join(KINDS)
        problem = f"formats.gguf: {config.model_type} is no architecture that is written here"
        raise UserError(problem, f"there are: {known}; or take merged")
    for field in ("hidden_act", "activation_function", "hidden_activation"):
        used = getattr(config, field, None)
        if used is not None and used not in kind.activations:
            problem = f"formats.gguf: {field} is {used}, and llama.cpp computes"
            raise UserError(f"{problem} {kind.activations[0]} there", "take merged")
    return kind


def renamed(source: Source, kind: Kind) -> Iterator[tuple[str, Tensor]]:
    """The weights under GGUF's names, as llama.cpp wants them."""
    config = source.model.config
    yield from _renamed(source.weights, config, kind)
    factors = _rotary_factors(config)
    if factors is not None:
        yield "rope_freqs.weight", factors


def _renamed(
    weights: Mapping[str, Tensor], config: Any, kind: Kind
) -> Iterator[tuple[str, Tensor]]:
    names = gguf.get_tensor_name_map(kind.arch, config.num_hidden_layers)
    for name, weight in weights.items():
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            problem = f"formats.gguf: {name}: llama.cpp has no place for this weight"
            raise UserError(problem, "take merged")
        yield new, _converted(kind, config, name, weight)


def _converted(kind: Kind, config: Any, name: str, weight: Tensor) -> Tensor:
    parts = name.split(".")
    if kind.rotary_rows and parts[-2] in ("q_proj", "k_proj"):
        is_key = parts[-2] == "k_proj"
        return in_pairs(
            weight, config.num_key_value_heads if is_key else config.num_attention_heads
        )
    if kind.norms_from_one and parts[-2].endswith("norm"):
        return weight + 1
    if kind.on_their_side and parts[-2] in ("c_attn", "c_proj", "c_fc") and weight.ndim == 2:
        return weight.T.contiguous()
    return weight


def in_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head in the order of pairs that are rotated: (0, n/2, 1, n/2 + 1, ...) of what
    transformers holds as two halves."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def _rotary_factors(config: Any) -> Tensor | None:
    """What each frequency is divided by where positions are scaled as Llama 3.1 does."""
    rope = _rope(config)
    if rope.get("rope_type", "default") != "llama3":
        return None
    width = _head_width(config)
    frequencies = rope["rope_theta"] ** -(torch.arange(0, width, 2) / width)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def _rope(config: Any) -> dict[str, Any]:
    """The rotary positions; of two kinds of attention those of the full one."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    full: dict[str, Any] = rope.get("full_attention", rope)
    return full


def _head_width(config: Any) -> int:
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


def _describe(writer: GGUFWriter, config: Any, rows: int) -> None:
    """The shape of a model, in metadata."""
    width, heads = config.hidden_size, config.num_attention_heads
    context = config.max_position_embeddings
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(width)
    writer.add_head_count(heads)
    writer.add_vocab_size(rows)
    if config.model_type == "gpt2":
        writer.add_context_length(context)
        writer.add_feed_forward_length(config.n_inner or 4 * width)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    # llama.cpp's Llama sees all that came before, where Mistral sees a window
    window = getattr(config, "sliding_window", None)
    slides = config.model_type.startswith("gemma")
    writer.add_context_length(context if slides or not window else min(context, window))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(_head_width(config))
    writer.add_value_length(_head_width(config))
    writer.add_rope_dimension_count(_head_width(config))
    _describe_rotation(writer, config)
    if slides:
        _describe_gemma(writer, config)


def _describe_rotation(writer: GGUFWriter, config: Any) -> None:
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind not in ("default", "llama3"):
        problem = f"formats.gguf: rotary positions of the kind {kind} are not written here"
        raise UserError(problem, "take merged")


def _describe_gemma(writer: GGUFWriter, config: Any) -> None:
    """What of Gemma is no Llama: windows, and logits that are bent."""
    writer.add_sliding_window(config.sliding_window)
    if bend := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(bend)
    if bend := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(bend)


def _add(
    writer: GGUFWriter, name: str, numbers: np.ndarray, weight_type: GGMLQuantizationType
) -> None:
    """A tensor: matrices as asked, as far as their rows divide; norms and biases in fp32."""
    block, _ = gguf.GGML_QUANT_SIZES[weight_type]
    if numbers.ndim < 2 or numbers.shape[-1] % block:
        weight_type = GGMLQuantizationType.F32
    data = gguf.quants.quantize(numbers, weight_type)
    writer.add_tensor(name, data, raw_dtype=weight_type)


def _same_vocabulary(source: Source, reader: GGUFReader) -> None:
    """Raise UserError (3) naming what of a file's vocabulary is not the tokenizer's."""
    expected = GGUFWriter(None, "")
    _vocabulary(source).write(expected)
    fields = {name: value.value for name, value in expected.kv_data[0].items()}
    for name, value in fields.items():
        field = reader.fields.get(name) if name.startswith("tokenizer.") else None
        seen = field.contents() if field else None
        if name.startswith("tokenizer.") and seen != value:
            refuse(f"{name} is {seen!r:.60}, not {value!r:.60}")


def _vocabulary(source: Source) -> Vocabulary:
    rows = int(source.model.get_input_embeddings().weight.shape[0])
    return vocabulary_of(source.tokenizer, rows, source.probe.stops, source.template_kwargs)


def check_weights(source: Source, file: Path, dtype: torch.dtype | None) -> int:
    """Compare the tensors of a file with the source's; returns how many there are.

    Raises UserError (3) naming the first that is another one.
    """
    kind = kind_of(source)
    with reading(file, "GGUF", ValueError, KeyError, IndexError, code=INTEGRITY):
        reader = GGUFReader(file)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    _same_vocabulary(source, reader)
    expected = dict(renamed(source, kind))
    seen = {
        name: torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        for name, tensor in tensors.items()
    }
    updates = {
        name: update
        for name, update in _renamed(source.updates, source.model.config, kind)
        if name in tensors and tensors[name].tensor_type == GGMLQuantizationType.Q8_0
    }
    return same_weights(expected, seen, dtype, updates=updates)
