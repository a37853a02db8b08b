"""metrics.jsonl and what a person sees of it: a line per logging step, with speed and memory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmpipe import screen
from llmpipe.errors import Say
from llmpipe.files.json import json_lines
from llmpipe.files.writing import cut_back, fsync, to_write
from llmpipe.models.device import memory_gb
from llmpipe.models.flops import flops_per_token, peak_flops
from llmpipe.parallel.world import World
from llmpipe.run.progress import Progress
from llmpipe.upstream.layers import compilations


class MetricsLog:
    """The metrics of one training, of which the first process keeps the file and the screen."""

    def __init__(self, path: Path, world: World, say: Say):
        self.path = path
        self.world = world
        self.progress = Progress(say) if world.is_first else None
        self.tokens = 0
        """Trained on by this process so far."""
        self._begun = time.monotonic()
        self._logged_at = self._begun
        self._logged_tokens = 0  # of all processes
        self._shown_speed = 0.0  # tokens a second, on a terminal
        self._peak_flops = 0.0  # of all processes together; 0 where it is not known
        self._flops_per_token = 0.0

    @property
    def seconds(self) -> float:
        """Since the training began, without the time between a stop and a resume."""
        return time.monotonic() - self._begun

    @property
    def is_live(self) -> bool:
        """Whether there is a terminal to show steps on."""
        return self.progress is not None and screen.is_shown()

    def cut(self, size: int) -> None:
        """Begin, or go on from a checkpoint at which the file had `size` bytes."""
        if self.world.is_first:
            cut_back(self.path, size)

    def size(self) -> int:
        """Bytes of the file, which are on the disk when this returns."""
        if not self.path.exists():
            return 0
        if self.world.is_first:
            fsync(self.path)
        return self.path.stat().st_size

    def begin(self, step: int, last: int, model: PreTrainedModel, context: int) -> None:
        """Steps from `step` to `last` of a model follow, on sequences of `context` tokens."""
        if self.progress:
            self.progress.begin(step, last)
        self._peak_flops = self.world.size * (peak_flops() or 0.0)
        if self._peak_flops:
            self._flops_per_token = flops_per_token(model, context)

    def go_on(self, tokens: int, seconds: float) -> None:
        """Count on from what a checkpoint had: tokens of this process. Collective."""
        self.tokens = tokens
        self._begun -= seconds
        self._logged_at = time.monotonic()
        self._logged_tokens = self.total()

    def count(self, tokens: int) -> None:
        """Count the tokens of a batch."""
        self.tokens += tokens

    def total(self) -> int:
        """Tokens trained on by all processes so far. Collective."""
        return int(self.world.totals({"tokens": self.tokens})["tokens"])

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line in the file and one on the screen. Collective."""
        speed = self._speed(self.total()) if "loss" in metrics else {}
        if not self.world.is_first:
            return
        line: dict[str, Any] = {"step": step, **metrics, **speed}
        if graphs := compilations():  # which should stop growing after the first steps
            line["compilations"] = graphs
        line["memory_gb"] = round(memory_gb(), 3)
        line["seconds"] = round(self.seconds, 3)
        with to_write(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.progress:
            self.progress.show(line)

    def _speed(self, total: int) -> dict[str, float]:
        """Of all processes, which have trained on `total` tokens, since the last line of the
        training's.
        """
        now = time.monotonic()
        rate = (total - self._logged_tokens) / max(now - self._logged_at, 1e-9)
        self._logged_at = now
        self._logged_tokens = total
        speed = {"tokens_per_second": round(rate, 1)}
        if self._peak_flops:
            share = speed["tokens_per_second"] * self._flops_per_token / self._peak_flops
            speed["share_of_peak"] = round(share, 4)
        return speed

    def at(self, step: int, loss: float, rate: float) -> None:
        """Show on a terminal that a step is done."""
        if self.progress:
            seconds = max(time.monotonic() - self._logged_at, 1e-9)
            tokens = self.world.size * self.tokens - self._logged_tokens  # about: others have more
            if tokens > 0:  # since the last line of the log
                self._shown_speed = tokens / seconds
            speed, memory = f"{self._shown_speed:,.0f} tok/s", f"{memory_gb():.1f} GB"
            self.progress.at(step, [f"loss {loss:.4f}", f"lr {rate:.1e}", speed, memory])

    def note(self, text: str) -> None:
        """Show on a terminal what goes on between two lines."""
        if self.progress:
            self.progress.note(text)

    def close(self) -> None:
        if self.progress:
            self.progress.close()

    def lines(self) -> list[dict[str, Any]]:
        """Every line of the file, which rank 0 has. Collective."""
        return self.world.told(lambda: json_lines(self.path))

    def final(self, published_step: int) -> dict[str, Any]:
        """The last metrics as the manifest has them: the held-out ones are those of the weights
        that are published, beside the loss before the first step. Collective.
        """
        lines = self.lines()
        losses = [line["loss"] for line in lines if "loss" in line]
        held_out = [line for line in lines if "eval_loss" in line]
        final: dict[str, Any] = {"loss": losses[-1] if losses else None}
        if held_out:
            of_published = [line for line in held_out if line["step"] == published_step]
            after = (of_published or held_out)[-1]
            final["eval_loss_before"] = held_out[0]["eval_loss"]
            final |= {name: value for name, value in after.items() if name.startswith("eval_")}
        return final
