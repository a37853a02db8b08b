"""What a person sees while it trains: step, loss, rate, memory, time to go."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from llmpipe.errors import Say

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
    """A line per logging step, kept in the log.

    On a terminal there is a note in between, which is overwritten.
    """

    def __init__(self, say: Say):
        self.say = say
        self.live = sys.stderr.isatty()
        self.begun = time.monotonic()
        self.first = 0
        self.last = 0

    def begin(self, step: int, last: int) -> None:
        """Start the clock: optimizer steps from `step` to `last` are to come."""
        self.begun = time.monotonic()
        self.first = step
        self.last = last

    def note(self, text: str) -> None:
        if self.live:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def show(self, line: Line) -> None:
        """Print one line of metrics."""
        self.close()
        for name in ("eval_loss", "eval_score"):
            if name in line:
                measured = f"{name.removeprefix('eval_')} {line[name]:.4f}"
                self.say(f"step {line['step']:>6}  held-out {measured}")
                return
        self.say("  ".join(self._parts(line)))

    def close(self) -> None:
        """Take an unfinished note off the terminal."""
        self.note("")

    def _parts(self, line: Line) -> Iterator[str]:
        step = line["step"]
        yield f"step {step:>6}/{self.last}"
        if "objective/kl" in line:
            yield f"score {line['objective/scores']:.3f}  KL {line['objective/kl']:.2f}"
        yield f"loss {line['loss']:.4f}"
        yield f"lr {line['learning_rate']:.2e}"
        yield f"grad {line['grad_norm']:.2f}"
        yield f"{line['tokens_per_second']:,.0f} tok/s"
        yield f"{line['memory_gb']:.1f} GB"
        if "share_of_peak" in line:
            yield f"{line['share_of_peak']:.0%} of peak"
        if step > self.first:
            seconds_per_step = (time.monotonic() - self.begun) / (step - self.first)
            yield f"ETA {duration(seconds_per_step * (self.last - step))}"
