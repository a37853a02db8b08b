"""Disks that fill up, run out of inodes or turn read-only under a command: 5 with a line, and after
there is room the same command ends bitwise equal.

Each trial is a fork with a tmpfs of its own (tests/disks.py), in which the command runs, or is
started as from a shell.
"""

import contextlib
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import yaml

from llmpipe.errors import UserError
from llmpipe.files.tables import table
from llmpipe.run.artifact import Artifact, artifacts
from tests import disks, life
from tests.evaluation import test_eval
from tests.front.test_processes import ENVIRONMENT, PYTHON
from tests.models import test_adapters
from tests.rl import test_ppo
from tests.training import test_preference

FULL = os.environ.get("FAULTS") == "full"
SEED = 20261126


def merged(run):
    """An adapter, and another one on it, which is merged first; what comes of it is merged too."""
    new = {"rank": 2, "alpha": 4, "continue": False, "merge": True}
    more = {"optim__steps": 6, "evaluation": {}}
    one = test_adapters.write(run, name="one", **more)
    one = one.rename(one.with_name("one.yaml"))  # both are written to one place
    two = test_adapters.write(run, name="two", model="artifact:one", adapter=new, **more)
    return [one, two]


def measured(run):
    data = [{"path": str(life.TINY / "rows.jsonl"), "limit": 24}]
    tasks = [
        {"task": "perplexity", "data": data},
        {"task": "generate", "data": data, "max_new_tokens": 4, "score": ["contains"]},
    ]
    return [test_eval.write(run, tasks, {"base": str(life.TINY / "model")})]


RECIPES = {
    "sft": lambda run: [life.write(run)],
    "merge": merged,
    "eval": measured,
    "dpo": lambda run: [test_preference.write(run, "dpo")],
    "tracked": lambda run: [life.write(run, log__trackers=["tensorboard"])],
    "ppo": lambda run: [test_ppo.write(run, **test_ppo.LONGER)],
    "ranks": lambda run: [life.write(run, launch__processes=2)],
}


def essence(run: Path) -> dict:
    """What must be equal of every artifact of a run."""
    return {artifact.name: of(artifact) for artifact in artifacts(run)}


def of(artifact: Artifact) -> dict:
    assert artifact.finished, artifact
    if (artifact.path / "metrics.jsonl").exists():
        return json.loads(json.dumps(life.essence(artifact)))
    results = {
        name: entry.sha256
        for name, entry in table(artifact.path).items()
        if name in ("samples.jsonl", "results.json")
    }
    return results | {name: entry.sha256 for name, entry in table(artifact.model).items()}


def here(path: Path) -> tuple[int, str]:
    """The command in this process: its code and what it says in the end."""
    try:
        life.command(path)
    except UserError as error:
        return error.code, str(error)
    return 0, ""


def really(path: Path) -> tuple[int, str]:
    """The command itself."""
    command = [*PYTHON, yaml.safe_load(path.read_text())["stage"], str(path)]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=life.ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def all_of(recipes: list[Path], command) -> tuple[int, str]:
    """Every command in order, up to the first that fails."""
    for path in recipes:
        code, text = command(path)
        if code:
            return code, text
    return 0, ""


@contextlib.contextmanager
def limited(size: int):
    """No file may be longer than so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def trial(home: Path, stage: str, how: str, amount: float) -> None:
    """Run the commands of a stage on a disk that fails, mend it, and run them again.

    Writes result.json: the first code, what it said, the second code, and what came of it.
    """
    sys.stdout = sys.stderr = (home / "out").open("w", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    kind, _, real = how.partition(" ")
    sizes = {"size": f"size={int(amount)}", "inodes": f"size=1g,nr_inodes={int(amount)}"}
    disk = disks.disk(home / "disk", sizes.get(kind, "size=64m"))
    faults = {
        "moment": lambda: disks.filled(disk, amount),
        "readonly": lambda: disks.read_only(disk, amount),
        "limit": lambda: limited(int(amount)),
    }
    command = really if real else here
    try:
        recipes = RECIPES[stage](disk / "run")
        begun = time.monotonic()
        with faults.get(kind, contextlib.nullcontext)():
            first = all_of(recipes, command)
        seconds = time.monotonic() - begun
        if kind in sizes:
            disks.remount(disk, "size=1g,nr_inodes=0")
        second = all_of(recipes, command)
        used = disks.used(disk)
        result = [first, second, essence(disk / "run"), seconds, used]
    except BaseException:
        result = [(-1, traceback.format_exc()), (-1, ""), {}, 0, (0, 0)]
    (home / "result.json").write_text(json.dumps(result))
    os._exit(0)


def tried(home: Path, stage: str, how: str, amount: float = 0):
    process = life.forked(trial, home, stage, how, amount)
    process.join(300)
    assert process.exitcode == 0, f"{how} {amount}:\n{(home / 'out').read_text()}"
    return json.loads((home / "result.json").read_text())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """{stage: what comes of it without a fault, its seconds, and what it takes of a disk}."""
    known = {}

    def make(stage, how="nothing"):
        if (stage, how) not in known:
            home = tmp_path_factory.mktemp(stage)
            (code, text), _, made, seconds, used = tried(home, stage, how)
            assert code == 0, text
            known[stage, how] = made, seconds, used
        return known[stage, how]

    return make


def hold(first, second, made, expected) -> None:
    """What every trial has to end with."""
    code, text = first
    assert code in (0, 5), text
    if code:
        assert re.search("cannot be (written|made): ", text) and "a bug" not in text, text
    assert second[0] == 0, second[1]
    assert made == expected


SHARE = {"sft": 1.0, "ppo": 0.5, "merge": 0.5, "eval": 0.5, "dpo": 0.25, "tracked": 0.25}
TRIALS = [
    (stage, how, number)
    for how, count in (("size", 20), ("moment", 20), ("inodes", 8), ("readonly", 8), ("limit", 8))
    for stage, share in SHARE.items()
    for number in range(count if FULL else max(1, round(count * share / 2)))
]


@pytest.mark.faults
@pytest.mark.parametrize(("stage", "how", "number"), TRIALS)
def test_a_disk_that_fails(straight, tmp_path, stage, how, number):
    expected, seconds, (size, inodes) = straight(stage)
    rng = random.Random(f"{SEED} {stage} {how} {number}")
    amount = {
        "size": rng.uniform(0.01, 1.05) * size,
        "inodes": rng.randint(6, inodes),
        "limit": rng.uniform(0.001, 0.3) * size,
    }.get(how, rng.uniform(0.01, 1.0) * seconds)
    first, second, made, *_ = tried(tmp_path, stage, how, amount)
    hold(first, second, made, expected)


REAL = [
    (stage, f"{how} real", number)
    for stage, how, often, count in (
        ("sft", "size", 2, 20),
        ("sft", "moment", 2, 20),
        ("sft", "readonly", 2, 4),
        ("ranks", "size", 1, 4),
        ("ranks", "moment", 1, 4),
    )
    for number in range(count if FULL else often)
]


@pytest.mark.faults
@pytest.mark.parametrize(("stage", "how", "number"), REAL)
def test_the_command_itself_on_a_disk_that_fails(straight, tmp_path, stage, how, number):
    """The parent is told of it though its workers can write nothing down: 5 each time, but where
    the command was done before the moment came."""
    expected, seconds, (size, _) = straight(stage, "nothing real")
    rng = random.Random(f"{SEED} {stage} {how} {number}")
    amount = rng.uniform(0.02, 0.98) * (size if how == "size real" else seconds)
    first, second, made, took, _ = tried(tmp_path, stage, how, amount)
    print(f"{stage} {how} {amount:,.2f}: {first[0]} after {took:.1f} s: {first[1].strip()[-300:]}")
    hold(first, second, made, expected)
    assert first[0] == 5 or how != "size real"


def test_a_disk_of_a_third_of_what_is_needed(straight, tmp_path):
    """One of those in `make faults`, for every change."""
    expected, _, (size, _) = straight("sft")
    first, second, made, *_ = tried(tmp_path, "sft", "size", size / 3)
    hold(first, second, made, expected)
    assert first[0] == 5 and "needed\n" in first[1] and "goes on from " in first[1], first[1]
