"""Publish an adapter, or merge it, and prove that what lies on the disk is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import upstream
from llmpipe.files import publishing
from llmpipe.models import verify
from llmpipe.models.adapters import WEIGHTS, as_published, attach, load_frozen
from llmpipe.models.hardware import release_memory
from llmpipe.models.pretrained import load_model, load_tokenizer, resize_embeddings, take_generation
from llmpipe.models.verify import probe_logits, refuse, same_behaviour, same_tensors, same_tokenizer
from llmpipe.recipe.sections import Quantization
from llmpipe.run.artifact import is_reward_model

TOLERANCE = 1e-3  # between the logits of base + adapter and those of the merged model, both in fp32


def merge(base: Path, folder: Path, target: Path) -> None:
    """Write the base with the adapter's update added to its weights, fp32, as a folder like any other."""
    tokenizer = load_tokenizer(folder)
    model = load_model(base, scores=is_reward_model(folder))
    resize_embeddings(model, tokenizer)
    take_generation(model, folder)
    model = attach(model, folder).merge_and_unload(safe_merge=True).eval()
    model.config.eos_token_id, model.config.pad_token_id = (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    with publishing(target) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        verify.compare(model, tokenizer, staging)


def publish(trainer: Any, tokenizer: Tokenizer, base: Path, reference: str) -> dict[str, Any]:
    """Save the adapter to a staging folder, reload it on its `base`, compare, merge, compare, rename to model/.

    `reference`: what the recipe calls the base. Raises UserError (3) when the saved adapter is not the trained one;
    nothing is published then.
    """
    trainer.accelerator.wait_for_everyone()
    checked: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        model = trainer.plain_model()
        trainer.forget_optimizer()
        upstream.as_loaded(model)
        bits, dtype = (
            trainer.recipe.quantization,
            trainer.hardware.frozen_dtype(trainer.recipe.adapter),
        )
        tensors, config = as_published(model)
        config.base_model_name_or_path = reference  # no machine's path in an artifact
        with publishing(trainer.artifact.model) as staging:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, staging / WEIGHTS
            )
            config.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            if model.can_generate():
                model.generation_config.save_pretrained(staging)
            checked = compare(model, tokenizer, staging, base, bits, dtype)
        apart, merged_apart = checked["max_logit_difference"], checked["merged_difference"]
        words = f"logits differ by {apart:.1e} after reloading, by {merged_apart:.1e} when merged"
        trainer.say(f"verified: {checked['tensors']} tensors, {words}")
    trainer.accelerator.wait_for_everyone()
    return checked


def compare(
    model: Any,
    tokenizer: Tokenizer,
    folder: Path,
    base: Path,
    bits: Quantization | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Hand-off contract, rule 4, for an adapter: tensors, logits on its base, logits merged, tokenizer, stopping."""
    same_tokenizer(tokenizer, folder)
    tensors = same_tensors(as_published(model)[0], folder)
    again = load_frozen(base, bits, dtype, scores=is_reward_model(folder))
    resize_embeddings(again, tokenizer)
    take_generation(again, folder)
    again = attach(again if bits else again.to(model.device), folder).eval()
    checked = same_behaviour(
        model, again, tokenizer, TOLERANCE if hasattr(model, "began_with") else 1e-5
    )
    if bits is None and dtype == torch.float32:
        apart = again
    else:
        del again
        release_memory()
        apart = load_model(base, scores=is_reward_model(folder))
        resize_embeddings(apart, tokenizer)
        take_generation(apart, folder)
        apart = attach(apart, folder).eval()
    # merging is compared in fp32, the precision of the published weights
    before = probe_logits(apart, tokenizer).cpu()
    after = probe_logits(apart.merge_and_unload(safe_merge=True), tokenizer).cpu()
    difference = float((before - after).abs().max())
    if not difference <= TOLERANCE:
        refuse(f"merged into its base, the adapter's logits on a probe differ by {difference:.2e}")
    checked |= {"tensors": tensors, "merged_difference": difference}
    if bits:
        own = probe_logits(model, tokenizer).float().cpu()
        checked["quantized_to_merged_difference"] = float((own - after).abs().mean())
    return checked
