"""Models and tokenizers: choose for the hardware, load, adapt to the tokenizer, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import upstream
from llmpipe.data.prepared import PreparedRows
from llmpipe.errors import INTEGRITY, Say, UserError
from llmpipe.models.hardware import Hardware
from llmpipe.models.pretrained import load_model, resize_embeddings, take_generation
from llmpipe.recipe.sections import Training
from llmpipe.run.artifact import is_reward_model


def load_any(folder: Path, base: Path | None, tokenizer: Tokenizer, *, bf16: bool) -> Any:
    """A model to look at, alone or as adapter on its `base`, on the GPU where there is one."""
    device, dtype = (
        "cuda" if torch.cuda.is_available() else "cpu",
        torch.bfloat16 if bf16 else torch.float32,
    )
    # not cast later: positions are computed in fp32
    model = load_model(base or folder, dtype=dtype, scores=bool(base) and is_reward_model(folder))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"{folder}: the tokenizer has neither a pad nor an end token",
            "set eos_token in its config",
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    if base:
        from llmpipe.models.adapters import put_on

        resize_embeddings(model, tokenizer)
        take_generation(model, folder)
        model = put_on(model, folder)
    return model.to(device).eval()


def load(
    folder: Path, base: Path | None, tokenizer: Tokenizer, found: Hardware, recipe: Training, prepared: PreparedRows, say: Say,
    scores: bool = False,
) -> Any:  # fmt: skip
    """The model to train, its embeddings as wide as the tokenizer, its stop tokens as the template ends turns.

    All weights: fp32. With `adapter:` the model is frozen, in the precision of the arithmetic or quantized, and its
    adapter is a new one, or the one in `folder` where that is an adapter on `base`. `scores`: a reward model.
    """
    from llmpipe.models.adapters import begin, frozen, put_on, same_shape

    dtype = found.frozen_dtype(recipe.adapter) if recipe.adapter else torch.float32
    if is_reward_model(base or folder) and not scores:
        raise UserError(
            f"model: {recipe.model}: a reward model, which gives no answers", code=INTEGRITY
        )
    if base and recipe.adapter.rewrites:
        raise UserError(
            f"adapter.init: {recipe.adapter.init}: the adapter is there already",
            "set adapter.continue: false",
        )
    torch.manual_seed(recipe.seed)  # of a new head
    model = frozen(base or folder, recipe.quantization, dtype, found.attention, scores)
    rows = resize_embeddings(model, tokenizer)
    if len(tokenizer) > rows:
        say(
            f"embeddings: {rows} -> {len(tokenizer)} rows, new ones drawn from the distribution of the old"
        )
    model = ready(model, tokenizer, found, prepared, say)
    if recipe.adapter is None:
        return model
    count = model.num_parameters()
    if base:
        model = put_on(model, folder, trainable=True)
        same_shape(model, recipe.adapter)
    else:
        added = tokenizer.convert_tokens_to_ids(prepared.added_tokens)
        model = begin(model, recipe.adapter, added, recipe.seed)
    # or PEFT looks the base up, on the Hub too, whenever a checkpoint is saved
    model.peft_config["default"].base_model_name_or_path = model.get_base_model().name_or_path = ""
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    how = (
        f"{recipe.quantization.bits} bits"
        if recipe.quantization
        else str(dtype).removeprefix("torch.")
    )
    say(
        f"model: {count / 1e6:,.1f} M parameters in {how}, frozen; adapter of {learned / 1e6:,.2f} M trained"
    )
    return model


def ready(
    model: PreTrainedModel, tokenizer: Tokenizer, found: Hardware, prepared: PreparedRows, say: Say
) -> PreTrainedModel:
    """`model` with its special tokens and generation as the template has them, and fast on this hardware."""
    if model.can_generate():
        stop_ids = tokenizer.convert_tokens_to_ids(prepared.stop_tokens)
        generation = model.generation_config
        generation.eos_token_id = stop_ids if len(stop_ids) > 1 else stop_ids[0]
        generation.pad_token_id = tokenizer.pad_token_id
        generation.do_sample, generation.temperature, generation.top_p, generation.top_k = (
            False,
            None,
            None,
            None,
        )
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    upstream.speed_up(model, device_type=found.device)
    say(f"model: {type(model).__name__}, {model.num_parameters() / 1e6:,.1f} M parameters")
    return model
