"""What a trainer does otherwise where each process holds a part of the model: it looks at what
learns, and each process saves and loads its part of a checkpoint.

An adapter is whole in every process, beside a model in parts that is frozen and never saved: of it
the library's own checkpoints are right.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from llmpipe.faults import reading
from llmpipe.files.json import write_json
from llmpipe.models.hardware import Hardware
from llmpipe.parallel import shards, zero
from llmpipe.parallel.parts import beside_parts, refuse_gathered, refuse_whole
from llmpipe.parallel.world import World
from llmpipe.recipe import sections
from llmpipe.run import checkpoints
from llmpipe.run.machine import rank
from llmpipe.training.saving import Saving
from llmpipe.training.training import Training
from llmpipe.upstream import writing_by

SCHEDULE = "schedule.json"


class Sharded(Trainer):
    """What `Durable` is of a model in parts. All of it is collective."""

    training: Training[sections.Hosted]
    world: World
    saving: Saving
    optimizer: Any
    lr_scheduler: Any

    @property
    def hardware(self) -> Hardware:
        return self.training.hardware

    @property
    def learns_in_parts(self) -> bool:
        """Whether what learns is in parts, and not an adapter on what is."""
        return self.hardware.sharded and self.training.recipe.adapter is None

    @property
    def saves_parts(self) -> bool:
        """Whether each process saves a part of a checkpoint, of what learns and its moments."""
        return self.learns_in_parts or bool(self.hardware.zero)

    def _prepare_for_training(self, steps: int, loader: Any, checkpoint: str | None) -> Any:
        """Under ZeRO the library makes the engine here, and would then have it read its pickles."""
        if not self.hardware.zero:
            return super()._prepare_for_training(steps, loader, checkpoint)
        model = self.training.model
        if checkpoint is not None:
            self._load_from_checkpoint(checkpoint)  # while it is plain
        if self.hardware.bf16:
            zero.computing(model, self.hardware.autocast())
        prepared = super()._prepare_for_training(steps, loader, None)
        zero.hide()
        zero.refuse_another(self.model_wrapped, self.hardware.zero, model)
        if checkpoint is not None:
            self._load_optimizer_and_scheduler(checkpoint)
        return prepared

    def leave_zero(self) -> None:
        """Let the model be plain again, where it was not; what is left of the engine is gone."""
        if not self.hardware.zero:
            return
        zero.put_back()
        engine = self.accelerator.deepspeed_engine_wrapped
        if engine is None:  # nothing was left to train
            return
        self.optimizer = self.lr_scheduler = self.deepspeed = None
        self.model_wrapped = self.model
        self.accelerator.deepspeed_engine_wrapped = None
        self.accelerator.free_memory()
        zero.leave(self.training.model, engine.engine)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The library's, of weights that are all in parts where they should be."""
        if self.hardware.spread:
            refuse = refuse_whole if self.learns_in_parts else refuse_gathered
            refuse(self.training.model)
        return super().create_optimizer(model)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Let gradients be in parts after each micro-batch: up to the last one the library would
        have those of all weights in every process. What goes between machines alone may wait, on
        the device.
        """
        waits = self.hardware.copies > 1 and not self.hardware.offload
        with super()._defer_fsdp_gradient_reduction() if waits else nullcontext():
            yield

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model in a checkpoint; one in parts is saved together with its optimizer."""
        if not self.saves_parts:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The model, whose tensors are written with the rest; an adapter without its base in parts,
        which PEFT would gather first.
        """
        if self.hardware.spread:
            state_dict = beside_parts(self.training.model)
        with writing_by(self.saving.tensors):
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """What the library saves, in its files; of a model in parts that, too."""
        folder = Path(output_dir)
        if not self.saves_parts:
            if rank() == 0:
                self.saving.pickled(self.optimizer.state_dict(), folder / OPTIMIZER_NAME)
                self.saving.pickled(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
            return
        model, parts = self.training.model, folder / checkpoints.SHARDED
        if self.hardware.zero:
            name, tensors = zero.file_of(model, self.model_wrapped)
            self.saving.tensors(tensors, parts / name)
        else:
            shards.save(parts, model, self._plain_optimizer(), self.saving.tensors)
        if rank() == 0:
            folder.mkdir(exist_ok=True)  # no file is written yet
            write_json(folder / SCHEDULE, self.lr_scheduler.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.saves_parts:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder = Path(resume_from_checkpoint) / checkpoints.SHARDED
        load = zero.load_weights if self.hardware.zero else shards.load_weights
        load(folder, self.training.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.saves_parts or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = self._plain_optimizer()
        model, folder = self.training.model, Path(checkpoint) / checkpoints.SHARDED
        if self.hardware.zero:
            zero.load_optimizer(folder, model, self.model_wrapped)
        else:
            shards.load_optimizer(folder, model, optimizer)
        path = Path(checkpoint) / SCHEDULE
        with reading(path, "the state of a schedule"):
            self.lr_scheduler.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        rates = self.lr_scheduler.get_last_lr()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without Accelerate's wrapper."""
        plain: torch.optim.Optimizer = self.optimizer.optimizer
        return plain
