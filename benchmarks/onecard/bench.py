"""The bench that parts are measured on: a folder with models and rows, a scale, a peer."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onecard import commands
from onecard.commands import Failed, Seen
from onecard.shapes import Scale
from onecard.table import Row


@dataclass(frozen=True)
class Bench:
    home: Path
    scale: Scale
    peak_flops: float | None
    """Of the card, in bf16; None where it is not known."""
    has_card: bool
    trl112: Path | None
    """The folder that trl 1.12 is imported from, the last one with PPO."""

    @property
    def steps(self) -> int:
        """That llmpipe is watched for."""
        return self.scale.warm_up + self.scale.steps

    def rows(self, name: str = "rows") -> str:
        return str(self.home / f"{name}.jsonl")

    def model(self, name: str) -> str:
        """The folder of a model: of a shape, or of one that ranks, `SHAPE-ranks`."""
        make(self.home, self.scale, name)
        return str(self.home / name)

    def recipe(self, part: str, stage: str, **sections: Any) -> dict[str, Any]:
        """Of a stage whose every step is logged, and that no checkpoint interrupts."""
        run = self.home / "runs" / part
        shutil.rmtree(run, ignore_errors=True)
        always = {"log": {"every": 1}, "checkpoint": {"every": 10**6}}
        return {"stage": stage, "run": str(run), **always, **sections}

    def optim(self, rate: float = 1e-5, **more: Any) -> dict[str, Any]:
        """More steps than are watched."""
        return {
            "learning_rate": rate,
            "batch_size": self.scale.batch,
            "steps": 1_000,
            "precision": self.scale.precision,
            **more,
        }

    def watch(self, recipe: dict[str, Any]) -> Seen:
        return commands.measured(recipe, self.steps)

    def peer(self, kind: str, model: str, rows: str, **more: Any) -> dict[str, Any]:
        """What bare TRL does with the same, in a process of its own; adds its `speed`: what it
        counted per second, and its `steps_per_second`.
        """
        told = {
            "kind": kind,
            "model": model,
            "rows": rows,
            "bf16": self.scale.precision == "bf16",
            "length": self.scale.length,
            "batch": self.scale.batch,
            "micro_batch": self.scale.micro_batch,
            "steps": WARM_UP + self.scale.peer_steps,
            "asked": time.time(),
            **more,
        }
        first = [self.trl112] if kind == "ppo" and self.trl112 else []
        seen = commands.script("peers.py", told, *first)
        ends, counted = seen["ends"], seen["counted"]
        seconds = ends[-1] - ends[WARM_UP - 1]
        done = counted[len(ends) - 1] - counted[WARM_UP - 1]
        speeds = {"speed": done / seconds, "steps_per_second": (len(ends) - WARM_UP) / seconds}
        return seen | speeds


WARM_UP = 2
"""Steps of the peer's that are not counted."""


def beside(row: Row, peer: Callable[[], dict[str, Any]], key: str = "speed") -> Row:
    """The row with the peer's figures; with a note where it failed."""
    try:
        seen = peer()
    except Failed as failure:
        return replace(row, note=f"no peer: {failure}", failed=True)
    details = row.details | {"peer": seen}
    return replace(row, peer=seen[key], peer_gib=seen["gib"], details=details)


def make(home: Path, scale: Scale, *names: str) -> dict[str, Any]:
    """Have rows and these models in `home`; what computes here."""
    missing = {
        name: {
            "config": scale.shapes[name.removesuffix("-ranks")].config(),
            "ranks": name.endswith("-ranks"),
        }
        for name in names
        if not (home / name).exists()
    }
    if names and not missing:
        return {}
    told = {"home": str(home), "rows": scale.rows, "mean_words": scale.mean_words}
    return commands.script("assets.py", told | {"models": missing})
