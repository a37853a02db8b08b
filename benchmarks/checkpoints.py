"""How long steps stand still for a checkpoint: written at once, and while the next steps run.

    python benchmarks/checkpoints.py                    two processes on CPUs, 71 M weights in parts
    python benchmarks/checkpoints.py --recipe FILE --processes 1      a recipe's training, on a GPU

One training writes its checkpoints the one way and the other in turns, in the same processes and to
the same disk. Of the steps from one checkpoint to the next are printed how long they stood still,
and how long they took with that: where the cores that write compute the steps, too, what a
checkpoint does not take of the one it takes of the other. The first two checkpoints do not count,
and at the last one it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
TINY = ROOT / "recipes" / "tiny"
OUT, COUNT = "LLMPIPE_BENCHMARK_OUT", "LLMPIPE_BENCHMARK_COUNT"
WAYS = ("at once", "beside")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, help="of a training, as JSON")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--checkpoints", type=int, default=9)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--json", type=Path, help="where figures are written to, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        told = measure(arguments, Path(temporary))
    print(f"{told['bytes'] / 1e9:.2f} GB a checkpoint; of {arguments.every} steps, medians")
    for way in WAYS:
        each = [interval for interval in told["intervals"] if interval["way"] == way]
        still, seconds = (median(of[name] for of in each) for name in ("still", "seconds"))
        print(f"{way:8s} {still:6.2f} s stood still, {seconds:6.2f} s in all ({len(each)} times)")
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=1))


def recipe_of(arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Of a training with a checkpoint every so many steps; what a file of one asks for goes on."""
    if arguments.recipe:
        values: dict[str, Any] = json.loads(arguments.recipe.read_text())
    else:
        width = arguments.width
        values = {
            "stage": "pretrain",
            "tokenizer": str(TINY / "model"),
            "architecture": {"layers": arguments.layers, "width": width, "heads": width // 64},
            "data": {"train": [{"path": str(TINY / "rows.jsonl")}], "max_length": 64},
            "optim": {"learning_rate": 1e-4, "batch_tokens": 64 * 2 * arguments.processes},
            "launch": {"strategy": "fsdp", "micro_batch_size": 1, "threads": 1},
        }
        values["data"]["max_rejected"] = 0.2
        values["optim"]["precision"] = "fp32"
    values["run"] = str(home / "run")
    values["optim"]["steps"] = arguments.every * arguments.checkpoints
    values["checkpoint"] = {"every": arguments.every}
    values["log"] = {"every": 1}
    return values


def measure(arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    """What the first process of a training tells."""
    recipe, out = home / "recipe.json", home / "out.json"
    recipe.write_text(json.dumps(recipe_of(arguments, home)))
    stage = json.loads(recipe.read_text())["stage"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(arguments.processes)
    world = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    world |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", OUT: str(out)}
    world[COUNT] = str(arguments.checkpoints)
    world["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    log = home / "log"
    processes = []
    for rank in range(arguments.processes):
        with log.open("ab") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", START, stage, str(recipe)],
                    env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=home,
                )
            )
    codes = [process.wait() for process in processes]
    if any(codes) or not out.exists():
        raise RuntimeError(f"exit codes {codes}: {log.read_text()[-2000:]}")
    told: dict[str, Any] = json.loads(out.read_text())
    return told


START = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import checkpoints
checkpoints.watched()
"""


def watched() -> None:
    """`llmpipe`, as one process of a launcher's, with its checkpoints in turns."""
    from llmpipe.front import cli
    from llmpipe.training.saving import Saving

    turns = Turns(int(os.environ[COUNT]))
    original = Saving.checkpoint

    @contextmanager
    def checkpoint(self: Any, *given: Any, **options: Any) -> Iterator[Path]:
        turns.begin(self)
        with original(self, *given, **options) as folder:
            yield folder

    Saving.checkpoint = checkpoint  # type: ignore[method-assign]
    cli.main()


class Turns:
    """Lets a training write its checkpoints the one way and the other, and looks at the clock."""

    def __init__(self, count: int) -> None:
        self.count = count
        """Of checkpoints. At the last one the process ends: what is published is not measured."""
        self.begun: list[tuple[float, float]] = []
        """Of each checkpoint: the time, and the seconds for which steps had stood still by then."""
        self.bytes = 0

    def begin(self, saving: Any) -> None:
        """At the beginning of a checkpoint, when nothing is left to wait for of the one before."""
        with saving._standing_still():
            saving._finish()
        saving.is_asynchronous = WAYS[len(self.begun) % 2] == "beside"
        self.begun.append((time.perf_counter(), saving.seconds))
        newest = sorted(saving.home.glob("step-*"), key=lambda path: path.stat().st_mtime)[-1:]
        files = (path for folder in newest for path in folder.rglob("*") if path.is_file())
        self.bytes = sum(path.stat().st_size for path in files)
        if len(self.begun) == self.count:
            saving.world.wait()
            if saving.world.is_first:
                Path(os.environ[OUT]).write_text(json.dumps(self.told()))
            os._exit(0)

    def told(self) -> dict[str, Any]:
        pairs = list(zip(self.begun, self.begun[1:], strict=False))
        intervals = [
            {
                "way": WAYS[number % 2],
                "seconds": after[0] - before[0],
                "still": after[1] - before[1],
            }
            for number, (before, after) in enumerate(pairs)
        ]
        return {"bytes": self.bytes, "intervals": intervals[2:]}


if __name__ == "__main__":
    main()
