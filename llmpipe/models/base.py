"""Models and tokenizers from folders of safetensors and JSON."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import upstream
from llmpipe.errors import DATA, INTEGRITY, UserError
from llmpipe.run.artifact import is_reward_model


def load_tokenizer(folder: Path) -> Tokenizer:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def architecture(folder: Path, ranks: bool = False) -> type[PreTrainedModel]:
    """The class that transformers has for a model in `folder`; `ranks`: for a reward model. Raises UserError (2)."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder}: cannot be loaded: {str(error).strip().splitlines()[0]}", code=DATA
        ) from error
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if ranks else MODEL_FOR_CAUSAL_LM_MAPPING
    kind = known.get(type(config), None)
    if kind is None:
        what = "reward model" if ranks else "language model"
        raise UserError(
            f"{folder}: transformers has no {what} of the kind {config.model_type}", code=DATA
        )
    return kind


def load_model(
    folder: Path, attention: str = "sdpa", dtype: torch.dtype = torch.float32, quantization: Any = None,
    scores: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """A model from safetensors: a reward model where the folder holds one or where it `scores`, which gives any other
    a head with random weights; else a causal language model. Raises UserError (3) when a tensor is missing or left
    over."""
    ranked = is_reward_model(folder)
    kind = architecture(folder, ranked or scores)
    try:
        # the head that is left out and the one that is new are no news; any other difference is refused below
        with upstream.ranking(kind) if scores and not ranked else nullcontext():
            model, report = kind.from_pretrained(
                folder,
                **({"num_labels": 1} if scores else {}),
                dtype=dtype,
                quantization_config=quantization,
                attn_implementation=upstream.attention_of(kind, attention),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: cannot be loaded: {first}", code=DATA) from error
    problems = {k: sorted(map(str, v)) for k, v in report.items() if v and k != "error_msgs"}
    if problems or report.get("error_msgs"):
        what = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:3])}" for k, v in problems.items())
        raise UserError(
            f"{folder}: the weights do not fit the model ({what or report['error_msgs']})",
            code=INTEGRITY,
        )
    upstream.unrouted(model.config)
    return model


def fit(model: PreTrainedModel, tokenizer: Tokenizer, *, generation: Path | None = None) -> int:
    """Embeddings at least as wide as the tokenizer; returns how many rows there were. `generation`: a folder whose
    generation configuration, with its stop tokens, the model takes over."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        # mean_resizing draws new rows from the old ones' distribution (Hewitt 2021), so that they start out harmless
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    if generation and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(generation)
    return rows
