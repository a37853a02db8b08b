"""Models with random weights, as a recipe describes them."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.data.prepared import PreparedRows
from llmpipe.errors import Say, UserError
from llmpipe.models.hardware import Hardware
from llmpipe.models.load import ready


def build(
    recipe: Any, tokenizer: Tokenizer, found: Hardware, prepared: PreparedRows, say: Say
) -> PreTrainedModel:
    """A model with random weights, as the recipe's `architecture` describes it. Raises UserError when transformers
    refuses the shape."""
    wanted, context = recipe.architecture, recipe.data.max_length
    wide = wanted.ffn or (
        4 * wanted.width if wanted.kind == "gpt2" else 64 * math.ceil(wanted.width * 8 / 3 / 64)
    )
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": wanted.tied,
        "use_cache": True,
    }
    common |= {"bos_token_id": tokenizer.bos_token_id}
    if wanted.kind == "gpt2":
        shape = {
            "n_layer": wanted.layers,
            "n_embd": wanted.width,
            "n_head": wanted.heads,
            "n_inner": wide,
        }
        shape |= {"n_positions": context, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        shape = {
            "num_hidden_layers": wanted.layers,
            "hidden_size": wanted.width,
            "intermediate_size": wide,
        }
        shape |= {
            "num_attention_heads": wanted.heads,
            "num_key_value_heads": wanted.kv_heads or wanted.heads,
        }
        shape |= {"max_position_embeddings": context, "head_dim": wanted.width // wanted.heads}
        shape |= {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": wanted.rope_theta,
                **wanted.rope_scaling,
            }
        }
    try:
        config = AutoConfig.for_model(wanted.kind, **common, **shape)
        torch.manual_seed(recipe.seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=found.attention
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"architecture: {str(error).strip().splitlines()[0]}") from error
    return ready(model, tokenizer, found, prepared, say)
