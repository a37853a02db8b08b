"""Kills at random moments of a whole pipeline, in the real process tree: what is made in the end is
what a run makes that nobody disturbs. FAULTS=full: a hundred of them."""

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from llmpipe.run.artifact import Artifact
from tests import life
from tests.front.test_processes import PYTHON, processes_of, start
from tests.test_faults import FULL, SEED

pytestmark = pytest.mark.faults
KILLS = 10  # of a batch
STAGES = ("sft", "reward", "dpo", "ppo", "eval")
SECONDS = 900  # for a whole pipeline, on a machine that does other things as well
LONGEST = 14.0  # seconds that a command is left alone; a stage takes about as long


def pipeline(run_folder: Path) -> Path:
    """Five stages on the tiny model, each with some checkpoints, as one recipe."""
    rows, pairs = (str(life.TINY / name) for name in ("rows.jsonl", "pairs.jsonl"))
    launch = {"processes": 1, "threads": 1, "micro_batch_size": 4}
    training = {
        "optim": {"learning_rate": 1e-3, "batch_size": 8, "steps": 16, "precision": "fp32"},
        "checkpoint": {"every": 3},
        "log": {"every": 2},
        "launch": launch,
    }

    def stage(name: str, data: str, model: str = "artifact:sft", **fields: object) -> dict:
        section = {"train": [{"path": data}], "eval": {"holdout": 0.1}, "max_length": 64}
        return {"stage": name, "model": model, "data": section, **training, **fields}

    asked = {"prompts": ["What is 2 + 2?"], "max_new_tokens": 4}
    ppo = {
        "reward": [{"model": "artifact:reward"}],
        "rollout": {"max_new_tokens": 8},
        "optim": {**training["optim"], "batch_size": 8, "steps": 8},
        "samples": asked,
    }
    tasks = [
        {"task": "perplexity", "data": [{"path": rows, "limit": 20}]},
        {
            "task": "generate",
            "data": [{"path": rows, "limit": 20}],
            "score": ["contains"],
            "max_new_tokens": 4,
        },
    ]
    stages = [
        stage("sft", rows, str(life.TINY / "model"), samples=asked),
        stage("reward", pairs),
        stage("dpo", pairs, samples=asked),
        stage("ppo", rows, **ppo),
        {
            "stage": "eval",
            "models": {name: f"artifact:{name}" for name in ("sft", "dpo", "ppo")},
            "tasks": tasks,
            "precision": "fp32",
            "launch": {"threads": 1},
        },
    ]
    path = run_folder.with_suffix(".yaml")
    path.write_text(json.dumps({"run": str(run_folder), "stages": stages}))
    return path


def essence(run_folder: Path) -> dict:
    """What must be equal, of every stage; of eval its results, less the seconds."""
    made = {name: life.essence(Artifact(run_folder / name)) for name in STAGES if name != "eval"}
    measured = json.loads((run_folder / "eval" / "results.json").read_text())
    samples = (run_folder / "eval" / "samples.jsonl").read_text()
    return made | {"eval": (_without_seconds(measured), samples)}


def _without_seconds(value: object) -> object:
    if not isinstance(value, dict):
        return value
    return {key: _without_seconds(inner) for key, inner in value.items() if key != "seconds"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What a run makes that nobody disturbs."""
    path = pipeline(tmp_path_factory.mktemp("straight") / "run")
    finish(path)
    return essence(path.with_suffix(""))


@pytest.mark.parametrize("batch", range(10 if FULL else 1))
def test_killed_anywhere_in_a_pipeline(straight, tmp_path, batch):
    """The command itself, one process below it, or all of them at once; then the same command."""
    disturbed, rng = tmp_path / "run", random.Random(f"{SEED} {batch}")
    ends: Counter[str] = Counter()
    while ends.total() < KILLS:
        victim = start([*PYTHON, "run", str(pipeline(disturbed))])
        time.sleep(rng.uniform(0.2, LONGEST))
        how = rng.choice(["command", "one below", "all"])
        if victim.poll() is None:
            ends[how] += kill(victim.pid, processes_of(disturbed), how, rng)
        out, _ = victim.communicate(timeout=SECONDS)  # it goes on where nothing was hit
        deadline = time.monotonic() + 5
        while processes_of(disturbed) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not processes_of(disturbed), (how, out)
        assert victim.returncode in (0, -signal.SIGKILL, 5), out
        if victim.returncode == 0:
            assert essence(disturbed) == straight
            disturbed = tmp_path / f"run-after-{ends.total()}"
    finish(pipeline(disturbed))
    assert essence(disturbed) == straight
    print(ends)


def finish(path: Path) -> None:
    """Run a pipeline to its end, undisturbed."""
    command = start([*PYTHON, "run", str(path)])
    out, _ = command.communicate(timeout=SECONDS)
    assert command.returncode == 0, out


def kill(command: int, tree: list[int], how: str, rng: random.Random) -> bool:
    """SIGKILL to the command, to one process below it, or to all at once; whether any was hit."""
    below = [pid for pid in tree if pid != command]
    victims = {"command": [command], "all": [command, *below]}
    hit = False
    for pid in victims.get(how, rng.sample(below, min(1, len(below)))):
        try:
            os.kill(pid, signal.SIGKILL)
            hit = True
        except ProcessLookupError:
            continue
    return hit
