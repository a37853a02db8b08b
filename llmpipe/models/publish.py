"""Publish what was trained: save it to a staging folder, reload it from there, compare, and only
then rename the folder to what it is called. A model, an adapter and a merged one go the same way.

One process publishes; the others wait for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import upstream
from llmpipe.errors import Say
from llmpipe.files import publishing
from llmpipe.models.adapters import WEIGHTS, Base, as_published, on_base
from llmpipe.models.pretrained import load_model, load_tokenizer
from llmpipe.models.verify import Verified, compare_adapter, compare_model
from llmpipe.run.artifact import is_reward_model


def publish_model(
    model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, say: Say | None = None
) -> Verified:
    """Save all weights with their tokenizer to `folder`; returns what was compared.

    Raises UserError (3) when the saved model is not the one in memory; nothing is published then.
    """
    upstream.as_loaded(model)
    with publishing(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        verified = compare_model(model, tokenizer, staging)
    if say:
        difference = f"{verified.max_logit_difference:.1e}"
        say(f"verified: {verified.tensors} tensors, logits differ by {difference} after reloading")
    return verified


def publish_adapter(
    model: Any, tokenizer: Tokenizer, folder: Path, base: Base, say: Say
) -> Verified:
    """Save an adapter, PEFT's `model`, with its tokenizer to `folder`; returns what was compared.

    Raises UserError (3) when the saved adapter, on its base or merged into it, is not the trained
    one; nothing is published then.
    """
    upstream.as_loaded(model)
    tensors, config = as_published(model)
    config.base_model_name_or_path = base.reference  # no machine's path in an artifact
    config.revision = base.revision
    with publishing(folder) as staging:
        weights = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(weights, staging / WEIGHTS)
        config.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if model.can_generate():
            model.generation_config.save_pretrained(staging)
        verified = compare_adapter(model, tokenizer, staging, base)
    reloaded = f"logits differ by {verified.max_logit_difference:.1e} after reloading"
    merged = f"by {verified.merged_difference:.1e} when merged"
    say(f"verified: {verified.tensors} tensors, {reloaded}, {merged}")
    return verified


def merge(base: Path, adapter: Path, folder: Path) -> None:
    """Publish the base with the adapter's update added to its weights, in fp32, to `folder`: a
    model like any other. Raises UserError (3) as `publish_model` does.
    """
    tokenizer = load_tokenizer(adapter)
    model = load_model(base, scores=is_reward_model(adapter))
    merged = on_base(model, adapter, tokenizer).merge_and_unload(safe_merge=True).eval()
    merged.config.eos_token_id = tokenizer.eos_token_id
    merged.config.pad_token_id = tokenizer.pad_token_id
    publish_model(merged, tokenizer, folder)
