"""Models with random weights, as a recipe describes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.errors import UserError, first_line
from llmpipe.models.pretrained import rows_of
from llmpipe.run.footprint import Shape

if TYPE_CHECKING:
    from llmpipe.stages.pretrain import Architecture


def build(
    architecture: Architecture, tokenizer: Tokenizer, *, context: int, seed: int, attention: str
) -> PreTrainedModel:
    """A model in fp32 with random weights, drawn from `seed`, for up to `context` tokens.

    Raises UserError (2) when transformers refuses the shape.
    """
    with _refused():
        config = _configuration(architecture, tokenizer, context)
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )


def shape_of(architecture: Architecture, tokenizer: Tokenizer, context: int) -> Shape | None:
    """What decides the memory of such a model, without drawing it. Raises as `build` does."""
    with _refused(), torch.device("meta"):
        config = _configuration(architecture, tokenizer, context)
        model = AutoModelForCausalLM.from_config(config)
    tensors = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    return Shape.of(config.to_dict(), tensors)


@contextmanager
def _refused() -> Iterator[None]:
    """Raise what transformers refuses as a user's mistake."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"architecture: {first_line(error)}") from error


def _configuration(architecture: Architecture, tokenizer: Tokenizer, context: int) -> Any:
    shape = _gpt2 if architecture.kind == "gpt2" else _llama
    return AutoConfig.for_model(
        architecture.kind,
        vocab_size=rows_of(tokenizer),
        tie_word_embeddings=architecture.tied,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        **shape(architecture, context),
    )


def _gpt2(architecture: Architecture, context: int) -> dict[str, Any]:
    """GPT-2's words (Radford 2019), without its dropout."""
    return {
        "n_layer": architecture.layers,
        "n_embd": architecture.width,
        "n_head": architecture.heads,
        "n_inner": architecture.ffn or 4 * architecture.width,
        "n_positions": context,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _llama(architecture: Architecture, context: int) -> dict[str, Any]:
    """The words of Llama (Touvron 2023) and of those that came after it."""
    return {
        "num_hidden_layers": architecture.layers,
        "hidden_size": architecture.width,
        "intermediate_size": architecture.ffn or _gated_ffn(architecture.width),
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.kv_heads or architecture.heads,
        "max_position_embeddings": context,
        "head_dim": architecture.width // architecture.heads,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": architecture.rope_theta,
            **architecture.rope_scaling,
        },
    }


def _gated_ffn(width: int) -> int:
    """8/3 of the width, up to a multiple of 64: three matrices then weigh what GPT-2's two do
    (Shazeer 2020).
    """
    return 64 * math.ceil(width * 8 / 3 / 64)
