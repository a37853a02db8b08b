"""A whole model against what was saved of it; one in parts, too, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.errors import UserError
from llmpipe.models.pretrained import load_model, rows_of
from llmpipe.models.verify.logits import probe_logits, same_logits
from llmpipe.models.verify.saved import Verified, equal, refuse, same_tensors, same_tokenizer
from llmpipe.models.verify.stops import stops_of
from llmpipe.parallel.parts import Spread, looking
from llmpipe.parallel.tensors import part_of
from llmpipe.parallel.world import World
from llmpipe.run.weights import tensors_in


def compare_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> Verified:
    """Compare a whole model with what was saved of it in `folder`."""
    same_tokenizer(tokenizer, folder)
    trained = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    # files may have other names for some, as those of GPT-NeoX; these are compared once reloaded
    tensors = same_tensors(trained, folder, may_be_renamed=True)
    reloaded = load_model(folder).to(model.device).eval()  # refuses missing and left over tensors
    for name, tensor in reloaded.state_dict().items():
        if not equal(tensor.cpu(), trained[name]):
            refuse(f"{name} is not the tensor that was trained")
    if reloaded.get_input_embeddings().weight.shape[0] < rows_of(tokenizer):
        refuse("the embeddings have fewer rows than the tokenizer's tokens need")
    logits = probe_logits(model, tokenizer)
    behaviour = _same_behaviour(logits, reloaded, tokenizer)
    return Verified(tensors, behaviour.max_logit_difference, behaviour.stops_at)


@dataclass(frozen=True)
class Seen:
    """What is kept of a model in parts while what was saved of it is looked at, so that the two are
    never in memory at once.
    """

    parts: dict[str, bytes]
    """Of each tensor the sha256 of what this process holds of it."""
    logits: torch.Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Tokenizer) -> Seen:
        """Collective."""
        with looking(model):
            logits = probe_logits(model, tokenizer)
        return cls(dict(_parts(model)), logits)


def compare_sharded(
    trained: Seen, tokenizer: Tokenizer, folder: Path, world: World, spread: Spread
) -> Verified:
    """Compare a model that was in parts with what was saved of it in `folder`, which each process
    reads its part of. Collective; what one process refuses all of them do.
    """
    again: PreTrainedModel | None = None
    refused = None
    try:
        same_tokenizer(tokenizer, folder)
        again = load_model(folder, device=str(world.device), spread=spread).eval()
        for name, part in _parts(again):
            if part != trained.parts[name]:
                refuse(f"{name} is not the tensor that was trained")
        if again.get_input_embeddings().weight.shape[0] < rows_of(tokenizer):
            refuse("the embeddings have fewer rows than the tokenizer's tokens need")
    except UserError as error:
        refused = error
    world.agree(refused)
    assert again is not None
    tensors = sum(len(tensors_in(path)) for path in folder.glob("*.safetensors"))
    with looking(again):
        behaviour = _same_behaviour(trained.logits, again, tokenizer)
    return Verified(tensors, behaviour.max_logit_difference, behaviour.stops_at)


def _parts(model: PreTrainedModel) -> Iterator[tuple[str, bytes]]:
    """The sha256 of what this process holds of each tensor."""
    for name, tensor in model.state_dict().items():
        copy = part_of(tensor).to("cpu", copy=True)  # what numpy has seen cannot be freed
        numbers = copy.contiguous().flatten().view(torch.uint8)
        yield name, sha256(numbers.numpy()).digest()


@dataclass(frozen=True)
class Behaviour:
    """What a model and the reloaded one have in common."""

    max_logit_difference: float
    """The greatest on a probe; of the score, of a reward model."""
    stops_at: int | list[int] | None = None
    """The tokens at which generation was seen to stop; a reward model has none."""


def _same_behaviour(logits: torch.Tensor, reloaded: Any, tokenizer: Tokenizer) -> Behaviour:
    """The trained model's logits on the probe, and generation that stops at every stop token
    alone.
    """
    again = probe_logits(reloaded, tokenizer)
    difference = same_logits(reloaded, logits, again, logits.dtype)
    if not reloaded.can_generate():
        return Behaviour(difference)
    return Behaviour(difference, stops_of(reloaded, tokenizer))
