"""A model under DeepSpeed's ZeRO while it trains: `launch.strategy: zero2` and `zero3`.

Experimental. Every process loads all of a model, and publishes from all of it, as under DDP. In
between an engine of DeepSpeed's is around it, and each process holds a part of the gradients and
moments (stage 2), with stage 3 of the weights, too (Rajbhandari 2020,
https://arxiv.org/abs/1910.02054). Weights, gradients and moments stay fp32; arithmetic in bf16 is
torch's autocast, not DeepSpeed's own.

Trainer makes the engine. What it cannot know is here: the processes, which Accelerate would not
find on a CPU; whether the stage that was asked for is in effect; checkpoints, tensor by tensor in
safetensors, where DeepSpeed's are pickles; and the way back to plain weights.

All of it is collective.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import convert_outputs_to_fp32
from safetensors import safe_open
from torch import Tensor, nn
from torch import distributed as dist
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llmpipe.errors import UserError
from llmpipe.faults import reading

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each number, by PyTorch's names."""
STEP = "step"

LINEAR = nn.functional.linear
"""PyTorch's, in whose place stage 3 puts one of its own, for the whole process and for good."""

SHARED_MEMORY = "deepspeed_shm_comm"
"""What DeepSpeed would have a compiler make, for a minute, wherever it computes on a CPU."""


@dataclass(frozen=True)
class Zero:
    """How a model is trained under ZeRO, as DeepSpeed is told."""

    stage: int
    micro_batch_size: int
    accumulation: int
    clip: float
    """The norm that gradients are clipped to; 0: to none."""

    def config(self) -> dict[str, Any]:
        """DeepSpeed's configuration. The batch of all processes it multiplies itself."""
        return {
            # from 0 numbers on a weight is in parts: in a model of any size it is all of them
            "zero_optimization": {
                "stage": self.stage,
                "stage3_param_persistence_threshold": 0,
            },
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
        }


def begin(device: str) -> None:
    """Let Accelerate know the processes as DeepSpeed's, before arguments of a trainer are made:
    these take its state as they find it. By itself it knows of DeepSpeed on no CPU.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # of one process, which DeepSpeed asks for
    if not dist.is_initialized():  # one process alone is a group, too
        backend = "gloo" if device == "cpu" else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    _import_quietly(device)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=device == "cpu")
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED


def _import_quietly(device: str) -> None:
    """Import DeepSpeed, for this device and without a compiler."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    import deepspeed
    from deepspeed.utils import logger

    if device == "cpu":  # to ask for the table has compilers and cards looked for
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY] = False
    logger.setLevel("WARNING")
    # it calls collectives by names that PyTorch has others for by now
    warnings.filterwarnings("ignore", ".* is deprecated", FutureWarning, r"torch\.distributed")


def hide() -> None:
    """Let transformers forget that it is configured for DeepSpeed: under stage 3 it would put in
    parts whatever is loaded, and let all processes answer where one does. And leave no word of it
    to what this process makes next.
    """
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def computing(model: Any, autocast: torch.autocast) -> None:
    """Let a model compute in this and give fp32, as Accelerate does it under DDP, until `leave`."""
    model.plain_forward = model.forward
    model.forward = convert_outputs_to_fp32(autocast(model.forward))


def refuse_another(engine: Any, asked: int, model: nn.Module) -> None:
    """Raise UserError (2) where what Trainer made is no engine of DeepSpeed's at this stage over
    all processes, with all that learns in it.
    """
    stage = getattr(engine, "zero_optimization_stage", lambda: None)()
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    held = getattr(engine.optimizer, "bit16_groups", None) if stage == 2 else None
    if stage == 2:
        inside = {id(weight) for group in held or () for weight in group}
        missing = sum(id(weight) not in inside for weight in learned)
    else:
        missing = sum(not is_part(weight) for weight in learned)
    shares = getattr(engine, "dp_world_size", 0)
    if stage != asked or missing or shares != dist.get_world_size():
        problem = f"launch.strategy: zero{asked}: DeepSpeed's engine is not in effect"
        told = f"stage {stage}, {shares} processes, {missing} weights beside it"
        raise UserError(f"{problem}: {told}", "set launch.strategy: fsdp, and please report it")


def put_back() -> None:
    """Let layers compute as they did before any engine, a reference's or another's."""
    nn.functional.linear = LINEAR


def leave(model: nn.Module, engine: DeepSpeedEngine) -> None:
    """Give a model all of its weights in every process, as plain ones."""
    engine.destroy()
    if "plain_forward" in vars(model):
        model.forward = vars(model).pop("plain_forward")
    plain: dict[int, nn.Parameter] = {}  # of those that share their weights one
    for module in model.modules():
        weights = dict(module._parameters)
        for name, weight in weights.items():
            if weight is not None and id(weight) not in plain:
                plain[id(weight)] = nn.Parameter(whole(weight), weight.requires_grad)
            weights[name] = None if weight is None else plain[id(weight)]
        module._parameters = weights


def is_part(tensor: Tensor) -> bool:
    """Whether each process holds a part of it, under stage 3."""
    return hasattr(tensor, "ds_id")


def whole(weight: nn.Parameter) -> Tensor:
    """A copy of a weight, of which each process may have a part."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([weight]):
        return weight.detach().clone()


# --- its checkpoints: one file of safetensors for each process, of whole tensors ---


def file_of(model: nn.Module, engine: DeepSpeedEngine) -> tuple[str, dict[str, Tensor]]:
    """The file of this process, by its name, and what it holds of what learns, and of its moments:
    every so many tensors, so that no more of a model is whole in one than its share of it.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    rank, size = dist.get_rank(), dist.get_world_size()
    _link_moments(engine)
    mine: dict[str, Tensor] = {}
    for number, (name, weight) in enumerate(_learned(model)):
        tensors = {f"model.{name}": whole(weight)}
        for key in MOMENTS:
            tensors[f"state.{name}.{key}"] = safe_get_full_optimizer_state(weight, key)
        if number % size == rank:
            mine |= {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    if rank == 0:
        optimizer: Any = engine.optimizer
        mine[STEP] = next(iter(optimizer.optimizer.state.values()))[STEP].cpu()
    return f"shard-{rank + 1:05}-of-{size:05}.safetensors", mine


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load what files hold of what learns, in any number of processes, into plain weights."""
    weights = dict(_learned(model))
    for name, tensor in _tensors(folder, "model."):
        weights.pop(name).data.copy_(tensor)
    assert not weights, sorted(weights)


def load_optimizer(folder: Path, model: nn.Module, engine: DeepSpeedEngine) -> None:
    """Load what files hold of an optimizer: its moments, not its rates."""
    from deepspeed.utils import safe_set_full_optimizer_state

    zero: Any = engine.optimizer
    (_, step), *_ = _tensors(folder, STEP)
    is_fused = zero.optimizer.defaults.get("fused")
    for part in _parts(engine):
        moments = {key: torch.zeros_like(part) for key in MOMENTS}
        counted = step.clone().to(part.device if is_fused else "cpu")
        zero.optimizer.state[part] = {STEP: counted, **moments}
    _link_moments(engine)
    weights = dict(_learned(model))
    for name, tensor in _tensors(folder, "state."):
        name, _, key = name.rpartition(".")
        weight = weights[name]
        safe_set_full_optimizer_state(weight, tensor.to(weight.device), key)


def _learned(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def _parts(engine: DeepSpeedEngine) -> list[Tensor]:
    """What this process's AdamW steps: of each group its part, in one row."""
    zero: Any = engine.optimizer
    if engine.zero_optimization_stage() == 2:
        return list(zero.single_partition_of_fp32_groups)
    return list(zero.fp32_partitioned_groups_flat)


def _link_moments(engine: DeepSpeedEngine) -> None:
    """Let weights know their moments. Of stage 2 the engine does that at the first step of the
    first group, when the others have none yet.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    zero: Any = engine.optimizer
    if engine.zero_optimization_stage() == 2:
        for weights, part in zip(zero.bit16_groups, _parts(engine), strict=True):
            lazy_init_hp_params_optimizer_state(weights, part, zero.optimizer.state)


def _tensors(folder: Path, begin: str) -> Iterator[tuple[str, Tensor]]:
    """Of all files, tensors whose names begin like this, and the rest of their names."""
    for path in sorted(folder.iterdir()):
        with reading(path, "safetensors"), safe_open(path, "pt") as file:
            for name in list(file.keys()):
                if name.startswith(begin):
                    yield name.removeprefix(begin), file.get_tensor(name)
