"""How a model is spread over processes, and what these tell each other.

Every process holds the whole model (one process alone, or several under DistributedDataParallel,
which Accelerate puts around it), or a part of each weight, of its gradient and its moments: FSDP2,
which transformers puts on a model while it loads it (`Spread`). Nothing else in llmpipe calls
`torch.distributed` or knows of DTensors, but `zero`, for what DeepSpeed does while a model trains.

With `launch.offload` the parts lie in the host's memory; `backend`, `Spread` and `unpin` are all
that knows of it, and `device_of` says where such a model computes.

A weight in parts is whole while its layer computes, and the last one stays whole until the backward
pass. Where none comes, this is the trap of the room: who asks for the parameters then is given
plain tensors, and an optimizer of these trains what nobody reads. So what only looks at a model
does it in `looking`, and `refuse_whole` stands before the optimizer.

What speaks to the other processes is collective: every process has to call it, in one order. All of
`World` is that, and of a model in parts every pass, `whole_tensors`, `save` and the loads.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import PrefixStore
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
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.futures import Future
from torch.nn.utils import clip_grad_norm_, get_total_norm
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from llmpipe.errors import UserError
from llmpipe.files import FileEntry
from llmpipe.mirror import copy_of, mirrors
from llmpipe.parallel import zero
from llmpipe.peers import meet
from llmpipe.run.machine import on_several_machines, rank, world_size
from llmpipe.run.signals import Signals

T = TypeVar("T")

TOGETHER = 1 << 26  # numbers that are sent at once: a quarter of a GB in fp32

STEP = timedelta(minutes=30)
"""What a collective of a step may take: then one has come that others did not come to."""
ALONE = timedelta(days=7)
"""What one process may do alone, where others wait for it: hashing, publishing, rewards."""


def join(device: str, *, offload: bool = False) -> None:
    """Make one group of the processes of this launch, where there are several. Collective.

    Libraries take a group that is there. Made by themselves it would have, on CPUs, a timeout that
    cannot be set. `offload`: whether processes on GPUs speak of what lies in the host's memory.
    """
    if world_size() == 1 or dist.is_initialized():
        return
    peers = meet()
    first = os.environ["MASTER_ADDR"]
    # here all wait for one another: some may still have verified what others had not to
    addresses = peers.gather("here", address_toward(first) or "")
    if on_several_machines() and (name := outward((first, *addresses))):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    store = PrefixStore("group", peers.store)
    dist.init_process_group(
        backend(device, offload), store=store, rank=rank(), world_size=world_size(), timeout=STEP
    )
    patient()


def backend(device: str, offload: bool) -> str:
    """What processes on such devices speak by. Norms and moments of an offloaded model are tensors
    of CPUs, which nccl does not carry.
    """
    if device == "cpu":
        return "gloo"
    return "cpu:gloo,cuda:nccl" if offload else "nccl"


@cache
def patient() -> dist.ProcessGroup:
    """All processes, on CPUs and with patience. It sees at once when one of them has died."""
    return dist.new_group(backend="gloo", timeout=ALONE)


def accelerator(device: str, **options: Any) -> Accelerator:
    """What Accelerate knows of the processes, for a stage that no trainer of TRL's makes. As these
    do, it forgets first what a stage before knew in the same process, and that may be ZeRO.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device == "cpu", **options)


def outward(hosts: Iterable[str]) -> str | None:
    """The network interface by which the first of some hosts is reached that is on another machine:
    gloo takes the one that this machine's own name stands for, which is often none that others
    reach. None where that is not known. Debian writes a machine's own name as 127.0.1.1 in its
    hosts, so that the first machine reaches itself by `lo`.
    """
    names = (interface_of(address) for host in hosts if (address := address_toward(host)))
    return next((name for name in names if name not in (None, "lo")), None)


def address_toward(host: str) -> str | None:
    """This machine's address on the way to a host; None where there is no way."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            address: str = probe.getsockname()[0]
            return address
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """The network interface that has an address; all of 127.0.0.0/8 is that of this machine."""
    if address.startswith("127."):
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            asked = struct.pack("256s", name.encode())
            with suppress(OSError):  # one without an address
                if fcntl.ioctl(probe, SIOCGIFADDR, asked)[20:24] == socket.inet_aton(address):
                    return name
    return None


SIOCGIFADDR = 0x8915  # netdevice(7): the address of an interface


class World:
    """All processes of a run, as one of them sees them. With one process nothing is sent."""

    def __init__(self, accelerator: Accelerator | PartialState):
        self.accelerator: Any = accelerator
        self.device: torch.device = accelerator.device
        self.rank: int = accelerator.process_index
        self.size: int = accelerator.num_processes

    @classmethod
    def of(cls, device: str) -> World:
        """All processes that were started together, on CPUs or on a GPU each."""
        join(device)
        return cls(accelerator(device))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has come here, however long one of them works alone."""
        if self.size > 1:
            dist.barrier(patient())

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes of a tensor of any shape; on the CPU where there are several
        processes.
        """
        return self._reduced(value, dist.ReduceOp.SUM)

    def greatest(self, value: float) -> float:
        """The greatest of the processes' numbers, the same in all of them."""
        return float(self._reduced(torch.tensor(float(value)), dist.ReduceOp.MAX))

    def all(self, value: bool) -> bool:
        """Whether this is so in every process. No device is asked, nor waited for."""
        if self.size == 1:
            return value
        shared = torch.tensor(int(value))
        dist.all_reduce(shared, dist.ReduceOp.MIN, patient())
        return bool(shared)

    def totals(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """The sum over processes of every number, added in float64. All processes have the same
        names in one order.
        """
        values = torch.tensor([float(value) for value in sums.values()], dtype=torch.float64)
        return dict(zip(sums, self.sum(values).tolist(), strict=True))

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Add tensors up over processes, in place and where they are: together, up to `TOGETHER`
        numbers of one type.
        """
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add the gradients up in place, those that are missing as zeros. DDP averages them itself;
        this is for a loop without it. Those in parts were added up on the way, see `add_gradients`.
        """
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if not is_part(parameter):
                gradients.append(parameter.grad)
        self.add_up(gradients)

    def evened(self, passes: Sequence[T]) -> list[T | None]:
        """Passes of this process, and None behind them until every process has as many."""
        missing = int(self.greatest(len(passes))) - len(passes)
        return [*passes, *[None] * missing]

    def gather(self, value: T) -> list[T]:
        """Every process's object, which is pickled on the way, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, patient())
        return values

    def told(self, value: Callable[[], T]) -> T:
        """What rank 0 finds, which alone looks for it. Collective, also of what it raises."""
        values: list[T] = []
        with self.as_one():
            if self.is_first:
                values.append(value())
        return next(iter(self.gather(values)[0]))

    def agree(self, error: UserError | None) -> None:
        """Raise in all processes what one of them has met, the first by rank: none may wait for
        another.
        """
        told = (error.message, error.hint, error.code) if error else None
        first = next((each for each in self.gather(told) if each), None)
        if first:
            raise UserError(*first)

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Around what each process does alone: raise in all of them what the first by rank of them
        has met, a user's mistake.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as met:
            error = met
        self.agree(error)

    @property
    def is_mirrored(self) -> bool:
        """Whether a machine does not see what rank 0 writes."""
        return self.size > 1 and mirrors() is not None

    def place(self, path: Path | None) -> Path:
        """Where rank 0's path, which it alone has to know, is for this process. Collective."""
        known = mirrors() if self.size > 1 else None
        told = str(known.way(path) if known and path else path)
        told = self.gather(told)[0]
        return known.run / told if known else Path(told)

    def bring(self, path: Path | None) -> Path:
        """Let every process see what lies in rank 0's folder at a path, if anything: where it is
        for this one. Collective. Raises UserError in all, where a machine cannot have it.
        """
        place = self.place(path)
        if self.is_mirrored and (known := mirrors()):
            with self.as_one():
                known.bring(lambda: [copy_of(place, known.run)])
        return place

    def staged(self, path: Path | None) -> Path:
        """A folder that rank 0 has made: where this process writes its part of it. Collective."""
        place = self.place(path)
        if self.is_mirrored and (known := mirrors()):
            with self.as_one():
                known.clear(place)
        return place

    def collect(self, folder: Path, hashed: Mapping[str, FileEntry]) -> None:
        """Let rank 0 see what all processes have written into a folder that `staged` gave.
        `hashed`: what the writers have hashed. Collective; raises as `bring` does.
        """
        if self.is_mirrored and (known := mirrors()):
            with self.as_one():
                known.collect(folder, hashed)

    def keep(self, folder: Path, target: Path) -> None:
        """Let machines that do not see what rank 0 has published as `target` keep their part of it,
        which they need not be sent again. Collective.
        """
        if self.is_mirrored and (known := mirrors()):
            self.wait()
            with self.as_one():
                known.keep(folder, target)

    def stop_code(self, signals: Signals) -> int:
        """The exit code of a signal that any process was sent, 0 for none; the same in all
        processes.
        """
        return int(self.greatest(signals.code or 0))

    def _reduced(self, value: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return value
        shared = value.to(self.device, copy=True)
        dist.all_reduce(shared, op=operation)
        return shared.cpu()


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type that have at most `TOGETHER` numbers together, or are one alone."""
    bucket: list[Tensor] = []
    numbers = 0
    for tensor in tensors:
        full = numbers + tensor.numel() > TOGETHER
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, numbers = [], 0
        bucket.append(tensor)
        numbers += tensor.numel()
    if bucket:
        yield bucket


# --- a model in parts ---


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
    try:
        yield
    finally:
        reshard(model)


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


def clipped_norm(weights: Sequence[nn.Parameter], most: float) -> Tensor:
    """Clip the gradients of weights, in parts or not, to a norm of `most` together; their norm
    before it. Collective; no process reads the device.
    """
    parts = [weight for weight in weights if is_part(weight)]
    if not parts:
        return clip_grad_norm_(weights, most)
    rest = [weight for weight in weights if not is_part(weight)]
    norms = [get_total_norm([w.grad for w in some if w.grad is not None]) for some in (parts, rest)]
    norm = torch.stack([whole(each).to(weights[0].device) for each in norms]).norm()
    factor = (most / (norm + 1e-6)).clamp(max=1.0)  # as PyTorch has it
    for weight in weights:
        if weight.grad is not None:
            part_of(weight.grad).mul_(factor)
    return norm


def is_part(tensor: Tensor) -> bool:
    """Whether each process holds a part of it."""
    return isinstance(tensor, DTensor)


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


def whole(tensor: T) -> T:
    """A tensor of which each process has a part, as one; anything else as it is. Collective."""
    if zero.is_part(tensor):
        return zero.whole(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of one that is not in parts."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, parts: Tensor) -> Tensor:
    """What this process would hold of a whole tensor, were it in parts as another one is."""
    if not isinstance(parts, DTensor):
        return tensor
    tensor = tensor.to(parts.device)
    mesh, placements = parts.device_mesh, parts.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()


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


# --- its checkpoints: one file of safetensors for each process ---

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
