"""How much of a batch fits in a GPU's memory, seen before the first step: the longest rows are
passed forward and backward once, and what comes of it is thrown away.

An estimate says where to begin, and what is measured then, which micro-batch is the largest;
accumulation makes up the rest, so that an optimizer step stays what it is. Where not even the
smallest fits, activations are computed again. The last of these passes has the size that is trained
with, and compiled layers meet that shape first, in a resumed training as well.

A model in parts is passed by all processes together, and one whose memory is short leaves the
others waiting for it, so that the run ends. It begins with the smallest size, and twice of what was
measured is the most that is tried next.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmpipe import upstream
from llmpipe.faults import of_memory
from llmpipe.models.activations import copies, of_a_pass
from llmpipe.models.rng import isolated_rng
from llmpipe.parallel.tensors import part_of
from llmpipe.recipe.optimizers import OPTIMIZERS
from llmpipe.run.machine import micro_batch_sizes
from llmpipe.upstream.layers import compile_anew

if TYPE_CHECKING:
    from llmpipe.training.hosted import Durable

DEVICES = {"cuda"}
"""Whose memory is all that there is: a CPU's grows into swap, and nobody says when it is full."""

USED = 0.9
"""Of a device, at most; what PyTorch cannot use for want of order is a part of the rest. The same
on every day that nobody else is there, so that equal runs are cut alike."""

HOPED = 0.85
"""Of an estimate: a kind that fits by so much of it is tried, since another one takes longer."""

KINDS = ("none", "selective", "full")
"""Of what is computed again, by their time."""


class Gauge:
    """What is known of the memory of a device, in bytes."""

    def room(self) -> float:
        """What a training may take of it."""
        free, total = torch.cuda.mem_get_info()
        return min(USED * total, 0.95 * (free + torch.cuda.memory_reserved()))

    def held(self) -> float:
        return float(torch.cuda.memory_allocated())

    def begin(self) -> None:
        """Let `peak` be the most from now on."""
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        return float(torch.cuda.max_memory_allocated())


GAUGE = Gauge()


@dataclass(frozen=True)
class Taken:
    """What a pass took of the devices of all processes, in bytes."""

    before: float
    """With gradients and moments, which it does not make."""
    peak: float
    """Infinite where memory was short."""
    problem: str = ""
    """What was said then."""

    def forecast(self, size: int, larger: int, copies: float) -> float:
        """The peak of a pass of `larger` micro-batches, by this one of `size`."""
        fixed = self.before + copies
        return fixed + max(self.peak - fixed, 0.0) / size * larger


def fit_memory(trainer: Durable) -> None:
    """Decide how a step is cut, and what is computed again, where the recipe leaves it to us.
    Before the first step. Collective.

    A resumed training keeps the cut that it began with. Raises torch's OutOfMemoryError where
    nothing fits.
    """
    launch = trainer.recipe.launch
    if trainer.hardware.device not in DEVICES:
        return
    if "auto" in (launch.micro_batch_size, launch.checkpointing):
        Fitting(trainer).search()


class Fitting:
    """A search for what fits in the memory of every process."""

    def __init__(self, trainer: Durable):
        self.trainer = trainer
        self.world = trainer.world
        self.sharded = trainer.hardware.spread is not None
        self.room = -self.world.greatest(-GAUGE.room())
        self.sizes = self._sizes()
        self.kinds = self._kinds()

    def search(self) -> None:
        self._begin()
        taken = self._settled()
        self._say(taken)

    # --- what there is to choose from ---

    def _sizes(self) -> list[int]:
        """Of a micro-batch, the smallest first."""
        recipe, resumes = self.trainer.recipe, self.trainer.resumes
        if recipe.launch.micro_batch_size != "auto" or resumes:
            return [self.size]
        return micro_batch_sizes(recipe, self.world.size)

    def _kinds(self) -> list[str]:
        """Of what is computed again, the fastest first."""
        trainer = self.trainer
        now = trainer.hardware.activation_checkpointing
        kept = trainer.resumes and trainer.hardware.compiles  # then it decides bits
        able = trainer.layered.supports_gradient_checkpointing
        if trainer.recipe.launch.checkpointing != "auto" or kept or not able:
            return [now]
        options = trainer.args.activation_checkpointing_kwargs or {}
        reentrant = options.get("use_reentrant", False)
        later = KINDS[KINDS.index(now) :]
        return [kind for kind in later if kind != "selective" or not reentrant]

    @property
    def size(self) -> int:
        return self.trainer.hardware.micro_batch_size

    # --- by the shape of the model ---

    def _begin(self) -> None:
        """Begin with the largest micro-batch that should fit, of the fastest kind that has one."""
        row = self.trainer.library_collator(self.trainer.longest_rows(1))["input_ids"].numel()
        model, hardware = self.trainer.layered, self.trainer.hardware
        fixed = GAUGE.held() + self._beside() + self._copies()
        fixed = self.world.greatest(fixed)

        def needs(size: int, kind: str) -> float:
            return fixed + of_a_pass(model, hardware, kind, size * row)

        least = self.sizes[0]
        likely = (kind for kind in self.kinds if HOPED * needs(least, kind) <= self.room)
        kind = next(likely, self.kinds[-1])
        fitting = (size for size in self.sizes if needs(size, kind) <= self.room)
        size = least if self.sharded else max(fitting, default=least)
        if size != self.size:
            self.trainer.cut(size)
        self._compute_again(kind)

    def _beside(self) -> float:
        """Bytes of what a training holds beside weights and activations: gradients, the buckets
        that they are sent in, and moments.
        """
        gradients = sum(part_of(p).nbytes for p in self._trained())
        return gradients + self._buckets() + self._moments()

    def _trained(self) -> list[Any]:
        """What learns, and lies on the device."""
        if self.trainer.hardware.offload:
            return []
        return [p for p in self.trainer.model.parameters() if p.requires_grad]

    def _buckets(self) -> int:
        """DDP's, in bytes; parts are cut out of what was added up at once."""
        alone = self.world.size == 1 or self.sharded
        return 0 if alone else sum(p.nbytes for p in self._trained())

    def _moments(self) -> float:
        optimizer = OPTIMIZERS[self.trainer.recipe.optim.optimizer]
        return float(optimizer.moments * sum(part_of(p).numel() for p in self._trained()))

    def _copies(self) -> float:
        """Of weights, in a pass; of a model in parts they are measured as if they grew with it."""
        trainer = self.trainer
        return 0.0 if self.sharded else copies(trainer.layered, trainer.hardware)

    def _compute_again(self, kind: str) -> None:
        if kind != self.trainer.hardware.activation_checkpointing:
            self.trainer.say(f"memory: {_WHY[kind]}")
            self.trainer.compute_again(kind)

    # --- by what is measured ---

    def _settled(self) -> Taken:
        """Pass the longest rows until a size fits, and is the largest that does; what it took."""
        fitted = 0
        while True:
            taken = self._try()
            if taken.peak <= self.room:
                larger = self._largest(taken)
                if larger <= self.size:
                    return taken
                fitted = self.size
                self._cut(larger)
            elif fitted:  # what had grown is too large after all
                self.sizes = [size for size in self.sizes if size <= fitted]
                self._cut(fitted)
                fitted = 0
            elif not self._shrink(taken):
                return taken

    def _largest(self, taken: Taken) -> int:
        """The largest size that should fit by what one took."""
        of_weights = self._copies()
        most = 2 * self.size if self.sharded else math.inf
        fitting = [
            size
            for size in self.sizes
            if size <= most and taken.forecast(self.size, size, of_weights) <= self.room
        ]
        return max(fitting, default=0)

    def _shrink(self, taken: Taken) -> bool:
        """Take half of a micro-batch or less, or keep less of it; whether there was anything left
        to take. Raises OutOfMemoryError where there was not, and memory was short.
        """
        self.sizes = [size for size in self.sizes if size < self.size]
        smaller = [size for size in self.sizes if size <= self.size // 2]
        kinds = self.kinds[self.kinds.index(self.trainer.hardware.activation_checkpointing) + 1 :]
        if smaller:
            self.trainer.say(
                f"memory: micro-batches of {self.size} do not fit; trying {smaller[-1]}"
            )
            self._cut(smaller[-1])
        elif kinds:
            self.sizes = self._sizes()
            self._compute_again(kinds[0])
            compile_anew()
        elif math.isinf(taken.peak):
            raise torch.OutOfMemoryError(taken.problem)
        return bool(smaller or kinds)

    def _cut(self, size: int) -> None:
        self.trainer.cut(size)
        compile_anew()

    def _try(self) -> Taken:
        """Pass the longest rows. Nothing is waited for in between: another process may be at its
        end.
        """
        before, peak, problem = 0.0, math.inf, ""
        kept: list[Tensor] = []
        with _without_a_trace(self.trainer):
            try:
                kept += self._stand_ins()
                before = GAUGE.held()
                GAUGE.begin()
                _pass(self.trainer)
                peak = GAUGE.peak()
            except RuntimeError as error:
                if self.sharded or not of_memory(error):
                    raise
                problem = str(error)  # alone: its traceback holds what was computed
            kept.clear()
        GAUGE.begin()
        tries = self.world.gather((before, peak, problem))
        befores, peaks, problems = zip(*tries, strict=True)
        return Taken(max(befores), max(peaks), next(filter(None, problems), ""))

    def _stand_ins(self) -> list[Tensor]:
        """What lies in memory from the second step on: gradients, their buckets, and moments."""
        if self.trainer.hardware.accumulation > 1:
            for parameter in self._trained():
                parameter.grad = torch.zeros_like(parameter)
        sizes = (self._buckets(), int(self._moments()))
        return [torch.empty(n, dtype=torch.uint8, device=self.world.device) for n in sizes]

    def _say(self, taken: Taken) -> None:
        hardware = self.trainer.hardware
        parts = (hardware.micro_batch_size, hardware.accumulation, hardware.processes)
        batch = "batch {} = {} x {} accumulated x {}".format(self.trainer.recipe.batch_size, *parts)
        used = f"{taken.peak / 1e9:,.1f} of {self.room / 1e9:,.1f} GB"
        self.trainer.say(f"memory: {batch}; {used} at most, by a pass over the longest rows")


_WHY = {
    "selective": "too little for all activations; what lies between matrix products and attention "
    "is computed again (activation_checkpointing: selective)",
    "full": "too little for selective checkpointing; all activations are computed again "
    "(activation_checkpointing: full)",
}


def _pass(trainer: Durable) -> None:
    batch = trainer.data_collator(trainer.longest_rows(trainer.hardware.micro_batch_size))
    for counted in ("tokens", "examples"):
        batch.pop(counted, None)
    items = trainer._get_num_items_in_batch([batch], trainer.args.device)
    inputs = trainer._prepare_inputs(batch)
    trainer.model.train()
    with trainer.hardware.autocast():
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=items)
    loss.backward()


@contextmanager
def _without_a_trace(trainer: Durable) -> Iterator[None]:
    """Leave generators, averages, gradients and memory as they were."""
    model: Any = trainer.model
    was_training, averages = model.training, copy.deepcopy(trainer._metrics)
    tokens = trainer._total_train_tokens
    try:
        with isolated_rng(), upstream.alone(trainer.accelerator):
            yield
    finally:
        trainer._metrics = averages
        trainer._total_train_tokens = tokens
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
