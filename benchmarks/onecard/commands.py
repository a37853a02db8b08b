"""Real commands in processes of their own, and what metrics.jsonl says of them."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
LIMIT = 150.0
"""Seconds for one command."""


class Failed(Exception):
    """A command that did not do what was asked; its text is one line."""


@dataclass(frozen=True)
class Seen:
    """Lines of metrics.jsonl of one training."""

    lines: list[dict[str, Any]]
    first_step: float
    """Seconds from the command to the first step's line."""

    def after(self, warm_up: int) -> list[dict[str, Any]]:
        """The lines that count, and before them the last one that does not."""
        return self.lines[warm_up - 1 :]

    def steps_per_second(self, warm_up: int) -> float:
        counted = self.after(warm_up)
        return (len(counted) - 1) / (counted[-1]["seconds"] - counted[0]["seconds"])

    def tokens_per_second(self, warm_up: int) -> float:
        """Over all steps that count together."""
        counted = self.after(warm_up)
        tokens = sum(
            line["tokens_per_second"] * (line["seconds"] - before["seconds"])
            for before, line in pairwise(counted)
        )
        return tokens / (counted[-1]["seconds"] - counted[0]["seconds"])

    def share_of_peak(self, warm_up: int) -> float | None:
        """Of the card's operations per second; None where its peak is not known."""
        last = self.lines[-1]
        if not last.get("share_of_peak"):
            return None
        return last["share_of_peak"] * self.tokens_per_second(warm_up) / last["tokens_per_second"]

    @property
    def gib(self) -> float:
        return self.lines[-1]["memory_gb"]


def environment(*first: Path) -> dict[str, str]:
    """Of every process that is started: one card, no network, this checkout."""
    paths = [*map(str, first), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CUDA_VISIBLE_DEVICES": card,
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }


def write_recipe(recipe: dict[str, Any]) -> Path:
    """As a file beside the run that it names; JSON is YAML."""
    run = Path(recipe["run"])
    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.parent / f"{run.name}-{recipe.get('name', recipe['stage'])}.yaml"
    path.write_text(json.dumps(recipe, indent=1))
    return path


def artifact_of(recipe: dict[str, Any]) -> Path:
    return Path(recipe["run"]) / recipe.get("name", recipe["stage"])


def start(recipe: dict[str, Any], verb: str | None = None) -> subprocess.Popen[bytes]:
    """`llmpipe STAGE RECIPE`, or another verb, in a session of its own; what it prints is kept."""
    path = write_recipe(recipe)
    with path.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "llmpipe", verb or recipe["stage"], str(path)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(),
            cwd=path.parent,
            start_new_session=True,
        )


def tail(recipe: dict[str, Any]) -> str:
    """The end of what a command printed, in one line."""
    return last_line(write_recipe(recipe).with_suffix(".log").read_text(errors="replace"))


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-400:]


def lines_of(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl that a step wrote."""
    path = artifact_of(recipe) / "metrics.jsonl"
    if not path.exists():
        return []
    whole = path.read_text().split("\n")[:-1]
    lines = [json.loads(line) for line in whole]
    return [line for line in lines if "tokens_per_second" in line]


def measured(recipe: dict[str, Any], steps: int) -> Seen:
    """The stage, ended once it has taken so many steps. Raises Failed where it takes none."""
    asked = time.monotonic()
    process = start(recipe)
    first_step = 0.0
    lines: list[dict[str, Any]] = []
    try:
        while len(lines) < steps and time.monotonic() - asked < LIMIT:
            ended = process.poll() is not None
            lines = lines_of(recipe)
            if lines and not first_step:
                first_step = time.monotonic() - asked
            if ended:
                break
            time.sleep(0.05)
    finally:
        end(process)
    if len(lines) < steps:
        how = f"exit code {process.returncode}, {len(lines)} of {steps} steps"
        raise Failed(f"llmpipe {recipe['stage']}: {how}: {tail(recipe)}")
    return Seen(lines, first_step)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a command with its workers, and wait until the card is free of them."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 10
    while alive(process.pid) and time.monotonic() < until:
        time.sleep(0.05)


def alive(group: int) -> bool:
    """Whether a process of this group runs; one that nobody waits for does not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state not in "ZX":
            return True
    return False


def finished(recipe: dict[str, Any], verb: str | None = None) -> int:
    """The exit code of the stage, run to its end."""
    process = start(recipe, verb)
    try:
        return process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        return -int(signal.SIGKILL)
    finally:
        end(process)


def stopped(recipe: dict[str, Any], step: int) -> int:
    """The exit code of the stage, told to stop by SIGTERM once it has done `step` steps."""
    asked = time.monotonic()
    process = start(recipe)
    try:
        while process.poll() is None and time.monotonic() - asked < LIMIT:
            lines = lines_of(recipe)
            if lines and lines[-1]["step"] >= step:
                process.send_signal(signal.SIGTERM)
                return process.wait(30)
            time.sleep(0.02)
        return process.returncode if process.returncode is not None else -int(signal.SIGKILL)
    except subprocess.TimeoutExpired:
        return -int(signal.SIGKILL)
    finally:
        end(process)


def script(name: str, told: dict[str, Any], *first: Path) -> dict[str, Any]:
    """A script of this folder, told on its input; the last line it prints is what it says.

    `first`: folders that it imports from before all others. Raises Failed.
    """
    try:
        done = subprocess.run(
            [sys.executable, str(HERE / name)],
            input=json.dumps(told),
            capture_output=True,
            text=True,
            env=environment(*first),
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{name}: not done in {LIMIT:.0f} s") from None
    if done.returncode:
        raise Failed(f"{name}: exit code {done.returncode}: {last_line(done.stderr)}")
    return json.loads(done.stdout.splitlines()[-1])
