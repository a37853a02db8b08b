"""The real process tree: exit codes at the shell, signals, orphans, launchers; one rank or two."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmpipe.run.artifact import Artifact
from tests import life, store

PYTHON = [sys.executable, "-m", "llmpipe"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(life.ROOT), "CUDA_VISIBLE_DEVICES": ""}


def start(command, cwd=life.ROOT):
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(command, cwd=life.ROOT):
    worker = start(command, cwd)
    try:
        out, _ = worker.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        worker.kill()
        pytest.fail(f"{command} hangs:\n{worker.communicate()[0]}")
    return worker.returncode, out


def processes_of(folder: Path) -> list[int]:
    """Pids whose command line names `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder) in path.read_bytes().decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def last_step(artifact: Artifact) -> int:
    path = artifact.path / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=-1)


def wait_for_progress(artifact: Artifact, after: int):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if last_step(artifact) > after:
            return
        time.sleep(0.02)
    pytest.fail(f"step {after + 1} was never reached: {(artifact.path / 'log.txt').read_text()}")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return store.made(
        life.write(tmp_path_factory.mktemp("straight") / "run", optim__steps=6, log__every=1)
    )


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    settings = {
        "optim__steps": 40,
        "log__every": 1,
        "evaluation__every": 10,
        "optim__batch_size": 8,
    }
    return store.made(life.write(tmp_path_factory.mktemp("longer") / "run", **settings))


def losses(artifact):
    lines = map(json.loads, (artifact.path / "metrics.jsonl").read_text().splitlines())
    return [line.get("loss", line.get("eval_loss")) for line in lines]


@pytest.mark.parametrize("processes", [1, life.by_the_dozen(2)])
def test_signals_codes_and_orphans(tmp_path, longer, processes):
    """SIGTERM -> 143, SIGINT -> 130, kill -9 of the parent leaves nobody; the end is the straight
    run's."""
    settings = {
        "launch__processes": processes,
        "launch__micro_batch_size": 2,
        "optim__steps": 40,
        "log__every": 1,
    }
    settings |= {"evaluation__every": 10, "optim__batch_size": 8}
    path = life.write(tmp_path / "run", **settings)
    artifact = Artifact(tmp_path / "run" / "sft")
    command = [*PYTHON, "sft", str(path)]
    both = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}
    del both[signal.SIGINT if processes == 1 else signal.SIGTERM]
    for number, code in both.items():
        reached = last_step(artifact)
        parent = start(command)
        wait_for_progress(artifact, reached)
        parent.send_signal(number)
        out, _ = parent.communicate(timeout=60)
        assert parent.returncode == code, out
        deadline = time.monotonic() + 10
        while processes_of(artifact.path) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not processes_of(artifact.path)
        assert not artifact.finished
    if processes == 1:
        life.command(path)
        assert life.essence(artifact) == life.essence(longer)
        return
    code, out = run(command)
    assert code == 0, out
    assert losses(artifact) == pytest.approx(losses(longer), abs=1e-4)


@pytest.mark.parametrize("processes", [1, life.by_the_dozen(2)])
def test_codes_of_failures(tmp_path, processes):
    """2 for data, 4 for NaN, 3 for another recipe: the worker's own outcome, and one line."""
    settings = {"launch__processes": processes, "launch__micro_batch_size": 2, "optim__steps": 6}
    path = life.write(tmp_path / "run", **settings, optim__learning_rate=1e30, optim__warmup=0)
    code, out = run([*PYTHON, "sft", str(path)])
    assert code == 4 and "stopped before the optimizer step" in out and "Traceback" not in out, out
    path = life.write(tmp_path / "run2", **settings, data__max_length=8)
    code, out = run([*PYTHON, "sft", str(path)])
    assert code == 2 and "rows.jsonl:" in out and "Traceback" not in out, out


TWO = ["--multi_gpu", "--num_processes", "2", "--main_process_port"]


@pytest.mark.parametrize(
    ("command", "again"),
    [
        life.by_the_dozen([*ACCELERATE, "llmpipe", "sft"], True),
        ([*ACCELERATE, *TWO, "29731", "llmpipe", "sft"], False),
        life.by_the_dozen([*ACCELERATE, "-m", "llmpipe", "sft"], True),
        life.by_the_dozen([*ACCELERATE, *TWO, "29733", "-m", "llmpipe", "sft"], True),
    ],
    ids=["checkout", "checkout-two", "module", "module-two"],
)
def test_outside_launchers(tmp_path, straight, command, again):
    """`accelerate launch llmpipe sft` from the checkout, with one and two processes, and from
    anywhere as a module. What is there already is skipped: in `make test` by two forks, as
    torchrun would start them."""
    micro = 2 if "--multi_gpu" in command else 4
    path = life.write(
        tmp_path / "run",
        optim__steps=6,
        log__every=1,
        launch__micro_batch_size=micro,
        launch__processes="auto",
    )
    code, out = run([*command, str(path)], cwd=tmp_path if "-m" in command[3:] else life.ROOT)
    assert code == 0, out
    artifact = Artifact(tmp_path / "run" / "sft")
    assert artifact.verify().hardware["processes"] == (2 if "--multi_gpu" in command else 1)
    assert losses(artifact) == pytest.approx(losses(straight), abs=1e-4)
    if again:
        code, out = run([*command, str(path)], cwd=tmp_path if "-m" in command[3:] else life.ROOT)
        assert code == 0 and "skip" in out, out
    else:
        first, second = life.ranks(path)
        assert first[0] == second[0] == 0 and "skip" in first[1] + second[1], (first, second)


def test_what_a_launcher_would_do_with_a_model_is_refused(tmp_path, monkeypatch):
    """Obeyed or refused, never ignored; and what there is instead is named."""
    monkeypatch.setitem(ENVIRONMENT, "ACCELERATE_USE_DEEPSPEED", "true")
    code, out = run([*PYTHON, "sft", str(life.write(tmp_path / "run"))])
    assert code == 2 and "llmpipe trains no model by a launcher's DEEPSPEED" in out
    assert "launch.strategy: zero2, zero3 or fsdp" in out and "Traceback" not in out


@pytest.mark.faults
def test_a_launcher_with_fsdp_has_the_model_put_in_parts(tmp_path):
    changes = {"launch__micro_batch_size": 2, "launch__activation_checkpointing": "none"}
    path = life.write(tmp_path / "run", launch__processes="auto", **changes)
    two = ["--use_fsdp", "--num_processes", "2", "--main_process_port", "29743"]
    code, out = run([*ACCELERATE, *two, "llmpipe", "sft", str(path)])
    assert code == 0, out
    manifest = Artifact(tmp_path / "run" / "sft").verify()
    assert manifest.hardware["sharded"] is True and out.count("launch.strategy is fsdp") == 1


@pytest.mark.faults
def test_a_stage_that_does_not_train_under_an_outside_launcher(tmp_path):
    """Two ranks of `accelerate launch llmpipe eval` share the items."""
    models = {"base": str(life.TINY / "model")}
    tasks = [{"task": "perplexity", "data": [{"path": str(life.TINY / "rows.jsonl"), "limit": 4}]}]
    values = {
        "stage": "eval",
        "run": str(tmp_path / "run"),
        "models": models,
        "tasks": tasks,
        "precision": "fp32",
    }
    path = tmp_path / "eval.yaml"
    path.write_text(json.dumps(values | {"launch": {"threads": 1}}))
    two = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "29741"]
    code, out = run([*ACCELERATE, *two, "llmpipe", "eval", str(path)])
    assert code == 0, out
    assert Artifact(tmp_path / "run" / "eval").verify().kind == "evaluation"
    assert out.count("evaluation published") == 1
