"""The state of a training between two updates, and how a checkpoint holds it.

Nothing random has a state (`seeds`): what goes on is the weights that learn, the optimizer's
moments, and what was counted. Rank 0 has it all, but of models in parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.faults import reading
from llmpipe.files.json import read_json
from llmpipe.parallel import shards
from llmpipe.recipe.reinforcement import KL
from llmpipe.record import Record
from llmpipe.rl.learner import Learner
from llmpipe.rl.policy_gradient import Coefficient, Moments
from llmpipe.rl.watch import Metrics, Sameness
from llmpipe.run import checkpoints

LEARNED = "learned.safetensors"
OPTIMIZER = "optimizer.safetensors"
VERSION = 3  # of what goes on from a checkpoint: another one would go on otherwise


@dataclass
class State:
    """What an update leaves to the next beside weights and optimizer."""

    coefficient: Coefficient
    step: int = 0
    """Updates that are done."""
    tokens: int = 0
    """Tokens of all responses so far."""
    replaced: int = 0
    """Prompts so far that were asked in the place of others, beyond those of each update."""
    skipped: int = 0
    """Groups so far of which nothing was learned."""
    moments: Moments = field(default_factory=Moments)
    """Of the scores so far, where they are normalized."""
    evaluation_due: bool = False
    """Whether a signal put an evaluation off."""
    first: Metrics = field(default_factory=dict)
    """Metrics of the first update, to warn of drift."""
    warned: list[str] = field(default_factory=list)
    """What was warned of."""
    sameness: Sameness = field(default_factory=Sameness)
    """Of the scores so far."""

    @classmethod
    def begin(cls, kl: KL) -> State:
        return cls(Coefficient(kl.coefficient, kl.target, kl.horizon))


class StateRecord(Record):
    """What a checkpoint's JSON holds of a training."""

    version: int
    moments: Moments
    coefficient: float
    tokens: int
    replaced: int = 0
    skipped: int = 0
    pending: bool
    first: dict[str, float]
    warned: list[str]
    sameness: Sameness
    seconds: float
    """That the training took so far."""
    bytes: list[int]
    """Sizes of the files of lines, see `journal`."""
    optimizer: Any
    """The optimizer's state, with the name of a tensor in `OPTIMIZER` for each tensor."""


def record(state: State, learner: Learner, seconds: float, sizes: list[int]) -> StateRecord:
    """The state as a checkpoint holds it."""
    return StateRecord(
        version=VERSION,
        moments=state.moments,
        coefficient=state.coefficient.value,
        tokens=state.tokens,
        replaced=state.replaced,
        skipped=state.skipped,
        pending=state.evaluation_due,
        first=state.first,
        warned=state.warned,
        sameness=state.sameness,
        seconds=seconds,
        bytes=sizes,
        optimizer=without_tensors(learner.optimizer.state_dict()["state"]),
    )


def save_tensors(learner: Learner, folder: Path, write: shards.Write) -> None:
    """Weights and moments, as two files of `folder`. Collective where they are in parts: each
    process saves its part."""
    learned = {name: weight.detach() for name, weight in learner.weights.items()}
    moments = tensors_of(learner.optimizer.state_dict()["state"])
    if learner.is_sharded:
        parts = folder / checkpoints.SHARDED
        shards.save_tensors(parts, _together(learned, moments), write)
        return
    write(learned, folder / LEARNED, {})
    write(moments, folder / OPTIMIZER, {})


def restore(folder: Path, state: State, learner: Learner) -> StateRecord:
    """Bring `state` and `learner` to where a checkpoint was written; what its JSON holds.

    Raises UserError (3) when another version of llmpipe wrote it, which went on otherwise.
    """
    values = read_json(folder / checkpoints.STATE)
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise UserError(
            f"{folder}: was written by a version of llmpipe with other learning rates, "
            "clipping or random numbers: it cannot be gone on from bit by bit",
            "finish it with that version, or begin anew: --fresh moves what is there aside",
            INTEGRITY,
        )
    kept = StateRecord.from_file(folder / checkpoints.STATE)
    assert kept is not None  # it was read before
    with reading(folder, "a checkpoint"):
        if learner.is_sharded:
            moments = _load_parts(folder, learner, kept.optimizer)
        else:
            learned, moments = load_file(folder / LEARNED), load_file(folder / OPTIMIZER)
            for name, tensor in learned.items():
                learner.weights[name].data.copy_(tensor)
    optimizer = with_tensors(kept.optimizer, moments)
    by_number = {int(number): values for number, values in optimizer.items()}
    learner.optimizer.load_state_dict(learner.optimizer.state_dict() | {"state": by_number})
    state.step = checkpoints.step_of(folder)
    state.tokens = kept.tokens
    state.replaced = kept.replaced
    state.skipped = kept.skipped
    state.coefficient.value = kept.coefficient
    state.moments = kept.moments
    state.evaluation_due = kept.pending
    state.first = kept.first
    state.warned = kept.warned
    state.sameness = kept.sameness
    return kept


def _together(learned: dict[str, Tensor], moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names in `checkpoints.SHARDED`; those of moments begin with a slash."""
    return {f"learned/{name}": tensor for name, tensor in learned.items()} | moments


def _load_parts(folder: Path, learner: Learner, optimizer: Any) -> dict[str, Tensor]:
    """Load this process's part of weights, in place, and of the moments, which are returned."""
    groups = learner.optimizer.param_groups
    weights = [weight for group in groups for weight in group["params"]]
    moments = {
        values["tensor"]: torch.zeros(()) if name == "step" else torch.zeros_like(weights[int(n)])
        for n, state in optimizer.items()
        for name, values in state.items()
    }
    learned = {name: weight.detach() for name, weight in learner.weights.items()}
    shards.load_tensors(folder / checkpoints.SHARDED, _together(learned, moments))
    return moments


def without_tensors(value: Any, path: str = "") -> Any:
    """A nested state as JSON: the path of each tensor stands for it."""
    if isinstance(value, Tensor):
        return {"tensor": path}
    if not isinstance(value, dict):
        return value
    return {str(key): without_tensors(inner, f"{path}/{key}") for key, inner in value.items()}


def tensors_of(value: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors of a nested state by their paths."""
    if isinstance(value, Tensor):
        return {path: value}
    if not isinstance(value, dict):
        return {}
    tensors: dict[str, Tensor] = {}
    for key, inner in value.items():
        tensors |= tensors_of(inner, f"{path}/{key}")
    return tensors


def with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A nested state of what `without_tensors` and `tensors_of` made of it."""
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tensor"}:
        return tensors[value["tensor"]]
    return {key: with_tensors(inner, tensors) for key, inner in value.items()}
