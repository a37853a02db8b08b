"""What a person sees while it trains: step, loss, rate, memory, time to go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from llmpipe import screen
from llmpipe.errors import Say

WIDTH = 79
"""Columns of a line that stays."""

Line = dict[str, Any]
"""A line of metrics.jsonl: of training, or of an evaluation in between."""


def duration(seconds: float) -> str:
    """75 -> '1m15s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


class Progress:
    """A line per logging step, kept in the log; on a terminal one in between, which moves."""

    def __init__(self, say: Say):
        self.say = say
        self.begun = time.monotonic()
        self.first = 0
        self.last = 0
        self._line = ExitStack()
        self._put: Callable[[str], None] | None = None

    def begin(self, step: int, last: int) -> None:
        """Start the clock: optimizer steps from `step` to `last` are to come."""
        self.begun = time.monotonic()
        self.first = step
        self.last = last
        self.note(f"step {step + 1}/{last}")

    def note(self, text: str) -> None:
        """What goes on right now."""
        if self._put is None:
            self._put = self._line.enter_context(screen.doing(text))
        self._put(text)

    def at(self, step: int, parts: list[str]) -> None:
        """A step is done, of which this is known."""
        share = f"{step / max(self.last, 1):4.0%}"
        self.note("  ".join([f"{share}  step {step}/{self.last}", *parts, *self._eta(step)]))

    def show(self, line: Line) -> None:
        """Print one line of metrics."""
        for name in ("eval_loss", "eval_score"):
            if name in line:
                measured = f"{name.removeprefix('eval_')} {line[name]:.4f}"
                self.say(f"step {line['step']}  held-out {measured}")
                return
        self.say(fitting([*self._parts(line), *((text, 0) for text in self._eta(line["step"]))]))

    def close(self) -> None:
        """Take the line that moves off the terminal."""
        self._line.close()
        self._put = None

    def _eta(self, step: int) -> Iterator[str]:
        if step > self.first:
            seconds_per_step = (time.monotonic() - self.begun) / (step - self.first)
            yield f"ETA {duration(seconds_per_step * (self.last - step))}"

    def _parts(self, line: Line) -> Iterator[tuple[str, int]]:
        """What is shown of a line of metrics, and how soon it is left out: 0 is never."""
        yield f"step {line['step']}/{self.last}", 0
        if "objective/scores" in line:
            yield f"score {line['objective/scores']:.3f}", 0
        if "objective/kl" in line:
            yield f"KL {line['objective/kl']:.2f}", 0
        if "groups/mixed" in line:
            yield f"mixed {line['groups/mixed']:.0%}", 0
        yield f"loss {line['loss']:.4f}", 0
        yield f"lr {line['learning_rate']:.2e}", 1
        yield f"grad {line['grad_norm']:.2f}", 2
        yield f"{line['tokens_per_second']:,.0f} tok/s", 0
        if "share_of_peak" in line:
            yield f"{line['share_of_peak']:.0%} of peak", 3
        yield f"{line['memory_gb']:.1f} GB", 4


def fitting(parts: list[tuple[str, int]]) -> str:
    """Parts of a line in 79 columns: what does not fit is left out, the highest numbers first, and
    is in metrics.jsonl.
    """
    for most in sorted({number for _, number in parts}, reverse=True):
        line = "  ".join(text for text, number in parts if number <= most)
        if len(line) <= WIDTH:
            break
    return line
