"""A model of which each process holds a part: of each weight, of its gradient and its moments.

FSDP2 cuts it, which transformers puts on a model while it loads it (`Spread`).

With `launch.offload` the parts lie in the host's memory; `Spread`, `unpin` and the group's
`backend` are all that knows of it, and `device_of` says where such a model computes.

A weight in parts is whole while its layer computes, and the last one stays whole until the backward
pass. Where none comes, this is the trap of the room: who asks for the parameters then is given
plain tensors, and an optimizer of these trains what nobody reads. So what only looks at a model
does it in `looking`, and `refuse_whole` stands before the optimizer.

Every pass of a model in parts is collective, and so is `whole_tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from llmpipe.errors import UserError
from llmpipe.parallel.tensors import part_of, whole
from llmpipe.parallel.world import World

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Over how many processes a model is loaded, and whether its arithmetic is in bf16: weights are
    then sent and computed with in bf16, and gradients added up in fp32.
    """

    processes: int
    bf16: bool
    copies: int = 1
    """How many there are of the model, each in parts: one on each machine, or one in all."""
    offload: bool = False
    """Whether a part lies in the host's memory, with its gradient and its moments."""

    def at_load(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`, by which each process reads its part and no more."""
        config = DistributedConfig(
            fsdp_size=self.processes // self.copies,
            dp_replicate_size=self.copies,
            fsdp_cpu_offload=self.offload,
            fsdp_mixed_precision=self.bf16,
        )
        return {"distributed_config": config}

    def world(self) -> World:
        """The processes, before a trainer has made its accelerator. Collective."""
        PreTrainedModel.prepare_distribute_model(**self.at_load())  # as they meet at a load
        return World(PartialState(cpu=not torch.cuda.is_available()))


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds a part of each weight; of the frozen ones under an adapter."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def _units(model: nn.Module) -> list[FSDPModule]:
    """The modules whose weights are whole together, the model itself first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _groups(model: nn.Module) -> list[Any]:
    """What FSDP2 knows of the weights of each of them."""
    return [group for unit in _units(model) for group in unit._get_fsdp_state()._fsdp_param_groups]


def unpin(model: nn.Module) -> None:
    """Leave the memory of what is offloaded as it is. FSDP2 would pin it at its first use for a
    device to copy it from there, and PyTorch refuses to where there is none.
    """
    for group in _groups(model):
        for part in group.fsdp_params:
            part.pin_memory = False


def device_of(model: Any) -> torch.device:
    """Where a model computes; of one that is offloaded, its weights lie elsewhere."""
    units = _units(model)
    device: torch.device = units[0]._get_fsdp_state()._device if units else model.device
    return device


def plain_class(module: nn.Module) -> Any:
    """The class of a module as it is where all of it is held."""
    return next(each for each in type(module).__mro__ if not issubclass(each, FSDPModule))


def refuse_uncut(model: nn.Module) -> None:
    """Raise UserError (2) where a model is not in parts layer by layer, so that all of it would be
    whole at once; or where PyTorch would compute with an old copy of what two modules share.
    """
    layers = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not layers or not all(isinstance(each, FSDPModule) for each in (model, *layers)):
        kind = plain_class(model).__name__
        problem = f"launch.strategy: fsdp: transformers does not know the layers of {kind}"
        raise UserError(problem, "set launch.strategy: ddp")
    seen: set[int] = set()
    for name, weight in model.named_parameters(remove_duplicate=False):
        if id(weight) in seen and isinstance(weight, DTensor):
            _refuse_uneven(name, weight)
        seen.add(id(weight))


def _refuse_uneven(name: str, tied: DTensor) -> None:
    """Parts of one length are a view of the weight to both of its modules. Of unequal ones FSDP2
    makes a longer copy, a second time for the second module, and the first one's is never trained.
    """
    rows, processes = tied.shape[0], tied.device_mesh.size(-1)
    if rows % processes:
        raise UserError(
            f"launch.strategy: fsdp: {name} is tied to another weight, and its {rows:,} rows do "
            f"not divide by {processes} processes",
            "set launch.processes to a number that divides them, or launch.strategy: ddp",
        )


def refuse_whole(model: nn.Module) -> None:
    """Raise UserError (2) where a weight that learns is whole: the optimizer would train a copy of
    it.
    """
    learned = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    names = [name for name, weight in learned if not isinstance(weight, DTensor)]
    if names or not learned:
        shown = ", ".join(names[:3]) or "there is no weight"
        problem = f"launch.strategy: fsdp: {len(names)} weights are not in parts: {shown}"
        raise UserError(problem, "set launch.strategy: ddp")


def refuse_gathered(model: nn.Module) -> None:
    """Raise UserError (2) where of a frozen model, under an adapter, something stays whole in each
    process: it fits none.
    """
    groups = _groups(model)
    count = sum(not group.is_sharded for group in groups)
    if count or not groups:
        problem = f"launch.strategy: fsdp: {count or 'all'} of the frozen layers are not in parts"
        raise UserError(problem, "set launch.strategy: ddp")


def reshard(model: nn.Module) -> None:
    """Leave every weight in parts, as it is between two steps."""
    for unit in _units(model):
        unit.reshard()
        # a fused head is read and never runs; what waits for it would skip the next gathering
        unit._get_fsdp_state()._modules_to_run_forward.clear()


@contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Around passes that no backward pass follows; of any model."""
    _free_at_once(model, True)
    try:
        yield
    finally:
        reshard(model)
        _free_at_once(model, False)


def _free_at_once(model: nn.Module, is_so: bool) -> None:
    """On a CPU, free what was gathered for a layer when its weights are made of it. Else FSDP2
    keeps it until the next layer's are, so that a GPU computes beside.
    """
    for unit in _units(model):
        if unit._get_fsdp_state()._device.type == "cpu":
            unit._set_unshard_async_op(is_so)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Have all of a model in each process meanwhile, so that they compute without one another, and
    without gradients, as often as each likes; of any model. Collective at its beginning.
    """
    units = _units(model)
    if units:
        units[0]._get_fsdp_state()._lazy_init()  # the first one is the root, which knows the rest
    kept = [(group, group.post_forward_mesh_info) for group in _groups(model)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        reshard(model)
        for group, place in kept:
            group.post_forward_mesh_info = place


def within(model: nn.Module, work: Callable[[], T]) -> T:
    """What `work` gives, as if it were a forward pass of `model`: it may compute with the body, and
    with the head's weight as a matrix; of any model.
    """
    if not is_sharded(model):
        return work()
    if "within" not in vars(model):
        vars(model)["within"] = _done
        register_fsdp_forward_method(model, "within")
    result: T = model.within(work)
    return result


def _done(work: Callable[[], T]) -> T:
    return work()


def add_gradients(model: nn.Module) -> None:
    """Let the gradients of a model in parts be added up over processes, which FSDP2 would average;
    of any model.
    """
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # no other factor is known to gloo


def hold_whole(model: nn.Module, name: str) -> None:
    """Put a linear layer in the place of one in parts, with all of its weights in each process.
    Collective.
    """
    parts: Any = model.get_submodule(name)
    parts.requires_grad_(False)  # what gathers it knows it still
    rows, columns = parts.weight.shape
    layer = nn.Linear(columns, rows, parts.bias is not None, parts.weight.device)
    layer.to(parts.weight.dtype)
    layer.load_state_dict({name: whole(tensor) for name, tensor in parts.state_dict().items()})
    model.set_submodule(name, layer)


def beside_parts(model: nn.Module) -> dict[str, Tensor]:
    """What of a model's state is whole in every process: of one that is not in parts, all."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not isinstance(tensor, DTensor)}


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a file holds of a model, tensor by tensor, on the CPU; of those that share their weights
    one. Collective: every process iterates to the end.
    """
    saved = model.state_dict().keys()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in saved:
            yield name, whole(tensor.detach()).cpu()


def let_go(model: nn.Module) -> None:
    """Free what this process holds of the weights, whoever still knows the model. Weights that a
    file is mapped to stay, which is so on a CPU, of files in fp32.
    """
    reshard(model)
    for weight in model.parameters():
        storage = part_of(weight).untyped_storage()
        if storage.resizable():
            storage.resize_(0)
