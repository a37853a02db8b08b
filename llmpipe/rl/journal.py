"""The files of lines that a training writes, and what a person sees of it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from llmpipe.errors import Say
from llmpipe.files.json import json_lines
from llmpipe.files.writing import cut_back, fsync, to_write
from llmpipe.models.device import memory_gb
from llmpipe.parallel.world import World
from llmpipe.rl.method import Answer
from llmpipe.rl.watch import Metrics
from llmpipe.run.artifact import Artifact
from llmpipe.run.progress import Progress

SHOWN = 4  # answers of an update that rollouts.jsonl shows, or a group


class Journal:
    """metrics.jsonl, rollouts.jsonl, the trackers and the screen. Only the first process writes."""

    def __init__(self, artifact: Artifact, world: World, say: Say):
        self.metrics = artifact.path / "metrics.jsonl"
        self.rollouts = artifact.path / "rollouts.jsonl"
        self.world = world
        self.writes = world.is_first
        self.trackers = world.accelerator.trackers
        self.begun = time.monotonic()
        self.progress = Progress(say) if self.writes else None

    @property
    def seconds(self) -> float:
        """That the training took so far, before it was resumed as well."""
        return time.monotonic() - self.begun

    def note(self, text: str) -> None:
        """Overwrite the note on a terminal."""
        if self.progress:
            self.progress.note(text)

    def at(self, step: int, metrics: Metrics) -> None:
        """Show on a terminal that an update is done."""
        if self.progress:
            said = [f"score {metrics['objective/scores']:.3f}"]
            if "objective/kl" in metrics:
                said.append(f"KL {metrics['objective/kl']:.2f}")
            speed = f"{metrics['tokens_per_second']:,.0f} tok/s"
            self.progress.at(step, [*said, speed, f"{memory_gb():.1f} GB"])

    def begin(self, step: int, steps: int) -> None:
        if self.progress:
            self.progress.begin(step, steps)

    def close(self) -> None:
        if self.progress:
            self.progress.close()

    def write(self, step: int, metrics: Metrics) -> None:
        """One line in metrics.jsonl, for every tracker and on the screen."""
        if not self.progress:
            return
        line = {"step": step, **metrics, "memory_gb": round(memory_gb(), 3)}
        line["seconds"] = round(self.seconds, 3)
        with to_write(self.metrics, "a") as file:
            file.write(json.dumps(line) + "\n")
        for tracker in self.trackers:
            # wandb drops what comes for a step that it has
            tracked_step = None if tracker.name == "wandb" else step
            tracker.log(metrics | {"train/global_step": step}, step=tracked_step)
        self.progress.show(line)

    def show(self, step: int, answers: Sequence[Answer], group: int) -> None:
        """Some answers of an update, or the first group of so many, in rollouts.jsonl."""
        if not self.writes:
            return
        with to_write(self.rollouts, "a") as file:
            for answer in answers[: max(SHOWN, group)]:
                line = {
                    "step": step,
                    "prompt": answer.row["prompt"],
                    "answer": answer.response,
                    "score": answer.score,
                    "ended": answer.episode.ended,
                    "tokens": len(answer.episode.response),
                }
                if answer.episode.inserted:
                    line["turns"] = answer.episode.turns
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl, which rank 0 has. Collective."""
        return self.world.told(lambda: json_lines(self.metrics))

    def sizes(self) -> dict[str, int]:
        """Of both files, by name, once they are on the disk."""
        for path in (self.metrics, self.rollouts):
            to_write(path, "ab").close()
            fsync(path)
        return {path.name: path.stat().st_size for path in (self.metrics, self.rollouts)}

    def cut_back(self, sizes: Sequence[int]) -> None:
        """Leave of both files what there was when they had these sizes."""
        if not self.writes:
            return
        for path, size in zip((self.metrics, self.rollouts), sizes, strict=True):
            cut_back(path, size)
