"""The held-out rows while a model is trained: their loss, the best step so far, when to give up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Trainer

from llmpipe import screen
from llmpipe.models.hardware import Hardware
from llmpipe.models.rng import isolated_rng
from llmpipe.parallel.parts import looking
from llmpipe.parallel.world import World
from llmpipe.recipe.sections import Evaluation

Batch = dict[str, Any]
Sum = tuple[Tensor | float, Tensor | int]
"""Of a value over what it is counted by (tokens, pairs), and how many of these there are."""
Measure = Callable[[Any, Batch], dict[str, Sum]]
"""`measure(trainer, batch)`: {metric: its sum}; by `loss` the best step is chosen."""


MARGIN = 1.02
"""By how much a held-out loss is worse than another, so that it is said."""


class Interrupted(Exception):
    """A signal arrived inside an evaluation."""


class Best(NamedTuple):
    """The lowest held-out loss so far, and the step that had it."""

    loss: float
    step: int


def without_effect(asked: Evaluation, steps: int) -> list[str]:
    """What the recipe asks of held-out rows that a training of so many steps cannot do."""
    every = asked.every
    if not every:
        return []
    how_often = f"evaluation.every is {every:,}, and the training has {steps:,} steps"
    lines = []
    if asked.keep_best and every >= steps:
        lines.append(f"warning: {how_often}: evaluation.keep_best has the last step alone to keep")
    before_the_last = (steps - 1) // every  # the first of them is the best so far
    if asked.patience and asked.patience >= before_the_last:
        lines.append(
            f"warning: {how_often}: evaluation.patience ({asked.patience}) cannot end it early"
        )
    return lines


def overfitting(best: Best | None, before: float, after: float) -> str | None:
    """What to say of a model that is published, and was better on held-out rows before.

    `best` of the evaluations in between and the last one, `before` the first step and `after` the
    last, or that whose weights are kept.
    """
    if best and after > best.loss * MARGIN and best.loss <= before:
        at, loss, remedy = (
            f"at step {best.step:,}",
            best.loss,
            "evaluation.keep_best: true keeps it",
        )
    elif after > before * MARGIN:
        at, loss, remedy = (
            "before the first step",
            before,
            "lower optim.learning_rate, or train less",
        )
    else:
        return None
    worse = f"held-out loss was {loss:.4f} {at} and is {after:.4f} in what is published"
    return f"warning: {worse}: it learns its rows by heart; {remedy}"


class HeldOut:
    """What a training knows of the rows that it does not learn from."""

    def __init__(
        self,
        trainer: Trainer,
        measure: Measure,
        hardware: Hardware,
        world: World,
        stop_asked: Callable[[], bool],
    ):
        self.trainer = trainer
        self.measure = measure
        self.hardware = hardware
        self.world = world
        self.stop_asked = stop_asked
        self.best: Best | None = None
        self.worse = 0
        """Evaluations since the best one."""
        self.pending = False
        """Whether an evaluation is due that a signal put off until the training is resumed."""

    def metrics(self) -> dict[str, float]:
        """{eval_METRIC: its mean}, the same for every batch size and number of processes.

        Each process takes every world-size-th batch; one that has none left takes a batch that does
        not count, since what measures may speak to the other processes. Sums and counts are added
        over processes. The generators of Python, NumPy and torch are left as they were found.
        Raises Interrupted, in all processes, when a signal has asked to stop.
        """
        totals: dict[str, Tensor] = {}
        together = self.world.size * self.trainer.args.per_device_eval_batch_size
        count = len(self.trainer.eval_dataset)
        showing = screen.doing("measuring held-out rows")
        with isolated_rng(), torch.no_grad(), looking(self.trainer.model), showing as say:
            for start in range(0, count, together):
                if self.stop_asked():
                    raise Interrupted
                say(f"measuring held-out rows: {start:,} of {count:,}")
                for name, pair in self._sums(start).items():
                    totals[name] = totals[name] + pair if name in totals else pair
        means = self.world.sum(torch.stack(list(totals.values())).cpu())
        return {
            f"eval_{name}": float(value / count)
            for name, (value, count) in zip(totals, means, strict=True)
            if count  # of one label there may be no row
        }

    def _sums(self, start: int) -> dict[str, Tensor]:
        """float64 [value, count] of every metric on this process's batch of those at `start`."""
        rows = self.trainer.eval_dataset
        size = self.trainer.args.per_device_eval_batch_size
        first = start + self.world.rank * size
        mine = [rows[i] for i in range(first, min(first + size, len(rows)))]
        batch = self.trainer.data_collator(mine or [rows[0]])
        del batch["tokens"]  # which are counted of the training
        sums = self._measured(self._moved(batch))
        return {name: pair * bool(mine) for name, pair in sums.items()}

    def _moved(self, batch: Batch) -> Batch:
        """A batch on the device, which is not waited for: it may be at work on the one before."""
        device = self.trainer.args.device
        if device.type != "cuda":
            prepared: Batch = self.trainer._prepare_inputs(batch)
            return prepared
        return {
            name: value.pin_memory().to(device, non_blocking=True)
            if isinstance(value, Tensor)
            else value
            for name, value in batch.items()
        }

    def _measured(self, batch: Batch) -> dict[str, Tensor]:
        """float64 [value, count] of every metric on a batch."""
        # autocast by hand: before training, Accelerate has not put it around the model yet
        with self.hardware.autocast():
            measured = self.measure(self.trainer, batch)
        return {name: as_sum(value, count) for name, (value, count) in measured.items()}

    def note(self, loss: float, step: int) -> bool:
        """Remember the loss of a step; whether it is the lowest so far."""
        if self.best is None or loss < self.best.loss:
            self.best = Best(loss, step)
            self.worse = 0
            return True
        self.worse += 1
        return False

    def put_back(self, best: tuple[float, int] | None, worse: int) -> None:
        """Go on from what a checkpoint had."""
        self.best = Best(*best) if best else None
        self.worse = worse


def as_sum(value: Tensor | float, count: Tensor | int) -> Tensor:
    """float64 [value, count], where they are computed: nobody waits for them before the end."""
    device = next((x.device for x in (value, count) if isinstance(x, Tensor)), None)
    pair = [torch.as_tensor(x, dtype=torch.float64, device=device) for x in (value, count)]
    return torch.stack(pair)
