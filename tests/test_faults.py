"""`make faults`: RELIABILITY.md's figures for sft, by the dozen. FAULTS=full runs the nightly numbers."""

import os
import random
import shutil
import signal
import time

import pytest

from tests import life
from tests.test_life import begin_again, copy, passed_over
from tests.test_processes import PYTHON, processes_of, run, start

pytestmark = pytest.mark.faults
FULL = os.environ.get("FAULTS") == "full"
SEED = 20261121


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return life.command(life.write(tmp_path_factory.mktemp("straight") / "run"))


@pytest.fixture(scope="module")
def duration(tmp_path_factory):
    """Seconds of an uninterrupted trial, after a warm-up."""
    for i in range(2):
        begun = time.monotonic()
        assert life.Trial(life.write(tmp_path_factory.mktemp(f"time{i}") / "run")).wait() == 0
    return time.monotonic() - begun


CHECKPOINT_FILES = [
    "model.safetensors", "config.json", "generation_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "llmpipe.json", "sums.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
]  # fmt: skip


@pytest.mark.parametrize("hurt", ["missing", "empty", "half", "flipped"])
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_crash_state_matrix(straight, tmp_path, name, hurt):
    """R2: every file of the newest checkpoint missing, empty, half, flipped: the end is the straight run's."""
    assert {p.name for p in (straight.checkpoints / "step-12").iterdir()} == set(CHECKPOINT_FILES)
    passed_over(straight, tmp_path, name, hurt)


@pytest.mark.parametrize("kept", range(len(CHECKPOINT_FILES)))
def test_every_prefix_of_a_save(straight, tmp_path, kept):
    """R2: a save that was cut after any number of files leaves a staging folder that nobody takes for a checkpoint."""
    artifact = copy(straight, tmp_path)
    begin_again(artifact)
    whole = artifact.checkpoints / "step-12"
    staging = artifact.checkpoints / ".step-12.staging"
    whole.rename(staging)
    for path in sorted(staging.iterdir())[kept:]:
        path.unlink()
    life.command(life.write(artifact.run))
    assert life.essence(artifact) == life.essence(straight)


@pytest.mark.parametrize("trial", range(60 if FULL else 25))
def test_kill_at_random(straight, duration, tmp_path, trial):
    """R3: one to three kills anywhere in the life of the command, then the same command once more."""
    rng = random.Random(SEED + trial)
    path = life.write(tmp_path / "run")
    for _ in range(rng.randint(1, 3)):
        victim = life.Trial(path)
        time.sleep(rng.uniform(0.05, duration))
        victim.process.kill()
        assert victim.wait() in (-signal.SIGKILL, 0), victim.text()
    artifact = life.command(path)
    assert life.essence(artifact) == life.essence(straight)
    assert not list(artifact.path.glob(".*"))


@pytest.mark.parametrize("trial", range(10 if FULL else 5))
def test_kill_the_real_tree(straight, tmp_path, trial):
    """R3: kill -9 of the command itself, and of its worker, in the real process tree."""
    rng = random.Random(SEED + 1000 + trial)
    path = life.write(tmp_path / "run")
    command = [*PYTHON, "sft", str(path)]
    parent = start(command)
    folder = tmp_path / "run" / "sft"
    deadline = time.monotonic() + 60
    while not any("worker" in cmdline(pid) for pid in processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(rng.uniform(0.5, 15))
    victims = [pid for pid in processes_of(folder) if pid != parent.pid] if trial % 2 else [parent.pid]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    parent.communicate(timeout=60)
    time.sleep(0.5)
    assert not processes_of(folder)
    code, out = run(command)
    assert code == 0, out
    assert life.essence(type(straight)(folder)) == life.essence(straight)


def cmdline(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.parametrize("trial", range(30 if FULL else 15))
def test_sigterm_at_random(straight, duration, tmp_path, trial):
    """R5: SIGTERM anywhere: 143 within five seconds (one tiny step is far below), then an exact resume."""
    rng = random.Random(SEED + 2000 + trial)
    path = life.write(tmp_path / "run")
    victim = life.Trial(path)
    time.sleep(rng.uniform(0.3, duration))
    victim.process.terminate()
    begun = time.monotonic()
    code = victim.wait()
    assert code in (0, 143, -signal.SIGTERM), victim.text()  # -15: before Python had installed its handlers
    assert time.monotonic() - begun < 5
    assert life.essence(life.command(path)) == life.essence(straight)


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "samples.jsonl", "rejected.jsonl", "model"])
@pytest.mark.parametrize("hurt", ["flip", "cut", "remove"])
def test_every_artifact_file(straight, tmp_path, name, hurt):
    """R9: every file of an artifact flipped, cut or removed: exit 3, the file named."""
    from llmpipe.errors import UserError

    paths = sorted((straight.path / name).iterdir()) if name == "model" else [straight.path / name]
    for path in paths:
        if not path.stat().st_size and hurt != "remove":
            continue
        artifact = copy(straight, tmp_path)
        victim = artifact.path / path.relative_to(straight.path)
        data = bytearray(victim.read_bytes())
        if hurt == "flip":
            data[len(data) // 3] ^= 4
            victim.write_bytes(data)
        elif hurt == "cut":
            victim.write_bytes(data[:-1])
        else:
            victim.unlink()
        with pytest.raises(UserError) as refused:
            artifact.verify()
        assert refused.value.code == 3 and path.name in str(refused.value)
        shutil.rmtree(artifact.run)
