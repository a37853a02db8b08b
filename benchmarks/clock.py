"""When the steps of a peer's trainer end, for benchmarks that set it beside llmpipe."""

import itertools
import time
from collections.abc import Callable

from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Keeps the time of a training's begin and of each step's end; what is logged goes to
    `note`."""

    def __init__(self, note: Callable[[dict], None]):
        self.times: list[float] = []
        self.note = note

    def on_train_begin(self, *_, **__):
        self.times.append(time.perf_counter())

    def on_step_end(self, *_, **__):
        self.times.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **_):
        self.note(logs or {})

    @property
    def seconds(self) -> list[float]:
        """Of each step."""
        return [after - before for before, after in itertools.pairwise(self.times)]
