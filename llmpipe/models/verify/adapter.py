"""An adapter against what was saved of it: on its base, and merged into it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.errors import UserError
from llmpipe.models.adapters import (
    Base,
    Frozen,
    adapted_layers,
    as_published,
    attach,
    frozen_weight,
    make_fit,
)
from llmpipe.models.mapped import Precision, lending, load_mapped
from llmpipe.models.pretrained import rows_of
from llmpipe.models.verify.logits import probe_logits, same_logits, same_merged
from llmpipe.models.verify.saved import Verified, refuse, same_tensors, same_tokenizer
from llmpipe.models.verify.stops import stops_as_saved
from llmpipe.parallel.parts import looking
from llmpipe.parallel.tensors import part_like, part_of
from llmpipe.parallel.world import World
from llmpipe.run.artifact import is_reward_model
from llmpipe.upstream import few_bits

STRANGERS_SEED = 1
"""Of what a stranger draws for rows that the base lacks: another one than in training."""

REQUANTIZED = 1e-3  # of the mean weight: codes at the edge of two are rounded either way


def compare_adapter(model: Any, tokenizer: Tokenizer, folder: Path, base: Base) -> Verified:
    """Compare an adapter with what was saved of it in `folder`: on its base as it was trained, and
    merged into it.
    """
    same_tokenizer(tokenizer, folder)
    verified = _same_adapter(model, tokenizer, folder, base, probe_logits(model, tokenizer))
    return replace(verified, stops_at=stops_as_saved(model.get_base_model(), tokenizer, folder))


def compare_adapter_on_parts(
    model: Any, tokenizer: Tokenizer, folder: Path, base: Base, world: World
) -> Verified:
    """Compare an adapter whose base is in parts with what was saved of it in `folder`: each process
    looks at its part of the base, the first one at all else. Collective; what one process refuses
    all of them do.
    """
    with looking(model):
        logits = probe_logits(model, tokenizer)
        stops_at = stops_as_saved(model.get_base_model(), tokenizer, folder)
    verified, refused = None, None
    try:
        same_tokenizer(tokenizer, folder)
        if world.is_first:
            verified = _same_adapter(model, tokenizer, folder, base, logits)
        else:
            _reloaded_on(model, tokenizer, folder, base)
    except UserError as error:
        refused = error
    world.agree(refused)
    verified = world.gather(verified)[0]
    assert verified is not None  # or it was refused
    return replace(verified, stops_at=stops_at)


def _same_adapter(
    model: Any, tokenizer: Tokenizer, folder: Path, base: Base, logits: torch.Tensor
) -> Verified:
    """What was saved is the adapter that said these `logits` on a probe."""
    trained, _ = as_published(model)
    tensors = same_tensors(trained, folder)
    reloaded, precision = _reloaded_on(model, tokenizer, folder, base)
    _same_updates(model, reloaded)
    with lending(reloaded, precision, model.device):
        again = probe_logits(reloaded, tokenizer, model.device)
    difference = same_logits(model, logits, again, base.computes_in)
    if not base.is_exact:
        reloaded, precision = _exactly_on(folder, tokenizer, base.folder)
    # merging is compared in fp32, the precision of the published weights
    cpu = torch.device("cpu")
    with lending(reloaded, precision, cpu):
        before = probe_logits(reloaded, tokenizer, cpu)
    with lending(reloaded, precision, cpu, merged=True):
        after = probe_logits(reloaded, tokenizer, cpu)
    quantized_difference = None
    if base.quantization:
        quantized_difference = float((logits.float().cpu() - after).abs().mean())
    return Verified(
        tensors,
        difference,
        merged_difference=same_merged(reloaded, before, after),
        quantized_to_merged_difference=quantized_difference,
    )


def compare_merged(expected: torch.Tensor, tokenizer: Tokenizer, folder: Path) -> None:
    """Compare what was saved in `folder` of a base with an adapter in its weights. `expected`:
    logits of the base with the adapter on it.
    """
    same_tokenizer(tokenizer, folder)
    merged = load_mapped(folder)  # refuses missing and left over tensors
    if merged.get_input_embeddings().weight.shape[0] < rows_of(tokenizer):
        refuse("the embeddings have fewer rows than the tokenizer's tokens need")
    same_merged(merged, expected, probe_logits(merged, tokenizer))
    stops_as_saved(merged, tokenizer, folder)


def in_fp32(model: Any) -> dict[torch.nn.Parameter, torch.dtype]:
    """All weights of a model, to be computed with in fp32."""
    return dict.fromkeys(model.parameters(), torch.float32)


def _exactly_on(folder: Path, tokenizer: Tokenizer, base: Path) -> tuple[Any, Precision]:
    """The adapter in `folder` on its base as the base's files have it, in fp32."""
    model = load_mapped(base, scores=is_reward_model(folder))
    make_fit(model, folder, tokenizer, STRANGERS_SEED)
    precision = in_fp32(model)
    return attach(model, folder).eval(), precision


def _reloaded_on(
    trained: Any, tokenizer: Tokenizer, folder: Path, base: Base
) -> tuple[Any, Precision]:
    """The adapter in `folder` on its base as it was trained on: on the very weights that were
    frozen, once each of them was seen to be what the base's files hold.
    """
    model = load_mapped(base.folder, scores=is_reward_model(folder))
    rows = {name: len(weight) for name, weight in model.named_parameters() if weight.ndim}
    make_fit(model, folder, tokenizer, STRANGERS_SEED)
    precision = {}
    for name, weight in list(model.named_parameters()):
        frozen = frozen_weight(trained, name)
        # an adapter brings new rows along: logits of their tokens show whether it does
        in_file = slice(rows.get(name))
        if frozen.is_files and not _is_files(frozen, weight.data[in_file], base):
            refuse(f"{name}: what was trained on is not the base's weight")
        if few_bits.is_quantized(frozen.layer):
            few_bits.share_quantized(model, name, frozen.layer)
            continue
        precision[weight] = frozen.weight.dtype
        lies_whole = part_of(frozen.weight).shape == weight.shape
        if frozen.is_files and rows.get(name) == len(weight) and lies_whole:
            weight.data = frozen.weight.data
    few_bits.as_quantized(model, trained.get_base_model())
    return attach(model, folder).eval(), precision


def _is_files(frozen: Frozen, saved: torch.Tensor, base: Base) -> bool:
    """Whether a weight that was not trained is the base's, in the precision that it was held in."""
    trained = part_of(frozen.weight)[: len(saved)]
    if few_bits.is_quantized(frozen.layer) and frozen.weight is frozen.layer.weight:  # no bias
        again = few_bits.quantized_again(frozen.layer, saved, base.dtype)
        difference = (again - few_bits.dequantized(frozen.layer)).abs().mean()
        return float(difference) <= REQUANTIZED * float(again.abs().mean())
    saved = part_like(saved, frozen.weight)
    expected = saved.to(trained.device, base.dtype).to(trained.dtype)
    return torch.equal(trained, expected)


def _same_updates(trained: Any, reloaded: Any) -> None:
    """The same layers are adapted, in the same way and on the same scale."""
    before, after = adapted_layers(trained), adapted_layers(reloaded)
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name), after.get(name)
        if one is None or other is None:
            refuse(f"{name} is adapted {'in training only' if other is None else 'once saved'}")
        if one.kind != other.kind:
            refuse(f"{name} is adapted in another way ({one.kind}, saved as {other.kind})")
        if not math.isclose(one.scale, other.scale, rel_tol=1e-6):
            refuse(f"{name} is adapted by {one.scale:g} in training, and {other.scale:g} saved")
