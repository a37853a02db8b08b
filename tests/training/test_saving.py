"""Checkpoints that are written while the next steps run are those that are written at once, and
whatever happens meanwhile leaves what it leaves of these."""

import io
import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from llmpipe.errors import LOST
from llmpipe.recipe.sections import Checkpoint
from llmpipe.run.artifact import Artifact
from llmpipe.training import saving
from llmpipe.training.host_copy import File, HostMemory
from llmpipe.training.saving import Saving, _Pending
from tests import life
from tests.models import test_adapters
from tests.rl import test_ppo
from tests.training import test_sharded

BESIDE = {"checkpoint__asynchronous": True}
KEPT = {"checkpoint__keep": 9}
OF_CLOCKS = {*life.WALL_CLOCK, "fingerprint", "llmpipe.json", "lines", "metrics_bytes", "bytes"}


# --- copies ---


def test_what_is_pickled_of_a_copy_is_what_is_pickled():
    """Also where tensors share memory, are parts of it, or lie in it the other way; and what is
    done to them later is in no copy."""
    base = torch.arange(24.0).reshape(4, 6)
    part, turned = base[1:3, 2:], base.t()
    empty, count = torch.empty(0), torch.tensor(7)
    names = ["step", "shared"]
    shared = [base, {"again": base, "turned": turned}]
    value = {0: {"part": part, names[0]: count, "none": empty}, names[1]: shared, "twice": shared}
    before = pickled(value)
    file = File(None, value, pickled=True)
    memory = HostMemory(pinned=False)
    for _ in range(2):  # the second one lies where the first one was
        assert memory.reserve(file.size)
        held = file.copied(memory)
    base.mul_(2)
    count.add_(1)
    assert pickled(held.content) == before != pickled(value)
    assert held.content["twice"] is held.content["shared"]
    assert file.size == memory.size == 128 + 64, "24 numbers, and one"


def pickled(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_what_a_library_notes_on_a_tensor_is_copied():
    tensor = torch.ones(3, dtype=torch.uint8)
    tensor.is_paged = True
    file, memory = File(None, {"state": tensor}, pickled=True), HostMemory(pinned=False)
    memory.reserve(file.size)
    assert file.copied(memory).content["state"].is_paged


def test_tensors_are_copied_as_they_are_written(tmp_path):
    base = torch.randn(6, 4, dtype=torch.bfloat16)
    tensors = {"a": base[:2], "turned": base.t(), "number": torch.tensor(3), "none": base[:0]}
    file = File(tmp_path / "some" / "live.safetensors", tensors, {"format": "pt"})
    memory = HostMemory(pinned=False)
    memory.reserve(file.size)
    held = file.copied(memory)
    live = file.write()
    base.zero_()
    assert held.write() == live
    memory.reserve(1 << 20)
    assert memory.size == 1 << 20
    memory.free()
    assert memory.size == 0


# --- the same bytes ---


@pytest.fixture
def slowly(monkeypatch):
    """A thread takes longer than a step for each file; the number of those that it has written."""
    written = []
    write = File.write

    def slow(self):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.2)
            written.append(self.path.name)
        return write(self)

    monkeypatch.setattr(File, "write", slow)
    return written


def same_checkpoints(one, other):
    """That two artifacts have the same checkpoints to the byte, but for what clocks say."""
    steps = one.steps
    assert steps == other.steps
    for step in steps:
        folders = [each.checkpoints / f"step-{step}" for each in (one, other)]
        assert not list(folders[0].parent.glob(".*"))
        mine, theirs = map(bytes_of, folders)
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name] == theirs[name], (step, name)


def bytes_of(folder):
    """{file: what it holds}."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): held_by(path) for path in files}


def held_by(path):
    data = path.read_bytes()
    if path.name in ("llmpipe.json", "sums.json", "trainer_state.json"):
        return without_clocks(json.loads(data))
    return data


def without_clocks(value):
    if isinstance(value, dict):
        return {
            name: without_clocks(inner) for name, inner in value.items() if name not in OF_CLOCKS
        }
    if isinstance(value, list):
        return [without_clocks(inner) for inner in value]
    return value


WAYS = {
    "sft": lambda run, **how: life.write(run, **how),
    "lora": lambda run, **how: test_adapters.write(run, "lora", **how),
    "ppo": lambda run, **how: test_ppo.write(run, **how),
    "grpo": lambda run, **how: test_ppo.write(run, **test_ppo.GRPO, **how),
}
OFTEN = [life.by_the_dozen(way) if way == "grpo" else way for way in WAYS]


@pytest.mark.parametrize("way", OFTEN)
def test_what_is_written_beside_steps_is_what_is_written_at_once(tmp_path, slowly, way):
    one = life.command(WAYS[way](tmp_path / "at-once", **KEPT))
    assert not slowly, "off where a CPU computes the steps"
    other = life.command(WAYS[way](tmp_path / "beside", **KEPT, **BESIDE))
    assert len(slowly) >= 4
    same_checkpoints(one, other)
    assert life.essence(one) == life.essence(other)
    text = (other.path / "log.txt").read_text()
    assert "checkpoints: written while the next steps run, from a copy of " in text
    assert "3 written beside steps" in text or "2 written beside steps" in text


@pytest.mark.parametrize("stage", ["sft", life.by_the_dozen("lora")])
def test_what_two_processes_write_beside_steps(tmp_path, stage):
    """Their parts of the model, or one of them an adapter on a base in parts."""
    made = []
    for name, how in (("at-once", {}), ("beside", BESIDE)):
        path = test_sharded.write(tmp_path / name, stage=stage, **KEPT, **how)
        for code, text in life.ranks(path, hooks=["slow_writing_20"] * 2):
            assert code == 0, text
        made.append(Artifact(tmp_path / name / stage))
    same_checkpoints(*made)
    assert life.essence(made[0]) == life.essence(made[1])
    assert "3 written beside steps" in (made[1].path / "log.txt").read_text()


def test_where_a_copy_has_no_room_it_is_written_at_once(tmp_path, slowly, monkeypatch):
    monkeypatch.setattr(saving, "free_memory", lambda: 1000)
    artifact = life.command(life.write(tmp_path / "run", **BESIDE))
    assert not slowly
    text = (artifact.path / "log.txt").read_text()
    assert text.count("checkpoints: written at once: for a copy of ") == 1
    assert "in the host's memory 0.0 MB are free" in text


# --- the next checkpoint, a stop, the end ---


# --- one of several processes ---


class Together:
    """Some processes, which are threads, as one of them sees them."""

    def __init__(self, rank, size, barrier=None, said=None):
        self.rank, self.size = rank, size
        self.is_first = rank == 0
        self.barrier, self.said = barrier, said

    def gather(self, value):
        self.said[self.rank] = value
        self.barrier.wait(10)
        values = list(self.said)
        self.barrier.wait(10)
        return values

    def all(self, value):
        return all(self.gather(value))


def saving_of(home, world):
    return Saving(home, Checkpoint(asynchronous=True), "cpu", world, lambda line: None)


@pytest.mark.parametrize(("free", "fits"), [(2000, False), (4000, True)])
def test_machines_of_unequal_numbers_of_processes_decide_as_one(tmp_path, monkeypatch, free, fits):
    """One has one process and another two, which would have no room for both their copies."""
    known = threading.local()
    monkeypatch.setattr(saving, "local_world_size", lambda: known.processes)
    monkeypatch.setattr(saving, "free_memory", lambda: free)
    barrier, said = threading.Barrier(3), [None] * 3

    def one(rank):
        known.processes = (1, 2, 2)[rank]
        world = Together(rank, 3, barrier, said)
        return saving_of(tmp_path, world)._reserve(1024)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(one, range(3))) == [fits] * 3


def pending_of(home, files=2):
    staging = home / ".step-3.staging"
    over = threading.Event()
    file = SimpleNamespace(path=staging / "part", write=lambda: over.wait(10))
    return _Pending(3, home / "step-3", staging, "", [file] * files), over


def test_one_of_several_that_fails_says_so_before_its_file_is_written(tmp_path):
    """The others stand in a collective meanwhile."""
    pending, over = pending_of(tmp_path)
    failing = saving_of(tmp_path, Together(1, 2))
    failing._pending = pending
    pending.begin()
    with pytest.raises(KeyError), failing:
        raise KeyError("forgotten")
    assert pending.thread.is_alive()
    assert not pending.thread.daemon, "or the process would be aborted in the middle of a file"
    over.set()
    pending.thread.join(10)
    assert len(pending.files) == 1, "the next one is not begun"


def test_what_no_thread_writes_is_not_published(tmp_path, monkeypatch):
    def none(thread):
        raise RuntimeError("can't start new thread")

    pending, _ = pending_of(tmp_path)
    published = []
    pending.published.push(lambda kind, *_: published.append(kind is None))
    world = Together(0, 1)
    world.as_one = nullcontext
    alone = saving_of(tmp_path, world)
    monkeypatch.setattr(threading.Thread, "start", none)
    with pytest.raises(RuntimeError, match="new thread"), alone:
        alone._pending = pending
        pending.begin()
    assert published == [False]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_kills_have_left_of_checkpoints_is_removed_by_the_first(tmp_path, rank):
    names = [".step-3.old", ".step-7.staging", ".step-9.staging", "step-6"]
    for name in names:
        (tmp_path / name / "sharded").mkdir(parents=True)
        (tmp_path / name / "sharded" / "part").write_text("state")
    with saving_of(tmp_path, Together(rank, 2)):
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left == (names if rank else [".step-3.old", "step-6"])


# --- the whole command ---


def beside(run, **how):
    return life.write(run, **BESIDE, **how)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return life.command(life.write(tmp_path_factory.mktemp("straight") / "run"))


def test_the_next_one_waits_and_says_so(tmp_path, straight, monkeypatch):
    """One at each third step, of which each takes longer than three steps."""
    trial = life.Trial(path := beside(tmp_path / "run"), hook="slow_writing_100")
    assert trial.wait() == 0, trial.text()
    text = trial.text()
    waits = "checkpoint: step 6 waits for that of step 3, which is still being written"
    assert text.count("waits for that of step") == 2 and waits in text, "the first, and the last"
    assert "2 waited for the one before: raise checkpoint.every" in text, "a step followed"
    artifact = Artifact(path.parent / "run" / "sft")
    assert life.essence(artifact) == life.essence(straight)


@pytest.mark.parametrize("number", ["term", life.by_the_dozen("int")])
def test_a_stop_finishes_what_is_being_written(tmp_path, straight, number):
    path = beside(tmp_path / "run")
    trial = life.Trial(path, hook=f"slow_writing_50__{number}_in_step_4")
    assert trial.wait() == {"term": 143, "int": 130}[number], trial.text()
    assert "step 4 waits for that of step 3" in trial.text()
    artifact = Artifact(tmp_path / "run" / "sft")
    assert artifact.steps == [3, 4]
    assert not list(artifact.checkpoints.glob(".*"))
    assert life.essence(life.command(path)) == life.essence(straight)


def test_a_second_interrupt_ends_it_there_and_leaves_nothing(tmp_path, straight):
    """While what is being written is waited for."""
    path = beside(tmp_path / "run")
    trial = life.Trial(path, hook="slow_writing_200__int_in_step_4")
    wait_for(trial, "waits for that of step 3")
    time.sleep(0.6)  # two that come together are one
    os.kill(trial.process.pid, signal.SIGINT)
    assert trial.wait() == 130, trial.text()
    artifact = Artifact(tmp_path / "run" / "sft")
    assert artifact.steps == [] and not list(artifact.checkpoints.glob(".*"))
    assert life.essence(life.command(path)) == life.essence(straight)


def wait_for(trial, words):
    deadline = time.monotonic() + 60
    while words not in trial.text():
        assert time.monotonic() < deadline and trial.process.is_alive(), trial.text()
        time.sleep(0.02)


def test_a_step_that_fails_loses_no_checkpoint(tmp_path, straight):
    """Of one process, which has nobody to agree with."""
    path = beside(tmp_path / "run")
    trial = life.Trial(path, hook="slow_writing_50__bug_in_step_5")
    assert trial.wait() == 1 and "a bug: KeyError" in trial.text()
    assert Artifact(tmp_path / "run" / "sft").steps == [3]
    assert life.essence(life.command(path)) == life.essence(straight)


# --- faults ---


def test_a_disk_that_fills_under_a_thread_is_said_as_ever(tmp_path, straight):
    said, hook = [], "slow_writing_20__disk_full_at_6"
    for name, how in (("at-once", {}), ("beside", BESIDE)):
        path = life.write(tmp_path / name, **how)
        trial = life.Trial(path, hook=hook)
        assert trial.wait() == 5, trial.text()
        error = trial.text().partition("error: ")[2]
        assert "No space left" in error and "it goes on from step-3" in error
        said.append(error.replace(name, "run").split("; ")[0])
        artifact = Artifact(tmp_path / name / "sft")
        assert artifact.steps == [3] and not list(artifact.checkpoints.glob(".*"))
    assert said[0] == said[1]
    assert life.essence(life.command(path)) == life.essence(straight)


@pytest.mark.faults
@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_kill_under_the_thread_leaves_no_trace(tmp_path, straight, step):
    path = beside(tmp_path / "run")
    hook = f"slow_writing_10__kill_in_writing_{step}"
    assert life.Trial(path, hook=hook).wait() == -signal.SIGKILL
    artifact = Artifact(tmp_path / "run" / "sft")
    assert step not in artifact.steps and list(artifact.checkpoints.glob(f".step-{step}.staging"))
    resumed = life.command(path)
    assert life.essence(resumed) == life.essence(straight)
    assert not list(resumed.checkpoints.glob(".*"))


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    return life.pair(test_sharded.write(tmp_path_factory.mktemp("pair") / "run"))


def parts(run):
    return test_sharded.write(run, **BESIDE)


@pytest.mark.parametrize("rank", [0, life.by_the_dozen(1)])
def test_a_disk_that_fills_under_one_part_ends_all(tmp_path, by_two, rank):
    """All say what the one whose disk it is has met in its thread."""
    hooks = ["slow_writing_20", "slow_writing_20"]
    hooks[rank] += "__disk_full_in_parts_6"
    path = parts(tmp_path / "run")
    for code, text in life.ranks(path, hooks=hooks):
        assert code == 5 and "No space left" in text and "another process" not in text, text
    artifact = Artifact(tmp_path / "run" / "sft")
    assert artifact.steps == [3] and not list(artifact.checkpoints.glob(".*"))
    assert life.essence(life.pair(path)) == life.essence(by_two)


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("hook", ["kill_in_part_6", "slow_writing_50__kill_in_step_8"])
def test_a_process_that_dies_while_another_writes(tmp_path, by_two, rank, hook):
    """The other one ends with 75, and does not wait for what never comes."""
    hooks = ["slow_writing_50", "slow_writing_50"]
    hooks[rank] = hook
    path = parts(tmp_path / "run")
    began = time.monotonic()
    ends = life.ranks(path, hooks=hooks)
    assert time.monotonic() - began < 60
    codes = [code for code, _ in ends]
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == LOST, ends
    assert Artifact(tmp_path / "run" / "sft").steps == [3]
    assert life.essence(life.pair(path)) == life.essence(by_two)


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_of_two_finishes_what_is_being_written(tmp_path, by_two, rank):
    hooks = ["slow_writing_50", "slow_writing_50"]
    hooks[rank] += "__term_in_step_5"
    path = parts(tmp_path / "run")
    for code, text in life.ranks(path, hooks=hooks):
        assert code == 143, text
    assert Artifact(tmp_path / "run" / "sft").steps == [3, 5]
    assert life.essence(life.pair(path)) == life.essence(by_two)


# --- stopped at random ---

SEED = 20261128
NUMBERS = range(30 if life.FULL else 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{way: what is made when nobody stops it, and in how many seconds with threads that take
    their time}, when asked for."""
    known = {}

    def make(way):
        if way not in known:
            home = tmp_path_factory.mktemp(way)
            straight = life.command(WAYS[way](home / "run"))
            trial = life.Trial(WAYS[way](home / "timed", **BESIDE), hook=SLOWLY)
            begun = time.monotonic()
            assert trial.wait() == 0, trial.text()
            known[way] = straight, time.monotonic() - begun
        return known[way]

    return make


SLOWLY = "slow_writing_10"


@pytest.mark.faults
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("how", ["kill", "terminate"])
@pytest.mark.parametrize("way", ["sft", "ppo"])
def test_a_stop_at_random_leaves_no_trace(tmp_path, made, way, how, number):
    straight, seconds = made(way)
    path = WAYS[way](tmp_path / "run", **BESIDE)
    trial = life.Trial(path, hook=SLOWLY)
    time.sleep(random.Random(f"{SEED} {how} {way} {number}").uniform(0.2, seconds))
    getattr(trial.process, how)()
    code = trial.wait()
    ends = {-signal.SIGKILL} if how == "kill" else {143, -signal.SIGTERM}
    assert code in {0, *ends}, trial.text()
    assert life.essence(life.command(path)) == life.essence(straight)


@pytest.mark.faults
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("how", ["kill", "term"])
def test_one_of_two_stopped_at_random_leaves_no_trace(tmp_path, by_two, how, number):
    """At any time from the first step on, about."""
    draw = random.Random(f"{SEED} {how} {number}")
    hooks = [SLOWLY, SLOWLY]
    hooks[draw.randrange(2)] += f"__{how}_at_tenth_{draw.randrange(120)}"
    path = parts(tmp_path / "run")
    ends = life.ranks(path, hooks=hooks)
    codes = {code for code, _ in ends}
    assert codes <= ({0, LOST, -signal.SIGKILL} if how == "kill" else {0, 143}), ends
    assert life.essence(life.pair(path)) == life.essence(by_two)
    assert not list(Artifact(tmp_path / "run" / "sft").checkpoints.glob(".*"))
