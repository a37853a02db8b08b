"""What a person sees while it trains: step, loss, rate, memory, time to go."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any


def duration(seconds: float) -> str:
    """75 -> '1m15s'."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02}m" if hours else f"{m}m{s:02}s" if m else f"{s}s"


class Progress:
    """A line per logging step, kept in the log; on a terminal a note that is overwritten in between."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.live = sys.stderr.isatty()
        self.begun, self.first, self.last = time.monotonic(), 0, 0

    def begin(self, step: int, last: int) -> None:
        self.begun, self.first, self.last = time.monotonic(), step, last

    def note(self, text: str) -> None:
        if self.live:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def show(self, line: dict[str, Any]) -> None:
        """Print one line of metrics."""
        self.close()
        step = line["step"]
        if held_out := next((name for name in ("eval_loss", "eval_score") if name in line), None):
            self.say(
                f"step {step:>6}  held-out {held_out.removeprefix('eval_')} {line[held_out]:.4f}"
            )
            return
        parts = [
            f"step {step:>6}/{self.last}",
            f"loss {line['loss']:.4f}",
            f"lr {line['learning_rate']:.2e}",
        ]
        if "objective/kl" in line:
            parts.insert(1, f"score {line['objective/scores']:.3f}  KL {line['objective/kl']:.2f}")
        parts += [
            f"grad {line['grad_norm']:.2f}",
            f"{line['tokens_per_second']:,.0f} tok/s",
            f"{line['memory_gb']:.1f} GB",
        ]
        parts += [f"{line['share_of_peak']:.0%} of peak"] if "share_of_peak" in line else []
        if step > self.first:
            rate = (time.monotonic() - self.begun) / (step - self.first)
            parts.append(f"ETA {duration(rate * (self.last - step))}")
        self.say("  ".join(parts))

    def close(self) -> None:
        """Take an unfinished note off the terminal."""
        self.note("")
