"""Whether what lies on the disk is what was trained: the fourth rule of the hand-off contract.

Saved tensors are whole, finite and the trained ones; reloaded, the model gives the same logits on a
probe, with the same tokenizer and template; an adapter also does when it is merged into its base;
and generation writes several lines, and stops at the end of a turn. Whatever differs is refused
with UserError (3), NaN and Inf with (4).

Tensors are compared number by number, which needs no threshold, and tells of one wrong tensor in a
model of any size. Logits tell of what is made of them, a scale or a layer left out; what they may
differ by is `rounding`, of the precision, the depth and their own size. A base is held once: what
is reloaded borrows the weights of its files, part by part (`mapped`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.data.tokenizer import SEVERAL_LINES
from llmpipe.errors import INTEGRITY, NUMERIC, UserError
from llmpipe.faults import reading
from llmpipe.models.adapters import (
    Base,
    Frozen,
    adapted_layers,
    as_published,
    attach,
    frozen_weight,
    make_fit,
)
from llmpipe.models.generate import render
from llmpipe.models.mapped import Precision, lending, load_mapped
from llmpipe.models.pretrained import load_model, load_tokenizer, rows_of, take_generation
from llmpipe.models.rng import isolated_rng
from llmpipe.parallel.parts import Spread, looking
from llmpipe.parallel.tensors import part_like, part_of
from llmpipe.parallel.world import World
from llmpipe.run.artifact import is_reward_model
from llmpipe.run.context import tokens_of
from llmpipe.run.weights import tensors_in
from llmpipe.upstream import few_bits

PROBE = "The quick brown fox jumps over 13 lazy dogs.\nWas wäre, wenn? 你好 \U0001f642"
PROBE_TOKENS = 64
PROMPT_TOKENS = 8
NOT_UNDERSTOOD = (ValueError, TypeError, ImportError)
"""What transformers raises of a generation configuration."""
ONE_BY_ONE = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "cache_implementation": None,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
"""How one answer is generated token by token, whatever a saved configuration says of that."""
LINES = "One:\n\n- two\n- three"  # few, since they are generated
NEWEST = 8  # of these are the last ids of the vocabulary

# of what a stranger draws for rows that the base lacks: another one than in training
STRANGERS_SEED = 1

AGAIN = 2
"""Units in the last place of the largest logit that one layer may move a logit by where the same
sums are computed once more. They are equal to the bit on a CPU."""

OTHERWISE = 256
"""The same where a sum is computed in another order, in fp32: a merged adapter's logits move by 1
to 10 units, a wrong scale moves them by tens of thousands."""

REQUANTIZED = 1e-3  # of the mean weight: codes at the edge of two are rounded either way


@dataclass(frozen=True)
class Behaviour:
    """What a model and the reloaded one have in common."""

    max_logit_difference: float
    """The greatest on a probe; of the score, of a reward model."""
    stops_at: int | list[int] | None = None
    """The tokens at which generation was seen to stop; a reward model has none."""


@dataclass(frozen=True)
class Verified:
    """What was compared after reloading, as the manifest holds it."""

    tensors: int
    """How many were saved."""
    max_logit_difference: float
    stops_at: int | list[int] | None = None
    merged_difference: float | None = None
    """The greatest difference of a logit after an adapter was merged into its base, in fp32."""
    quantized_to_merged_difference: float | None = None
    """The mean difference of a logit of the quantized base with its adapter and the merged one."""

    def record(self) -> dict[str, Any]:
        """For a manifest, without what was not compared."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def compare_model(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> Verified:
    """Compare a whole model with what was saved of it in `folder`."""
    _same_tokenizer(tokenizer, folder)
    trained = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    # files may have other names for some, as those of GPT-NeoX; these are compared once reloaded
    tensors = same_tensors(trained, folder, may_be_renamed=True)
    reloaded = load_model(folder).to(model.device).eval()  # refuses missing and left over tensors
    for name, tensor in reloaded.state_dict().items():
        if not _equal(tensor.cpu(), trained[name]):
            _refuse(f"{name} is not the tensor that was trained")
    if reloaded.get_input_embeddings().weight.shape[0] < rows_of(tokenizer):
        _refuse("the embeddings have fewer rows than the tokenizer's tokens need")
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
        _same_tokenizer(tokenizer, folder)
        again = load_model(folder, device=str(world.device), spread=spread).eval()
        for name, part in _parts(again):
            if part != trained.parts[name]:
                _refuse(f"{name} is not the tensor that was trained")
        if again.get_input_embeddings().weight.shape[0] < rows_of(tokenizer):
            _refuse("the embeddings have fewer rows than the tokenizer's tokens need")
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


def compare_adapter(model: Any, tokenizer: Tokenizer, folder: Path, base: Base) -> Verified:
    """Compare an adapter with what was saved of it in `folder`: on its base as it was trained, and
    merged into it.
    """
    _same_tokenizer(tokenizer, folder)
    verified = _same_adapter(model, tokenizer, folder, base, probe_logits(model, tokenizer))
    return replace(verified, stops_at=_stops_as_saved(model.get_base_model(), tokenizer, folder))


def compare_adapter_on_parts(
    model: Any, tokenizer: Tokenizer, folder: Path, base: Base, world: World
) -> Verified:
    """Compare an adapter whose base is in parts with what was saved of it in `folder`: each process
    looks at its part of the base, the first one at all else. Collective; what one process refuses
    all of them do.
    """
    with looking(model):
        logits = probe_logits(model, tokenizer)
        stops_at = _stops_as_saved(model.get_base_model(), tokenizer, folder)
    verified, refused = None, None
    try:
        _same_tokenizer(tokenizer, folder)
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
    difference = _same_logits(model, logits, again, base.computes_in)
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
        merged_difference=_same_merged(reloaded, before, after),
        quantized_to_merged_difference=quantized_difference,
    )


def compare_merged(expected: torch.Tensor, tokenizer: Tokenizer, folder: Path) -> None:
    """Compare what was saved in `folder` of a base with an adapter in its weights. `expected`:
    logits of the base with the adapter on it.
    """
    _same_tokenizer(tokenizer, folder)
    merged = load_mapped(folder)  # refuses missing and left over tensors
    if merged.get_input_embeddings().weight.shape[0] < rows_of(tokenizer):
        _refuse("the embeddings have fewer rows than the tokenizer's tokens need")
    _same_merged(merged, expected, probe_logits(merged, tokenizer))
    _stops_as_saved(merged, tokenizer, folder)


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
            _refuse(f"{name}: what was trained on is not the base's weight")
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
            _refuse(f"{name} is adapted {'in training only' if other is None else 'once saved'}")
        if one.kind != other.kind:
            _refuse(f"{name} is adapted in another way ({one.kind}, saved as {other.kind})")
        if not math.isclose(one.scale, other.scale, rel_tol=1e-6):
            _refuse(f"{name} is adapted by {one.scale:g} in training, and {other.scale:g} saved")


def probe_logits(
    model: Any, tokenizer: Tokenizer, device: torch.device | None = None
) -> torch.Tensor:
    """Logits on the probe text, with the model in evaluation mode: [1, tokens, vocabulary], or
    scores [1, 1] of a reward model. `device`: where it computes, if not where its weights lie.
    """
    was_training = model.training
    model.eval()
    with isolated_rng(), torch.no_grad():
        logits: torch.Tensor = model(_probe(model, tokenizer).to(device or model.device)).logits
    model.train(was_training)
    return logits


def rounding(model: Any, logits: torch.Tensor, dtype: torch.dtype, units: int) -> float:
    """What rounding alone may make two computations of these logits differ by, in `dtype`: units in
    the last place of the largest, in each layer anew, as in a random walk.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    largest = max(float(logits.abs().max()), 1.0)
    return units * torch.finfo(dtype).eps * math.sqrt(depth + 1) * largest


def _probe(model: Any, tokenizer: Tokenizer) -> torch.Tensor:
    """The last token ids of the vocabulary, which may be new ones, and those of the probe text:
    [1, PROBE_TOKENS]; fewer where the text has few, or the model takes few.
    """
    rows = rows_of(tokenizer)
    newest = list(range(max(rows - NEWEST, 0), rows))
    ids = newest + tokenizer(PROBE)["input_ids"] * 4
    most = min(PROBE_TOKENS, tokens_of(model.config.to_dict()) or PROBE_TOKENS)
    return torch.tensor([ids[:most]], device=model.device)


def _refuse(difference: str, code: int = INTEGRITY) -> NoReturn:
    hint = "nothing was published; the checkpoints are kept"
    raise UserError(f"verification failed: {difference}", hint, code)


def _same_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    reloaded = load_tokenizer(folder)
    for name in ("pad_token_id", "eos_token_id", "chat_template"):
        saved, trained = getattr(reloaded, name), getattr(tokenizer, name)
        if saved != trained:
            _refuse(f"{name} is {saved!r} after reloading, {trained!r} in training")
    if reloaded(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
        _refuse("the tokenizer splits a probe text differently after reloading")


def same_tensors(
    trained: dict[str, torch.Tensor], folder: Path, may_be_renamed: bool = False
) -> int:
    """Every saved tensor is whole, finite and the trained one; returns how many there are."""
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        with reading(path, "safetensors"), safe_open(path, framework="pt") as file:
            names = list(file.keys())
            count += len(names)
            for name in names:
                _same_tensor(f"{path.name}: {name}", file.get_tensor(name), trained.get(name))
                if name not in trained and not may_be_renamed:
                    _refuse(f"{path.name}: {name} is not the tensor that was trained")
    return count


def _same_tensor(place: str, saved: torch.Tensor, trained: torch.Tensor | None) -> None:
    if saved.numel() == 0:
        _refuse(f"{place} is empty")
    if not torch.isfinite(saved).all():
        _refuse(f"{place} holds NaN or Inf", NUMERIC)
    if trained is not None and not _equal(saved, trained):
        _refuse(f"{place} is not the tensor that was trained")


def _equal(saved: torch.Tensor, trained: torch.Tensor) -> bool:
    """Whether they hold the same numbers in the precision that was saved."""
    return torch.equal(saved, trained.to(saved.dtype))


def _same_behaviour(logits: torch.Tensor, reloaded: Any, tokenizer: Tokenizer) -> Behaviour:
    """The trained model's logits on the probe, and generation that stops at every stop token
    alone.
    """
    again = probe_logits(reloaded, tokenizer)
    difference = _same_logits(reloaded, logits, again, logits.dtype)
    if not reloaded.can_generate():
        return Behaviour(difference)
    return Behaviour(difference, _stops_at(reloaded, tokenizer))


def _same_logits(
    model: Any, logits: torch.Tensor, again: torch.Tensor, dtype: torch.dtype
) -> float:
    """The greatest difference of logits and the reloaded model's, which is rounding."""
    difference = float((logits - again).abs().max())
    # where a part of the weights was taken out of them, the sums are others once it is back in
    units = OTHERWISE if hasattr(model, "began_with") else AGAIN
    if not difference <= rounding(model, logits, dtype, units):
        outputs = "logits" if model.can_generate() else "scores"
        _refuse(f"{outputs} on a probe differ by {difference:.2e} after reloading")
    return difference


def _same_merged(model: Any, before: torch.Tensor, after: torch.Tensor) -> float:
    """The greatest difference of logits in fp32 of an adapter on its base, and merged into it."""
    difference = float((before - after).abs().max())
    if not difference <= rounding(model, before, torch.float32, OTHERWISE):
        shown = f"differ by {difference:.2e}"
        _refuse(f"merged into its base, the adapter's logits on a probe {shown}")
    return difference


def _stops_as_saved(model: Any, tokenizer: Tokenizer, folder: Path) -> int | list[int] | None:
    """Where a model stops that generates as the folder says; None of one that does not generate."""
    if not model.can_generate():
        return None
    configured = model.generation_config
    was_training = model.training
    take_generation(model, folder)
    model.eval()
    try:
        return _stops_at(model, tokenizer)
    finally:
        model.generation_config = configured
        model.train(was_training)


def _stops_at(model: PreTrainedModel, tokenizer: Tokenizer) -> int | list[int] | None:
    """Where generation stops as it is configured in the saved folder: seen at every stop token,
    behind several lines, and nowhere within these.
    """
    stops_at: int | list[int] | None = model.generation_config.eos_token_id
    stops = stops_at if isinstance(stops_at, list) else [stops_at]
    if tokenizer.eos_token_id not in stops:
        _refuse("generation does not stop at the end of a turn")
    ordinary = tokenizer(SEVERAL_LINES, add_special_tokens=False)["input_ids"]
    for token in stops:
        if token in ordinary:
            shown = repr(tokenizer.decode([token]))
            _refuse(f"generation would stop at {shown}, which ordinary text holds")
    _check_turn(tokenizer, stops)
    other = next(i for i in range(len(stops) + 1) if i not in stops)
    lines = tokenizer(LINES, add_special_tokens=False)["input_ids"] or [other] * 2
    for token in stops:
        words = [*lines, token, other]
        said = _forced(model, tokenizer, words)
        if said == words:
            _refuse("generation does not stop at the end of a turn")
        if said != words[:-1]:
            last = repr(tokenizer.decode(said[-1:]))
            _refuse(f"generation of several lines stops at {last}, not at the end of a turn")
    return stops_at


def _check_turn(tokenizer: Tokenizer, stops: list[Any]) -> None:
    """In a conversation, as the saved template writes it, a stop token stands behind the
    assistant's lines, and none within them.
    """
    if not tokenizer.chat_template:
        return
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": LINES}]
    try:
        text = render(tokenizer, {"messages": turns}, open_turn=False)
    except UserError:
        return  # it takes other conversations
    begin = text.rfind(LINES)
    if begin < 0:
        return
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    at_stops = [start - begin for token, (start, _) in places if token in stops]
    if any(0 <= place < len(LINES) for place in at_stops):
        _refuse("generation would stop within an assistant's turn of several lines")
    if not any(place >= len(LINES) for place in at_stops):
        _refuse("generation does not stop at what ends the assistant's turns")


def _forced(model: PreTrainedModel, tokenizer: Tokenizer, words: list[int]) -> list[int]:
    """What is generated as the saved folder configures it where only `words` are allowed."""
    prompt = _probe(model, tokenizer)[:, :PROMPT_TOKENS]
    size = prompt.shape[1]

    def only_allowed(_: int, ids: torch.Tensor) -> list[int]:
        return [words[min(len(ids) - size, len(words) - 1)]]

    as_saved = reading("generation_config.json", "a generation configuration", *NOT_UNDERSTOOD)
    with isolated_rng(), torch.no_grad(), as_saved:
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(words),
            prefix_allowed_tokens_fn=only_allowed,
            tokenizer=tokenizer,  # where the configuration stops at texts
            **ONE_BY_ONE,
        )
    said: list[int] = output[0, size:].tolist()
    return said
