"""What a process trains on, and how the recipe's `auto`s are decided.

`choose` is `detect` what is here, `decide` what to do with it, which is a function of the recipe
and the host alone, and `announce` what was decided and why.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from llmpipe import __version__, upstream
from llmpipe.errors import Say, UserError
from llmpipe.models.device import device_name, has_bf16, keep_imports, make_exact, take_device
from llmpipe.models.pretrained import configuration, model_class
from llmpipe.parallel.group import join
from llmpipe.parallel.parts import Spread
from llmpipe.parallel.world import World
from llmpipe.peers import meet
from llmpipe.recipe.optimizers import OPTIMIZERS
from llmpipe.recipe.reinforcement import RLRecipe
from llmpipe.recipe.sections import Adapter, Launch, Training
from llmpipe.run import machine, strategy
from llmpipe.run.footprint import Shape
from llmpipe.run.manifest import Platform
from llmpipe.run.provenance import installed
from llmpipe.run.strategy import Room


@dataclass(frozen=True)
class Host:
    """What a process finds where it runs."""

    device: str
    """cpu or cuda."""
    processes: int
    """Of this run, over all machines."""
    threads: int
    """Of this process on the CPU."""
    has_bf16: bool
    """Whether bf16 matrix products are in hardware."""
    has_flash_attention: bool
    """Whether the package flash-attn is installed, and fit for this GPU."""
    memory: float = math.inf
    """Bytes that a process may take: of its GPU, the smallest of this machine; of a CPU, its share
    of the machine's."""
    is_even: bool = True
    """Whether as many processes are on each machine."""


@dataclass(frozen=True)
class Reasons:
    """Why, in words that follow the choice in brackets."""

    precision: str = ""
    attention: str = ""
    strategy: str = ""


@dataclass(frozen=True)
class Hardware:
    """What this process trains on, and how the recipe's `auto`s were decided."""

    device: str
    processes: int
    threads: int
    micro_batch_size: int
    """Sequences per process and forward pass."""
    accumulation: int
    """Forward passes per process and optimizer step."""
    bf16: bool
    """Whether arithmetic is in bf16; weights that are trained are fp32 either way."""
    attention: str
    """The `attn_implementation` that models are loaded with."""
    compiles: bool = False
    """Whether the layers of what is trained are compiled."""
    activation_checkpointing: str = "none"
    """Which activations are computed again in the backward pass: none, selective, full."""
    sharded: bool = False
    """Whether what is trained is in parts, in each process one and in a checkpoint a file for each;
    one process alone has the one part that is all of it, and goes on from those of several."""
    copies: int = 1
    """How many there are of what is in parts: with `hsdp` one on each machine."""
    offload: bool = False
    """Whether these parts lie in the host's memory between uses."""
    zero: int = 0
    """The stage of DeepSpeed's ZeRO that it is trained under, 2 or 3; 0: without DeepSpeed. A
    model is whole in each process before and after the training, and `sharded` is not said."""
    reasons: Reasons = Reasons()

    def cut(self, batch_size: int, micro_batch_size: int) -> Hardware:
        """The same with so many sequences a forward pass; `batch_size`: of an optimizer step."""
        accumulation = batch_size // (micro_batch_size * self.processes)
        return replace(self, micro_batch_size=micro_batch_size, accumulation=accumulation)

    @property
    def strategy(self) -> str:
        """How several processes hold a model, in the recipe's word."""
        if self.zero:
            return f"zero{self.zero}"
        if not self.sharded:
            return "ddp"
        return "hsdp" if self.copies > 1 else "fsdp"

    @property
    def place(self) -> str:
        """Where models are loaded to."""
        return self.device if self.device == "cpu" else f"{self.device}:{machine.local_rank()}"

    @property
    def spread(self) -> Spread | None:
        """How a model is loaded that is sharded; None where each process holds all of it."""
        if not self.sharded or self.processes == 1:
            return None
        return Spread(self.processes, self.bf16, self.copies, self.offload)

    def frozen_dtype(self, adapter: Adapter) -> torch.dtype:
        """Of weights that are not trained.

        What an adapter is taken out of is not rounded, or it would not fit back.
        """
        return torch.bfloat16 if self.bf16 and not adapter.rewrites else torch.float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)

    def describe(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {**self._settings(), "device_name": device_name(self.device)}

    def resume_key(self) -> dict[str, Any]:
        """What must be equal for a resumed run to be bitwise the straight one."""
        settings = self._settings()
        del settings["accumulation"]
        if not self.compiles:  # then what is computed again is what it was, bit by bit
            del settings["compiles"], settings["activation_checkpointing"]
        return settings

    def _settings(self) -> dict[str, Any]:
        settings = asdict(self)
        del settings["reasons"]
        if not self.sharded:  # as older versions have written it
            del settings["sharded"], settings["copies"]
        if not self.offload:
            del settings["offload"]
        if not self.zero:
            del settings["zero"]
        return settings


NOTHING: Mapping[str, Any] = MappingProxyType({})


def choose(
    recipe: Training,
    say: Say,
    folder: Path | None = None,
    before: Mapping[str, Any] = NOTHING,
    shape: Shape | None = None,
) -> Hardware:
    """Look, decide, and say what was decided. Sets torch's threads.

    `folder`: of the model that is trained, or of its base, which decides what attention is
    possible; `before`: settings of a checkpoint that may be gone on from, by which `auto` is
    decided again; `shape`: of a model with random weights, where there is no folder. Called once
    all is imported. Collective: all processes decide by the same. Raises
    UserError when the recipe asks for what this machine or a batch cannot give.
    """
    keep_imports()
    take_device()
    host, before = agreed(detect(recipe.launch), before)
    join(host.device, offload=recipe.launch.offload)
    if folder:
        config = configuration(folder)
        known = model_class(folder, config=config)
        loaded = upstream.supported_attention(known, "sdpa")
        by_document = upstream.fits(known, config, loaded, host.device)
        shape = Shape.of_folder(folder) if host.processes > 1 else None
        hardware = decide(recipe, host, known, by_document, before, shape)
    else:
        hardware = decide(recipe, host, None, before=before, shape=shape)
    torch.set_num_threads(hardware.threads)
    if hardware.device == "cuda":
        make_exact()
    announce(hardware, recipe, say)
    return hardware


def detect(launch: Launch) -> Host:
    """What there is; how many processes and threads were asked for decides the share of this
    one.
    """
    processes = machine.world_size()
    threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    return Host(
        device="cuda" if torch.cuda.is_available() else "cpu",
        processes=processes,
        threads=threads or machine.thread_count(launch, machine.local_world_size()),
        has_bf16=has_bf16(),
        has_flash_attention=is_flash_attn_2_available(),
        memory=_memory(),
    )


def _memory() -> float:
    """Bytes that a process may take here, the same in all of this machine."""
    if not torch.cuda.is_available():
        return machine.memory() / machine.local_world_size()
    devices = range(torch.cuda.device_count())
    return min(torch.cuda.get_device_properties(device).total_memory for device in devices)


def agreed(host: Host, before: Mapping[str, Any]) -> tuple[Host, Mapping[str, Any]]:
    """What all processes decide by: the least of what they find, and a checkpoint's settings as
    rank 0 reads them. Collective. Raises UserError (2) where some have a GPU and some none.
    """
    if host.processes == 1:
        return host, before
    peers = meet()
    mine = {"host": asdict(host), "local": machine.local_world_size(), "before": dict(before)}
    told = [json.loads(text) for text in peers.gather(peers.turn(), json.dumps(mine))]
    hosts = [Host(**each["host"]) for each in told]
    if len({each.device for each in hosts}) > 1:
        places = ", ".join(f"rank {rank} {each.device}" for rank, each in enumerate(hosts))
        raise UserError(f"not all processes have a GPU: {places}", "see `llmpipe doctor` on each")
    least = replace(
        host,
        has_bf16=all(each.has_bf16 for each in hosts),
        has_flash_attention=all(each.has_flash_attention for each in hosts),
        memory=min(each.memory for each in hosts),
        is_even=len({each["local"] for each in told}) == 1,
    )
    return least, told[0]["before"]


def decide(
    recipe: Training,
    host: Host,
    model: type[PreTrainedModel] | None,
    by_document: bool = True,
    before: Mapping[str, Any] = NOTHING,
    shape: Shape | None = None,
) -> Hardware:
    """Precision, attention and micro-batch of a recipe on a host, for the class of a model or any.

    `by_document`: whether `upstream` knows how such a model attends to each document by itself;
    `before`: as in `choose`; `shape`: of the model, by which `strategy: auto` is decided.

    Raises UserError when a GPU has not the precision that the recipe asks for, and when
    `optim.batch_size` does not divide by processes and micro-batches.
    """
    bf16, precision_reason = precision(recipe.optim.precision, host)
    attention, attention_reason = _attention(host, recipe.packs, bf16, model, by_document)
    room = Room(host.processes, host.memory, host.device == "cuda", bf16)
    sharded, strategy_reason = strategy.choose(recipe, room, shape, before)
    zero = recipe.launch.zero
    compiles = recipe.launch.compile
    if compiles == "auto":  # ppo has five forms of each layer, grpo three: minutes until it pays
        able = by_document and not isinstance(recipe, RLRecipe) and not sharded and not zero
        compiles = host.device == "cuda" and able
    micro_batch_size = _micro_batch_size(recipe, host, before)
    return Hardware(
        device=host.device,
        processes=host.processes,
        threads=host.threads,
        micro_batch_size=micro_batch_size,
        accumulation=recipe.batch_size // (micro_batch_size * host.processes),
        bf16=bf16,
        attention=attention,
        compiles=compiles,
        activation_checkpointing=_checkpointing(recipe, before),
        sharded=sharded,
        copies=_copies(recipe, host, before),
        offload=recipe.launch.offload,
        zero=zero,
        reasons=Reasons(precision_reason, attention_reason, strategy_reason),
    )


def _copies(recipe: Training, host: Host, before: Mapping[str, Any]) -> int:
    """How many there are of what is in parts; `auto` keeps to its checkpoint."""
    asked, kept = recipe.launch.strategy, before.get("copies")
    if asked == "auto" and isinstance(kept, int) and 0 < kept <= host.processes:
        return kept
    if asked == "hsdp" and not host.is_even:
        problem = "launch.strategy: hsdp: machines have unequal numbers of processes"
        raise UserError(problem, "start as many on each, or set launch.strategy: fsdp")
    return strategy.machines(host.processes) if asked == "hsdp" else 1


def _micro_batch_size(recipe: Training, host: Host, before: Mapping[str, Any]) -> int:
    """Sequences per process and forward pass; `auto` is what a checkpoint was written with, which
    is bitwise gone on from with that alone.
    """
    size = machine.micro_batch_size(recipe, host.processes, host.device == "cuda")
    kept = before.get("micro_batch_size")
    if recipe.launch.micro_batch_size != "auto" or not isinstance(kept, int) or kept < 1:
        return size
    return size if recipe.batch_size % (kept * host.processes) else kept


def _checkpointing(recipe: Training, before: Mapping[str, Any]) -> str:
    """Which activations are computed again; where `auto` has not looked at memory yet, none."""
    asked, kept = recipe.launch.checkpointing, before.get("activation_checkpointing")
    if asked != "auto":
        return asked
    if kept is True:  # as ppo writes it
        return "full"
    return kept if isinstance(kept, str) else "none"


def precision(asked: str, host: Host) -> tuple[bool, str]:
    """Whether arithmetic is in bf16, and why."""
    if asked == "auto":
        support = "it" if host.has_bf16 else "no fast bf16"
        return host.has_bf16, f"the hardware has {support}"
    if asked == "bf16" and host.device == "cuda" and not host.has_bf16:
        problem = "optim.precision: bf16: this GPU has no bf16"
        raise UserError(problem, "set optim.precision: fp32")
    return asked == "bf16", "the recipe asks for it"


def _attention(
    host: Host, packed: bool, bf16: bool, model: type[PreTrainedModel] | None, by_document: bool
) -> tuple[str, str]:
    """The `attn_implementation` to load a model with for training, and why."""
    if by_document:
        return "sdpa", "document by document: no token is masked that could be left out"
    if host.device == "cuda" and packed and model is not None:
        for name, possible, reason in (
            ("flash_attention_2", host.has_flash_attention and bf16, "it needs no mask"),
            ("flex_attention", True, "its mask has blocks of tokens"),
        ):
            if possible and upstream.supported_attention(model, name) == name:
                return name, f"{model.__name__} attends by more than documents, and {reason}"
    name = "sdpa" if model is None else upstream.supported_attention(model, "sdpa")
    return name, "with one dense mask of tokens x tokens over a row"


def announce(hardware: Hardware, recipe: Training, say: Say) -> None:
    """Say what was decided and why."""
    line = f"hardware: {hardware.processes} x {hardware.device}, {hardware.threads} threads each"
    cut_later = hardware.device == "cuda" and recipe.launch.micro_batch_size == "auto"
    if not isinstance(recipe, RLRecipe) and not cut_later:  # who says so itself
        parts = (hardware.micro_batch_size, hardware.accumulation, hardware.processes)
        line += "; batch {} = {} x {} accumulated x {}".format(recipe.batch_size, *parts)
    say(line)
    arithmetic = "bf16 arithmetic" if hardware.bf16 else "fp32"
    say(f"precision: {arithmetic}, fp32 master weights ({hardware.reasons.precision})")
    say(f"attention: {hardware.attention} ({hardware.reasons.attention})")
    if why := hardware.reasons.strategy:
        say(f"strategy: {hardware.strategy}: {why}")
    elif hardware.zero:
        held = "gradients and moments" if hardware.zero == 2 else "weights, gradients and moments"
        share = f"each of {hardware.processes} processes holds a part of {held} while it trains"
        if hardware.processes == 1:
            share = "one process holds all of it"
        engine = f"DeepSpeed {installed('deepspeed')}"
        say(f"strategy: {hardware.strategy} (experimental, {engine}): {share}")
    elif hardware.sharded:
        share = f"each of {hardware.processes} processes holds a part of the model"
        share += ", of its gradients and its moments"
        if hardware.spread is None:
            share = "one process holds all of it, and several go on from its checkpoints"
        copies = f"; {hardware.copies} copies, one a machine" if hardware.copies > 1 else ""
        place = "; they lie in the host's memory between uses" if hardware.offload else ""
        say(f"strategy: {hardware.strategy}: {share}{copies}{place}")
    if hardware.compiles:
        say("compile: layers are compiled at the first step, once: some tens of seconds")
    if PathFinder.find_spec("kernels"):  # which `llmpipe.front` lets nobody import
        say("kernels: the package is installed, and not used: no native code of the Hub is fetched")
    optimizer = recipe.optim.optimizer
    if OPTIMIZERS[optimizer].paged and hardware.device == "cpu":
        why = "a CPU has nothing to page to, the moments stay where they are"
        say(f"optimizer: {optimizer}: {why}")


COMPUTING = "torch transformers trl peft accelerate tokenizers numpy".split()
"""Libraries that another version of may compute other bits with."""

COMPUTING_TOO = {"bitsandbytes", "vllm", "deepspeed"}  # where the recipe asks for them


def platform_of(recipe: Training, hardware: Hardware, world: World) -> Platform:
    """On what all processes of a run compute: names of devices, and versions."""
    devices = sorted(set(world.gather(device_name(hardware.device))))
    names = [*COMPUTING, *(name for _, name in recipe.packages() if name in COMPUTING_TOO)]
    if hardware.attention == "flash_attention_2":
        names.append("flash_attn")
    versions = {name: installed(name) or "none" for name in dict.fromkeys(names)}
    if hardware.device == "cuda":
        versions["cuda"] = str(torch.version.cuda or torch.version.hip)
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return {"device": " and ".join(devices), "llmpipe": __version__, **versions}
