"""Counts how often a training waits for the card: `torch.cuda.set_sync_debug_mode`.

    python benchmarks/onecard/reads.py FOLDER LINES OUT

FOLDER: an artifact that `llmpipe prepare` made ready. Its worker trains in this process, and is
ended after so many lines of metrics.jsonl. OUT gets, as JSON, the reads between two lines, and
where they were made: the innermost line of llmpipe, and that of the library.
"""

import json
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from llmpipe.front import worker
from llmpipe.rl.journal import Journal
from llmpipe.training.metrics_log import MetricsLog

MESSAGE = "called a synchronizing CUDA operation"


class Reads:
    """Host reads between two lines of metrics.jsonl, and their places."""

    def __init__(self, lines: int, out: Path):
        self.lines = lines
        self.out = out
        self.since = 0
        self.counted: list[int] = []
        self.places: Counter[str] = Counter()

    def begin(self) -> None:
        """Count from now on: libraries have set their filters by the first line."""
        warnings.filterwarnings("always", message=MESSAGE)
        warnings.showwarning = self.seen
        torch.cuda.set_sync_debug_mode("warn")

    def seen(self, message: Warning | str, *_: Any, **__: Any) -> None:
        if MESSAGE in str(message):
            self.since += 1
            self.places[place()] += 1

    def line(self) -> None:
        """A line was written; after the last one this process ends."""
        if not self.counted:
            self.begin()
        self.counted.append(self.since)
        self.since = 0
        if len(self.counted) > self.lines:
            told = {"reads": self.counted[1:], "places": dict(self.places.most_common(12))}
            self.out.write_text(json.dumps(told))
            os._exit(0)


def place() -> str:
    """The innermost line of llmpipe's that is being run, and the innermost of all."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_code.co_filename.endswith("warnings.py"):
        frame = frame.f_back
    innermost = f"{'/'.join(Path(frame.f_code.co_filename).parts[-3:])}:{frame.f_lineno}"
    while frame and "/llmpipe/" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return innermost
    return f"{frame.f_code.co_filename.rpartition('/llmpipe/')[2]}:{frame.f_lineno} > {innermost}"


def after(method: Any, reads: Reads) -> Any:
    """`method`, which writes a line, with the count cut behind it."""

    def counted(self: Any, *given: Any, **named: Any) -> None:
        method(self, *given, **named)
        reads.line()

    return counted


def main() -> None:
    folder, lines, out = sys.argv[1:]
    reads = Reads(int(lines), Path(out))
    for log in (MetricsLog, Journal):
        log.write = after(log.write, reads)
    sys.exit(worker.main(["train", folder]))


if __name__ == "__main__":
    main()
