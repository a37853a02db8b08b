"""Publish a trained model and prove that what lies on the disk is what was trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import upstream
from llmpipe.errors import INTEGRITY, NUMERIC, UserError
from llmpipe.files import publishing
from llmpipe.models.generate import isolated_rng
from llmpipe.models.pretrained import load_model, load_tokenizer

PROBE = "The quick brown fox jumps over 13 lazy dogs.\nWas wäre, wenn? 你好 \U0001f642"


def publish(trainer: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """Save to a staging folder, reload from there, compare, rename to model/. Returns what was checked.

    Raises UserError (3) when the saved model is not the trained one; nothing is published then.
    """
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        trainer.accelerator.wait_for_everyone()
        return {}
    model = trainer.plain_model()
    trainer.forget_optimizer()
    upstream.as_loaded(model)
    with publishing(trainer.artifact.model) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        checked = compare(model, tokenizer, staging)
    difference = f"{checked['max_logit_difference']:.1e}"
    trainer.say(
        f"verified: {checked['tensors']} tensors, logits differ by {difference} after reloading"
    )
    trainer.accelerator.wait_for_everyone()
    return checked


def refuse(why: str, code: int = INTEGRITY) -> None:
    raise UserError(
        f"verification failed: {why}", "nothing was published; the checkpoints are kept", code
    )


def compare(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Hand-off contract, rule 4: tensors, logits on probes, tokenizer, template, stop tokens, stopping."""
    same_tokenizer(tokenizer, folder)
    trained = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    tensors = same_tensors(trained, folder, renamed=True)
    reloaded = load_model(folder).to(model.device).eval()  # refuses missing and unexpected tensors
    for name, tensor in reloaded.state_dict().items():
        if not torch.equal(tensor.cpu(), trained[name].to(tensor.dtype)):
            refuse(f"{name} is not the tensor that was trained")
    if reloaded.get_input_embeddings().weight.shape[0] < len(tokenizer):
        refuse("the embeddings have fewer rows than the tokenizer has tokens")
    return {"tensors": tensors, **same_behaviour(model, reloaded, tokenizer)}


def same_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    again = load_tokenizer(folder)
    for what in ("pad_token_id", "eos_token_id", "chat_template"):
        if getattr(again, what) != getattr(tokenizer, what):
            refuse(
                f"{what} is {getattr(again, what)!r} after reloading, {getattr(tokenizer, what)!r} in training"
            )
    if again(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
        refuse("the tokenizer splits a probe text differently after reloading")


def same_tensors(trained: dict[str, torch.Tensor], folder: Path, renamed: bool = False) -> int:
    """Every saved tensor is whole, finite and the trained one; returns how many there are. `renamed`: files may have
    other names for some, as those of GPT-NeoX; these are compared once they are loaded again."""
    seen = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_tensor(name)
                if tensor.numel() == 0:
                    refuse(f"{path.name}: {name} is empty")
                if not torch.isfinite(tensor).all():
                    refuse(f"{path.name}: {name} holds NaN or Inf", NUMERIC)
                if name not in trained and renamed:
                    pass
                elif name not in trained or not torch.equal(tensor, trained[name].to(tensor.dtype)):
                    refuse(f"{path.name}: {name} is not the tensor that was trained")
                seen += 1
    return seen


def _probe(model: Any, tokenizer: Tokenizer) -> torch.Tensor:
    return torch.tensor([(tokenizer(PROBE)["input_ids"] * 4)[:64]], device=model.device)


def probe_logits(model: Any, tokenizer: Tokenizer) -> torch.Tensor:
    """Logits on the probe text, with the model in evaluation mode."""
    was_training = model.training
    model.eval()
    with isolated_rng(), torch.no_grad():
        logits = model(_probe(model, tokenizer)).logits
    model.train(was_training)
    return logits


def same_behaviour(
    model: Any, reloaded: Any, tokenizer: Tokenizer, tolerance: float = 1e-5
) -> dict[str, Any]:
    """Equal logits on the probe, and an end to generation at every stop token."""
    difference = float(
        (probe_logits(model, tokenizer) - probe_logits(reloaded, tokenizer)).abs().max()
    )
    if not math.isfinite(difference) or difference > tolerance:
        refuse(
            f"{'logits' if model.can_generate() else 'scores'} on a probe differ by {difference:.2e} after reloading"
        )
    if not model.can_generate():
        return {"max_logit_difference": difference}
    stop = reloaded.generation_config.eos_token_id
    stops = stop if isinstance(stop, list) else [stop]
    with isolated_rng(), torch.no_grad():
        ended = [_stops(reloaded, _probe(reloaded, tokenizer), token, stops) for token in stops]
    if tokenizer.eos_token_id not in stops or not all(ended):
        refuse("generation does not stop at the end of a turn")
    return {"max_logit_difference": difference, "stops_at": stop}


def _stops(model: PreTrainedModel, probe: torch.Tensor, token: int, stops: list[int]) -> bool:
    """Whether generation as configured in the saved folder ends when `token` is its third word."""
    begin = probe.shape[1]
    other = next(i for i in range(len(stops) + 1) if i not in stops)
    out = model.generate(
        input_ids=probe,
        attention_mask=torch.ones_like(probe),
        max_new_tokens=8,
        prefix_allowed_tokens_fn=lambda _, ids: [token if len(ids) - begin == 2 else other],
    )
    return out.shape[1] - begin == 3
