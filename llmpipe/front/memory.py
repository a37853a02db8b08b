"""`llmpipe plan`: what each process of a training would hold, by the shape of its model. Nothing is
loaded, and no device asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from llmpipe.errors import UserError
from llmpipe.files.json import parse_json, read_text
from llmpipe.files.paths import expanded
from llmpipe.recipe.ppo import PPORecipe
from llmpipe.recipe.reinforcement import RLRecipe
from llmpipe.recipe.sections import Recipe, Training, is_local
from llmpipe.run.folders import CONFIG
from llmpipe.run.footprint import USED, Held, Pass, Shape, of_llama
from llmpipe.run.strategy import Room, against_offload, against_parts, against_zero, longest_pass

OF_HOST = ("host", "checkpoint")
"""What of `Held` is no device's."""

USUAL = 8
"""Processes, where neither a recipe nor a command says how many."""


def training_of(recipe: Recipe) -> Training:
    """A recipe that trains. Raises UserError (2) for another one."""
    if not isinstance(recipe, Training):
        raise UserError(f"{recipe.stage}: plan knows stages that train", "give another")
    return recipe


def shape_of(recipe: Training, config: Path | None) -> Shape:
    """Of what a recipe trains: of the model in a folder of this machine, or by a `config`.json.
    Raises UserError (2) where neither says it.
    """
    if config is None:
        return _of_model(recipe.references().get("model"))
    try:
        values = parse_json(read_text(config), twice=False)
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        shape = Shape.of(values, of_llama(values))
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{config}: no shape of a model: {error}"
        raise UserError(problem, "give a folder with the weights as `model:`") from None
    assert shape is not None  # it has layers
    return shape


def _of_model(reference: str | None) -> Shape:
    folder = expanded(reference) if reference and is_local(reference) else None
    shape = Shape.of_folder(folder) if folder and (folder / CONFIG).is_file() else None
    if shape is None:
        problem = f"model: {reference or 'random weights'}: its shape is not on this machine"
        raise UserError(problem, "give its config.json with --config")
    return shape


def plan(
    recipe: Training, shape: Shape, processes: int | None, machines: int, memory: float
) -> Iterator[str]:
    """Lines that say what a process holds, whole and in parts; `memory`: of a device, in bytes.
    `processes`: over all machines; None: the recipe's, or `USUAL`.
    """
    asked = recipe.launch.processes
    processes = processes or (asked if isinstance(asked, int) else USUAL)
    if processes % machines:
        problem = f"{processes} processes are not as many on each of {machines} machines"
        raise UserError(problem, f"give --processes a multiple of {machines}")
    parted = _as_strategy(recipe, "fsdp")
    bf16 = recipe.optim.precision != "fp32"
    longest = longest_pass(parted, Room(processes, memory, on_gpu=True, bf16=bf16))
    ways = {"ddp": Held.of(shape, parted, longest, processes)}
    refusals = dict(_refusals(recipe, parted, processes))
    if recipe.launch.zero and recipe.launch.strategy not in refusals:
        ways[recipe.launch.strategy] = Held.under_zero(shape, recipe, longest, processes)
    if "fsdp" not in refusals and processes > 1:
        ways["fsdp"] = Held.of(shape, parted, longest, processes, processes)
    if "fsdp" not in refusals and machines > 1 and not isinstance(recipe, RLRecipe):
        ways["hsdp"] = Held.of(shape, parted, longest, processes, processes // machines)
    yield f"{recipe.stage}: {shape.weights / 1e9:,.2f} B weights; {_batch(longest)}"
    yield from _table(ways, processes, memory)
    if isinstance(recipe, RLRecipe):
        critic = "critic and " if isinstance(recipe, PPORecipe) else ""
        yield f"{critic}reward models are counted as large as the policy"
    for name, problem in refusals.items():
        yield f"{name} is refused: {problem}"


def _as_strategy(recipe: Training, strategy: str) -> Training:
    launch = recipe.launch.model_copy(update={"strategy": strategy})
    return recipe.model_copy(update={"launch": launch})


def _table(ways: dict[str, Held], processes: int, memory: float) -> Iterator[str]:
    """A column for each way to hold a model, and which of them do not fit."""
    yield _row(f"GiB of each of {processes} processes", ways)
    held = ways.values()
    for name in asdict(ways["ddp"]):
        if name in OF_HOST:
            continue
        yield _row(name, _in_gib(getattr(each, name) for each in held))
    yield _row("in all", _in_gib(each.total for each in held))
    room = f"headroom, {USED:.0%} of {memory / 2**30:g}"
    yield _row(room, _in_gib(USED * memory - each.total for each in held))
    if any(each.host for each in held):
        yield _row("in the host's memory", _in_gib(each.host for each in held))
    if any(each.checkpoint for each in held):
        yield _row("host's memory, a checkpoint", _in_gib(each.checkpoint for each in held))
    for name, each in ways.items():
        if each.total > USED * memory:
            yield f"{name} does not fit"


def _refusals(recipe: Training, parted: Training, processes: int) -> Iterator[tuple[str, str]]:
    """Of what is not possible the name and why; `parted`: the recipe as if it asked for fsdp."""
    for problem in islice(_against(parted, processes), 1):
        yield "fsdp", problem
    for problem, _ in islice(against_zero(recipe, processes), 1 if recipe.launch.zero else 0):
        yield recipe.launch.strategy, problem


def _against(recipe: Training, processes: int) -> Iterator[str]:
    """Why a model is not put in parts, or not as the recipe asks."""
    for problem, _ in against_parts(recipe, processes):
        yield problem
    if recipe.launch.offload:
        for problem, _ in against_offload(recipe, processes):
            yield f"launch.offload: {problem}"


def _row(name: str, cells: Iterable[str]) -> str:
    return name.ljust(28) + "".join(cell.rjust(9) for cell in cells)


def _in_gib(sizes: Iterable[float]) -> list[str]:
    return [f"{size / 2**30:,.1f}" for size in sizes]


def _batch(longest: Pass) -> str:
    """The least batch that a process passes at once, in words."""
    arithmetic = "bf16" if longest.bf16 else "fp32"
    again = f"activation checkpointing {longest.kind}"
    return f"{longest.tokens:,} tokens a pass in {arithmetic}, {again}"
