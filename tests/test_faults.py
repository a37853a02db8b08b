"""`make faults`: RELIABILITY.md's figures for every stage that trains, by the dozen.
FAULTS=full: the nightly ones."""

import os
import random
import signal
import time

import pytest

from llmpipe.errors import UserError
from tests import life, store
from tests.front.test_processes import PYTHON, processes_of, run, start
from tests.models import test_adapters
from tests.rl import test_ppo
from tests.training import test_preference, test_pretrain
from tests.training.test_life import begin_again, copy, damage, passed_over

pytestmark = pytest.mark.faults
FULL = os.environ.get("FAULTS") == "full"
SEED = 20261121


# How many trials a stage gets: the loop is shared, so sft stands for most of it.
SHARE = {
    "sft": 1.0,
    "lora": 0.4,
    "qlora": 0.4,
    "pretrain": 0.4,
    "stream": 0.4,
    "reward": 0.4,
    "dpo": 0.4,
    "kto": 0.2,
}
SHARE |= {"ppo": 1.0, "grpo": 0.4}  # a loop of its own


@pytest.fixture(scope="module")
def writers():
    """{stage: a function that writes its recipe for a run}; `stream` is pretrain without a copy
    of the tokens."""
    texts = store.texts()
    return {
        "sft": life.write,
        "lora": lambda run: test_adapters.write(run, "lora"),
        "qlora": lambda run: test_adapters.write(run, "qlora"),
        "pretrain": lambda run: test_pretrain.write(run, texts),
        "reward": lambda run: test_preference.write(run, "reward"),
        "dpo": lambda run: test_preference.write(run, "dpo"),
        "kto": lambda run: test_preference.write(run, "kto"),
        "ppo": lambda run: test_ppo.write(run, **test_ppo.LONGER),
        "grpo": lambda run: test_ppo.write(run, **test_ppo.LONGER_GRPO),
        "stream": lambda run: test_pretrain.write(run, texts, **test_pretrain.streamed(texts)),
    }


@pytest.fixture(scope="module")
def made(writers, tmp_path_factory):
    """{stage: an artifact made without interruption, and the seconds that a warm trial of it
    takes}, when asked for."""
    known = {}

    def make(stage):
        if stage not in known:
            for i in range(2):
                begun = time.monotonic()
                trial = life.Trial(writers[stage](tmp_path_factory.mktemp(f"{stage}{i}") / "run"))
                assert trial.wait() == 0, trial.text()
            seconds = time.monotonic() - begun
            known[stage] = (
                store.made(writers[stage](tmp_path_factory.mktemp(stage) / "run")),
                seconds,
            )
        return known[stage]

    return make


@pytest.fixture(scope="module")
def straight(made):
    return made("sft")[0]


EVERY = [
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "llmpipe.json",
    "sums.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]
WHOLE = [*EVERY, "model.safetensors", "config.json", "generation_config.json"]
ADAPTER = [*EVERY, "adapter_model.safetensors", "adapter_config.json"]
CHECKPOINT_FILES = {
    "sft": WHOLE,
    "lora": ADAPTER,
    "qlora": ADAPTER,
    "pretrain": WHOLE,
    "stream": WHOLE,
}
CHECKPOINT_FILES |= {
    "dpo": WHOLE,
    "kto": WHOLE,
    "reward": [name for name in WHOLE if name != "generation_config.json"],
}
OF_RL = ["learned.safetensors", "optimizer.safetensors", "llmpipe.json", "sums.json"]
CHECKPOINT_FILES |= {"ppo": OF_RL, "grpo": OF_RL}
STATES = [(stage, name) for stage, names in CHECKPOINT_FILES.items() for name in names]
CUTS = [(stage, kept) for stage, names in CHECKPOINT_FILES.items() for kept in range(len(names))]


HURT = [
    (stage, name, hurt)
    for stage, name in STATES
    for hurt in ("missing", "empty", "half", "flipped", "swapped", "a link")
    if FULL or stage in ("sft", "ppo") or hurt not in ("swapped", "a link")
]


def trials(count):
    """(stage, number) of as many random trials as each stage gets."""
    return [
        (stage, i)
        for stage, share in SHARE.items()
        for i in range(count if FULL else round(count * share / 2))
    ]


@pytest.mark.parametrize(("stage", "name", "hurt"), HURT)
def test_crash_state_matrix(made, writers, tmp_path, stage, name, hurt):
    """R2: every file of the newest checkpoint hurt in every way: the end is the
    straight run's."""
    straight, _ = made(stage)
    assert {p.name for p in (straight.checkpoints / "step-12").iterdir()} == set(
        CHECKPOINT_FILES[stage]
    )
    passed_over(straight, tmp_path, name, hurt, writers[stage])


LINES = {stage: ["metrics.jsonl", "samples.jsonl"] for stage in CHECKPOINT_FILES}
LINES |= {stage: [*LINES[stage], "rollouts.jsonl"] for stage in ("ppo", "grpo")}
LINES["reward"] = ["metrics.jsonl"]
LINES["stream"] = [*LINES["stream"], "rejected.jsonl"]


@pytest.mark.parametrize("hurt", ["missing", "empty", "half", "flipped", "a byte less", "a link"])
@pytest.mark.parametrize(
    ("stage", "name"), [(stage, name) for stage, names in LINES.items() for name in names]
)
def test_lines_of_an_unfinished_run(made, writers, tmp_path, stage, name, hurt):
    """Files that grow, hurt in any way: refused before a step is trained, or the straight end."""
    straight, _ = made(stage)
    artifact = copy(straight, tmp_path)
    begin_again(artifact, writers[stage])
    path = artifact.path / name
    if hurt == "a byte less":
        path.write_bytes(path.read_bytes()[:-1])
    elif hurt == "a link":
        path.symlink_to(path.rename(tmp_path / "aside"))
    elif hurt == "flipped" and not path.stat().st_size:
        path.write_bytes(b"x")  # a stream of which no row was rejected
    else:
        damage(path, hurt)
    before = path.read_bytes() if path.exists() else b""
    try:
        life.command(writers[stage](artifact.run))
    except UserError as error:
        assert error.code == 3 and name in error.message
        assert (path.read_bytes() if path.exists() else b"") == before
    else:
        assert life.essence(artifact) == life.essence(straight)


@pytest.mark.parametrize(("stage", "kept"), CUTS)
def test_every_prefix_of_a_save(made, writers, tmp_path, stage, kept):
    """R2: a save that was cut after any number of files leaves a staging folder that nobody
    takes for a checkpoint."""
    straight, _ = made(stage)
    artifact = copy(straight, tmp_path)
    begin_again(artifact, writers[stage])
    whole = artifact.checkpoints / "step-12"
    staging = artifact.checkpoints / ".step-12.staging"
    whole.rename(staging)
    for path in sorted(staging.iterdir())[kept:]:
        path.unlink()
    life.command(writers[stage](artifact.run))
    assert life.essence(artifact) == life.essence(straight)


@pytest.mark.parametrize(("stage", "trial"), trials(60))
def test_stopped_at_random(made, writers, tmp_path, stage, trial):
    """R5 in every second trial: SIGTERM anywhere: 143 within five seconds (one tiny step is far
    below). R3 in all of them: one to three kills anywhere in the life of the command, then the
    same command once more: an exact resume."""
    straight, seconds = made(stage)
    path = writers[stage](tmp_path / "run")
    if trial % 2 == 0:
        _terminate(path, random.Random(f"{SEED} term {stage} {trial // 2}").uniform(0.3, seconds))
    rng = random.Random(f"{SEED} {stage} {trial}")
    for _ in range(rng.randint(1, 3)):
        victim = life.Trial(path)
        time.sleep(rng.uniform(0.05, seconds))
        victim.process.kill()
        assert victim.wait() in (-signal.SIGKILL, 0), victim.text()
    artifact = life.command(path)
    assert life.essence(artifact) == life.essence(straight)
    assert not list(artifact.path.glob(".*"))


def _terminate(path, seconds):
    """Start the command, and send it SIGTERM after so many seconds."""
    victim = life.Trial(path)
    time.sleep(seconds)
    victim.process.terminate()
    begun = time.monotonic()
    code = victim.wait()
    # -15: before Python had installed its handlers
    assert code in (0, 143, -signal.SIGTERM), victim.text()
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("trial", range(10 if FULL else 5))
def test_kill_the_real_tree(straight, tmp_path, trial):
    """R3: kill -9 of the command itself, and of its worker, in the real process tree."""
    rng = random.Random(SEED + 1000 + trial)
    path = life.write(tmp_path / "run")
    command = [*PYTHON, "sft", str(path)]
    parent = start(command)
    folder = tmp_path / "run" / "sft"
    deadline = time.monotonic() + 60
    while (
        not any("worker" in cmdline(pid) for pid in processes_of(folder))
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    time.sleep(rng.uniform(0.5, 15))
    victims = (
        [pid for pid in processes_of(folder) if pid != parent.pid] if trial % 2 else [parent.pid]
    )
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
