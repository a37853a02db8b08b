"""How several processes hold a model, as far as a recipe and the memory of a device decide it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmpipe.recipe.reinforcement import RLRecipe
from llmpipe.recipe.sections import Adapter, Training
from llmpipe.run.footprint import USED, Held, Pass, Shape
from llmpipe.run.machine import (
    gpus,
    local_world_size,
    micro_batch_size,
    micro_batch_sizes,
    outside,
)


def against_parts(recipe: Training, processes: int) -> Iterator[tuple[str, str]]:
    """Why a model cannot be spread over processes in a recipe, and what to do."""
    launch = recipe.launch
    if recipe.adapter:
        yield from _against_adapting(recipe, recipe.adapter)
    if isinstance(recipe, RLRecipe) and recipe.rollout.engine == "vllm":
        yield "rollout.engine: vllm draws in one process", "set rollout.engine: local"
    if recipe.optim.optimizer != "adamw" and not recipe.adapter:
        yield f"{recipe.optim.optimizer} does not know parts of weights", "set optimizer: adamw"
    if getattr(recipe, "trainer", None):
        yield "no field of `trainer:` is tried with it", "remove `trainer:`"
    if launch.compile is True:
        yield "layers in parts are not compiled", "set launch.compile: auto"
    draws, auto = isinstance(recipe, RLRecipe), (launch.micro_batch_size, launch.checkpointing)
    if draws and gpus() and "auto" in auto:
        remedy = "set launch.micro_batch_size and launch.activation_checkpointing"
        yield f"what fits in a GPU's memory is not measured with it in {recipe.stage}", remedy
    if launch.strategy == "hsdp" and draws:
        yield f"not tried in {recipe.stage}", "set launch.strategy: fsdp"
    if launch.strategy == "hsdp" and machines(processes) < 2:
        yield "all processes are on one machine, which has one copy", "set launch.strategy: fsdp"
    if launch.strategy == "hsdp" and processes % machines(processes):
        yield f"{processes} processes on {machines(processes)} machines", "start as many on each"


def against_offload(recipe: Training, processes: int) -> Iterator[tuple[str, str]]:
    """Why a model's parts cannot lie in the host's memory, and what to do."""
    strategy = recipe.launch.strategy
    if strategy not in ("fsdp", "hsdp"):
        problem = f"launch.strategy is {strategy}, and what is offloaded is a process's part"
        yield problem, "set launch.strategy: fsdp"
    elif processes < 2:
        yield "one process alone has all of the model, and no part", "set launch.processes: 2"
    without = "remove it, or a launcher's FSDP_OFFLOAD_PARAMS"
    if recipe.adapter:
        yield "not built beside an adapter, which is whole on the device", without
    if isinstance(recipe, RLRecipe):
        yield f"not built in {recipe.stage}, whose models are whole for a while", without


def against_zero(recipe: Training, processes: int) -> Iterator[tuple[str, str]]:
    """Why a recipe cannot be trained under DeepSpeed's ZeRO, and what to do."""
    launch, adapter = recipe.launch, recipe.adapter
    if isinstance(recipe, RLRecipe):
        problem = f"not built in {recipe.stage}, whose loop is no trainer of TRL's"
        yield problem, "set launch.strategy: fsdp"
        return
    if recipe.quantization:
        yield "a quantized model is not put in parts", "remove quantization, or set ddp"
    if adapter and launch.zero == 3:
        why = "DeepSpeed does not gather weights of two precisions (its issue 8072)"
        yield f"beside an adapter, {why}", "set launch.strategy: fsdp, or zero2"
    if recipe.optim.optimizer != "adamw":
        yield f"{recipe.optim.optimizer} is not tried with it", "set optimizer: adamw"
    if getattr(recipe, "precompute", False):
        yield "precompute: true has an engine of its own for the reference", "set it to false"
    if getattr(recipe, "trainer", None):
        yield "no field of `trainer:` is tried with it", "remove `trainer:`"
    if launch.compile is True:
        yield "layers are not compiled under an engine", "set launch.compile: auto"
    if gpus() and "auto" in (launch.micro_batch_size, launch.checkpointing):
        remedy = "set launch.micro_batch_size and launch.activation_checkpointing"
        yield "what fits in a GPU's memory is not measured with it", remedy


def machines(processes: int) -> int:
    """On how many machines so many processes are, with as many on each as here."""
    local = local_world_size() if outside() else processes
    return -(-processes // local)


def _against_adapting(recipe: Training, adapter: Adapter) -> Iterator[tuple[str, str]]:
    """Why an adapter cannot be trained on a model in parts, and what to do."""
    if recipe.quantization:
        yield "a quantized model is not put in parts", "remove quantization, or set ddp"
    if adapter.embeddings == "all":
        yield "embeddings in parts do not learn beside an adapter", "set adapter.embeddings: new"
    if adapter.dora or adapter.rewrites:
        what = "dora" if adapter.dora else f"init: {adapter.init}"
        yield f"adapter.{what} reads weights that are whole", "begin without it, or set ddp"


@dataclass(frozen=True)
class Room:
    """What a process has."""

    processes: int
    memory: float
    """Bytes of its device; of a CPU's, its share of the machine's."""
    on_gpu: bool
    bf16: bool


class Choice(NamedTuple):
    sharded: bool
    """Whether each process holds a part of the model, and not all of it."""
    why: str
    """In a line; empty where there was nothing to choose."""


def choose(recipe: Training, room: Room, shape: Shape | None, before: Mapping[str, Any]) -> Choice:
    """Whether each process holds a part of the model. `shape`: of the model, where it is known;
    `before`: the settings of a checkpoint, whose strategy `auto` keeps.
    """
    if recipe.launch.strategy != "auto":
        return Choice(recipe.launch.strategy in ("fsdp", "hsdp"), "")
    problems = [problem for problem, _ in against_parts(recipe, room.processes)]
    if before and (room.processes > 1 or before.get("sharded")):
        return Choice(bool(before.get("sharded")) and not problems, "as its checkpoints are")
    if room.processes < 2 or shape is None:
        return Choice(False, "")
    longest = longest_pass(recipe, room)
    whole, parts = (Held.of(shape, recipe, longest, room.processes, n) for n in (1, room.processes))
    numbers = f"{gib(whole.total)} a process under ddp, {gib(room.memory)} a device"
    if whole.total <= USED * room.memory:
        return Choice(False, numbers)
    if problems:
        return Choice(False, f"{numbers}; fsdp: {problems[0]}")
    numbers += f"; {gib(parts.total)} in parts of {room.processes}"
    if isinstance(recipe, RLRecipe):  # of whose several models nobody has measured the memory
        problem = f"{numbers}, by launch.strategy: fsdp, which auto is not in {recipe.stage}"
        return Choice(False, problem)
    return Choice(True, numbers)


def longest_pass(recipe: Training, room: Room) -> Pass:
    """The least batch that a process may pass at once, where the recipe leaves that to memory."""
    launch = recipe.launch
    size, kind = launch.micro_batch_size, launch.checkpointing
    if size == "auto" and room.on_gpu:
        rows = micro_batch_sizes(recipe, room.processes)[0]
    else:
        rows = micro_batch_size(recipe, room.processes, room.on_gpu)
    if kind == "auto":
        kind = "full" if room.on_gpu else "none"
    sequences = 2 * rows if recipe.stage in ("dpo", "reward") else rows  # a row is a pair
    return Pass(sequences * recipe.longest, room.bf16, kind)


def gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
