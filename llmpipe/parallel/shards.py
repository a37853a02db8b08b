"""Checkpoints of a model in parts: one file of safetensors for each process, read by any number of
them. All of it is collective.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from llmpipe.parallel.parts import reshard

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # by names, not by ranks
Write = Callable[[dict[str, Tensor], Path, dict[str, str]], None]
"""Has a file of safetensors hold these tensors, and words beside them, now or later."""


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, write: Write) -> None:
    """Save weights and moments, each process its part."""
    reshard(model)
    moments = _tensors(get_optimizer_state_dict(model, optimizer, options=FLAT))
    save_tensors(folder, _weights(model) | moments, write)


def save_tensors(folder: Path, tensors: dict[str, Tensor], write: Write) -> None:
    """Save tensors by names, of those in parts each process its part."""
    with _failing_as_one():
        writer = _Writer(folder, write)
        dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())


class _Writer(dcp.HuggingFaceStorageWriter):
    """Asks for one file of this process's tensors. The library's own writes them at once, and holds
    all of them a second time.
    """

    def __init__(self, folder: Path, write: Write):
        super().__init__(str(folder), save_distributed=True)
        self.write = write

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors, offsets = {}, {}
        for item in plan.items:
            assert item.tensor_data is not None  # there is nothing else
            tensors[item.index.fqn] = planner.resolve_data(item)
            offsets[item.index.fqn] = {"saved_offsets": item.tensor_data.chunk.offsets}
        if plan.items:
            name = f"shard-{plan.storage_data['shard_index']:05}-model-00001-of-00001.safetensors"
            # what the reader asks for; of several words the order would be chance
            self.write(tensors, Path(self.path, name), {"DCP_SHARDING_INFO": json.dumps(offsets)})
        results: Future[list[WriteResult]] = Future()
        results.set_result([])
        return results


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load what `save` has saved of a model, in any number of processes, into its weights."""
    reshard(model)
    load_tensors(folder, _weights(model))


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what `save` has saved of an optimizer: its moments, not its rates."""
    reshard(model)
    state = get_optimizer_state_dict(model, optimizer, options=FLAT)
    tensors = _tensors(state)
    load_tensors(folder, tensors)
    set_optimizer_state_dict(model, optimizer, {**state, **tensors}, options=FLAT)


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Load what was saved by these names into these very tensors."""
    with _failing_as_one():
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in get_model_state_dict(model).items()}


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


@contextmanager
def _failing_as_one() -> Iterator[None]:
    """Raise what a process has met, in place of the table of all that have met something."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
