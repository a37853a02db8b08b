"""Publish what was trained: save it to a staging folder, reload it from there, compare, and only
then rename the folder to what it is called. A model, an adapter and a merged one go the same way.

One process publishes; the others wait for it, and what it cannot write all of them raise.
"""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import screen, upstream
from llmpipe.errors import Say
from llmpipe.faults import writing
from llmpipe.files.json import write_json
from llmpipe.files.writing import publishing
from llmpipe.models.adapters import WEIGHTS, Base, as_published, attach, is_tied, make_fit
from llmpipe.models.mapped import Precision, borrowed, lending, load_mapped, parts_of
from llmpipe.models.pretrained import load_tokenizer
from llmpipe.models.verify.adapter import (
    compare_adapter,
    compare_adapter_on_parts,
    compare_merged,
    in_fp32,
)
from llmpipe.models.verify.logits import probe_logits
from llmpipe.models.verify.model import Seen, compare_model, compare_sharded
from llmpipe.models.verify.saved import Verified, same_tensors
from llmpipe.parallel.parts import Spread, let_go, plain_class, reshard, whole_tensors
from llmpipe.parallel.world import World
from llmpipe.run.artifact import is_reward_model
from llmpipe.run.folders import INDEX
from llmpipe.run.footprint import LAYER
from llmpipe.run.weights import tensors_in

SAVING = "saving the model, and comparing what was saved"
SINGLE = "model.safetensors"
SHARD = 1 << 30
"""Bytes of a merged model, or of one in parts, that are in memory, and in one file, at once; more
where a layer is."""


@screen.doing(SAVING)
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


@screen.doing(SAVING)
def publish_sharded(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    folder: Path,
    world: World,
    spread: Spread,
    say: Say,
) -> Verified:
    """Save a model that is in parts as any other one is saved, and compare what was saved once it
    is loaded in parts again; at no time is more of it whole than a file of it. Collective.

    The model's weights are gone afterwards: there is room for one model. Raises UserError (3) as
    `publish_model` does, in every process.
    """
    upstream.as_loaded(model)
    trained = Seen.of(model, tokenizer)
    with publishing(folder) if world.is_first else nullcontext() as staging:
        place = world.place(staging)
        tensors = whole_tensors(model)
        with world.as_one(), _to_the_end(tensors):
            if world.is_first:
                most = _file_bytes(sum(weight.nbytes for weight in model.parameters()))
                with writing(folder, place):
                    _save_parts(_described(model), _layers(tensors), place, most)
                    tokenizer.save_pretrained(place)
        let_go(model)
        world.bring(place)
        verified = compare_sharded(trained, tokenizer, place, world, spread)
    difference = f"{verified.max_logit_difference:.1e}"
    say(f"verified: {verified.tensors} tensors, logits differ by {difference} after reloading")
    return verified


@screen.doing(SAVING)
def publish_adapter(
    model: Any, tokenizer: Tokenizer, folder: Path, base: Base, say: Say
) -> Verified:
    """Save an adapter, PEFT's `model`, with its tokenizer to `folder`; returns what was compared.

    Raises UserError (3) when the saved adapter, on its base or merged into it, is not the trained
    one; nothing is published then.
    """
    upstream.as_loaded(model)
    with publishing(folder) as staging:
        _save_adapter(model, tokenizer, staging, base)
        verified = compare_adapter(model, tokenizer, staging, base)
    _say_of_adapter(verified, say)
    return verified


def publish_adapter_on_parts(
    model: Any, tokenizer: Tokenizer, folder: Path, base: Base, world: World, say: Say
) -> Verified:
    """Save an adapter whose base is in parts, as `publish_adapter` does. Collective; what one
    process refuses all of them do.
    """
    upstream.as_loaded(model)
    reshard(model)
    with publishing(folder) if world.is_first else nullcontext() as staging:
        place = world.place(staging)
        with world.as_one():
            if world.is_first:
                with writing(folder, place):
                    _save_adapter(model, tokenizer, place, base)
        world.bring(place)
        verified = compare_adapter_on_parts(model, tokenizer, place, base, world)
    _say_of_adapter(verified, say)
    return verified


def _save_adapter(model: Any, tokenizer: Tokenizer, folder: Path, base: Base) -> None:
    tensors, config = as_published(model)
    config.base_model_name_or_path = base.reference  # no machine's path in an artifact
    config.revision = base.revision
    weights = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(weights, folder / WEIGHTS)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _say_of_adapter(verified: Verified, say: Say) -> None:
    reloaded = f"logits differ by {verified.max_logit_difference:.1e} after reloading"
    merged = f"by {verified.merged_difference:.1e} when merged"
    say(f"verified: {verified.tensors} tensors, {reloaded}, {merged}")


@screen.doing("merging the adapter into its base")
def merge(base: Path, adapter: Path, folder: Path) -> None:
    """Publish the base with the adapter's update added to its weights, in fp32, to `folder`: a
    model like any other. At no time is more of it in memory than a file of it.

    Raises UserError (3) when what was saved says something else than the adapter on its base.
    """
    tokenizer = load_tokenizer(adapter)
    model = load_mapped(base, scores=is_reward_model(adapter))
    make_fit(model, adapter, tokenizer)
    precision = in_fp32(model)
    adapted = attach(model, adapter).eval()
    cpu = torch.device("cpu")
    with lending(adapted, precision, cpu):
        expected = probe_logits(adapted, tokenizer, cpu)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    with publishing(folder) as staging:
        _save_merged(adapted, precision, staging)
        tokenizer.save_pretrained(staging)
        compare_merged(expected, tokenizer, staging)


def _described(model: PreTrainedModel) -> PreTrainedModel:
    """A model without weights, of the kind and the configuration of one that is in parts: as what
    is saved of that is called by transformers.
    """
    kind = plain_class(model)
    config = copy.deepcopy(model.config)
    vars(config).pop("distributed_config", None)  # of this run, not of the model
    with torch.device("meta"):
        described: PreTrainedModel = kind(config)
    if model.can_generate():
        described.generation_config = model.generation_config
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:  # by which its files were read
        described._weight_conversions = conversions
    return described


@contextmanager
def _to_the_end(tensors: Iterator[Any]) -> Iterator[None]:
    """Take all of what every process has to take, also where this one needs it no longer."""
    try:
        yield
    finally:
        for _ in tensors:
            pass


def _layers(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Tensors, layer by layer: some names of files stand for parts of several."""

    def layer(named: tuple[str, Tensor]) -> str:
        inside = LAYER.match(named[0])
        return inside[0] if inside else named[0]

    for _, together in groupby(tensors, key=layer):
        yield dict(together)


def _save_merged(adapted: Any, precision: Precision, folder: Path) -> None:
    """Save PEFT's model merged."""
    model = adapted.get_base_model()
    _save_parts(model, _merged_tensors(adapted, precision), folder, SHARD)
    if not is_tied(model) and model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False  # one of them has learned apart from the other
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _file_bytes(size: int) -> int:
    """Bytes of one file of a model in parts, which has `size`: what is written is in memory twice,
    so that a sixteenth of it is an eighth of a model.
    """
    return max(SHARD // 4, min(SHARD, size // 16))


def _save_parts(
    model: PreTrainedModel, parts: Iterable[dict[str, Tensor]], folder: Path, most: int
) -> None:
    """Save the tensors of a model, file by file of `most` bytes, as transformers would save all of
    it at once.
    """
    work = folder / ".shard"
    files: dict[str, list[str]] = {}
    parameters = size = 0
    for number, shard in enumerate(_shards(parts, most), 1):
        model.save_pretrained(work, state_dict=shard, max_shard_size=sys.maxsize)
        same_tensors(shard, work, may_be_renamed=True)
        name = f"{number:05}.safetensors"
        (work / SINGLE).rename(folder / name)
        files[name] = list(tensors_in(folder / name))
        parameters += sum(tensor.numel() for tensor in shard.values())
        size += sum(tensor.nbytes for tensor in shard.values())
        shard.clear()
    shutil.rmtree(work)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if len(files) == 1:
        (folder / next(iter(files))).rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for name, tensors in files.items():
        whole = f"model-{name.removesuffix('.safetensors')}-of-{len(files):05}.safetensors"
        (folder / name).rename(folder / whole)
        weight_map |= dict.fromkeys(tensors, whole)
    totals = {"total_parameters": parameters, "total_size": size}
    write_json(folder / INDEX, {"metadata": totals, "weight_map": weight_map})


def _merged_tensors(adapted: Any, precision: Precision) -> Iterator[dict[str, Tensor]]:
    """The tensors of PEFT's model merged, part by part; of those that share their weights one."""
    model = adapted.get_base_model()
    seen: dict[int, Tensor] = {}
    for part in list(parts_of(model)):
        with borrowed(part, precision, torch.device("cpu")):
            plain = part.module
            if part.whole:
                plain = upstream.merged_part(adapted, part.module)
            if plain is not part.module:
                parent, _, child = part.name.rstrip(".").rpartition(".")
                setattr(model.get_submodule(parent), child, plain)
            saved = plain.state_dict().keys()
            tensors = [*plain.named_parameters(recurse=part.whole)]
            tensors += plain.named_buffers(recurse=part.whole)
            fresh = {
                part.name + name: tensor
                for name, tensor in tensors
                if name in saved and id(tensor) not in seen
            }
            seen |= {id(tensor): tensor for tensor in fresh.values()}
            yield {name: tensor.detach() for name, tensor in fresh.items()}


def _shards(parts: Iterable[dict[str, Tensor]], most: int) -> Iterator[dict[str, Tensor]]:
    """Parts together, as many as fit a file of `most` bytes when the next one is like the last:
    none is made before the file in front of it is written, and these are emptied then.
    """
    shard: dict[str, Tensor] = {}
    size = 0
    for part in parts:
        bytes_of_part = sum(tensor.nbytes for tensor in part.values())
        size += bytes_of_part
        shard |= part
        del part
        if size + bytes_of_part > most:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard
