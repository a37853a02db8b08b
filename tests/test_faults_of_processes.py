"""`make faults`: real process trees that are killed early, or of which one rank fails.

FAULTS=full: the nightly count.
"""

import os
import random
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from llmpipe.front.launch import free_port
from llmpipe.run.artifact import Artifact
from tests import life
from tests.front.test_processes import ACCELERATE, ENVIRONMENT, PYTHON

pytestmark = pytest.mark.faults
FULL = os.environ.get("FAULTS") == "full"
SEED = 20261126
EARLY = 20
"""Seconds of a busy machine in which two ranks import, connect and begin to train."""
TWO = {"launch__processes": 2, "launch__micro_batch_size": 2}
POOL = {"data__processes": 2}


class Tree:
    """A command and all that it starts, which are known by a word in their environment."""

    def __init__(self, command, **variables):
        self.word = uuid.uuid4().hex
        self.process = subprocess.Popen(
            command,
            cwd=life.ROOT,
            env=ENVIRONMENT | {"TREE": self.word, "OMP_NUM_THREADS": "1"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def pids(self, named=""):
        """Of the processes that live, and have `named` in their command line."""
        pids = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                ours = self.word.encode() in (folder / "environ").read_bytes()
                if ours and named.encode() in (folder / "cmdline").read_bytes():
                    pids.append(int(folder.name))
            except OSError:
                pass  # of somebody else, or gone
        return pids

    def wait_for(self, named):
        """The first process of that name; None where the command ended before."""
        while self.process.poll() is None:
            if pids := self.pids(named):
                return min(pids)
            time.sleep(0.02)
        return None

    def gone(self, seconds=5.0):
        """Whether no process is left after so many seconds; those that are get killed."""
        deadline = time.monotonic() + seconds
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.05)
        left = self.pids()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return not left

    def end(self, seconds=120):
        """(exit code, what was printed)."""
        try:
            out, _ = self.process.communicate(timeout=seconds)
        finally:
            self.gone(0)
        return self.process.returncode, out


def sft(path, **variables):
    return Tree([*PYTHON, "sft", str(path)], **variables)


def outside(path, **variables):
    two = ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    return Tree([*ACCELERATE, *two, "-m", "llmpipe", "sft", str(path)], **variables)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """{name: what an undisturbed run of the recipe comes to}."""
    ends = {}
    for name, settings in {"two": TWO, "pool": POOL}.items():
        path = life.write(tmp_path_factory.mktemp(name) / "run", **settings)
        code, out = sft(path).end()
        assert code == 0, out
        ends[name] = life.essence(Artifact(path.parent / "run" / "sft"))
    return ends


KILLS = [
    ("two", "command"),
    ("two", "accelerate.commands.launch"),
    ("pool", "command"),
    ("pool", "start_worker"),
]


@pytest.mark.parametrize("trial", range(10 if FULL else 5))
@pytest.mark.parametrize(("settings", "victim"), KILLS)
def test_an_early_kill_leaves_nobody(straight, tmp_path, settings, victim, trial):
    """kill -9 of the command, its launcher or its worker at any moment: no process is left after
    five seconds, and the same command goes on to the same bytes."""
    rng = random.Random(f"{SEED} {settings} {victim} {trial}")
    path = life.write(tmp_path / "run", **(TWO if settings == "two" else POOL))
    tree = sft(path)
    # of the pool: while it is started and at work, which takes a second or two
    begins = {"two": "accelerate", "pool": "start_worker"}[settings]
    if trial:
        tree.wait_for(begins)
    time.sleep(rng.uniform(0, EARLY if settings == "two" else 4))
    pid = tree.process.pid if victim == "command" else tree.wait_for(victim)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
    assert tree.gone() or pid is None
    tree.end()
    code, out = sft(path).end()
    assert code == 0, out
    assert life.essence(Artifact(tmp_path / "run" / "sft")) == straight[settings]


@pytest.mark.parametrize("trial", range(5 if FULL else 2))
def test_the_ranks_of_an_outside_launcher_end_with_it(tmp_path, trial):
    rng = random.Random(f"{SEED} outside {trial}")
    path = life.write(tmp_path / "run", launch__processes="auto", launch__micro_batch_size=2)
    tree = outside(path)
    tree.wait_for("\0llmpipe\0sft")
    time.sleep(rng.uniform(0, EARLY))
    tree.process.kill()
    assert tree.gone()
    tree.end()


FAILURES = [
    ("kill_now", 5, "rank 1 was killed (SIGKILL), most likely for want of memory"),
    ("kill_in_step_4", 5, "rank 1 was killed (SIGKILL), most likely for want of memory"),
    ("memory_ends_in_step_4", 5, "error: out of memory"),
    ("nan_loss_4", 4, "error: step 4: the "),  # its gradient reaches the others
    ("bug_in_step_4", 1, "error: a bug: KeyError: 'forgotten'"),
    ("crash_in_step_4", 1, "rank 1 died of signal SIGSEGV"),
]


def faulty(fault):
    paths = os.pathsep.join([str(life.ROOT / "tests" / "faulty"), str(life.ROOT)])
    return {"FAULT": fault, "PYTHONPATH": paths}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("hook", "code", "line"), FAILURES)
def test_the_first_failure_is_the_one_shown(tmp_path, rank, hook, code, line):
    """Not that another rank lost its connection to it."""
    path = life.write(tmp_path / "run", **TWO)
    ended, out = sft(path, **faulty(f"{rank} {hook}")).end()
    assert (ended, line.replace("rank 1", f"rank {rank}") in out) == (code, True), out
    assert "peer" not in out and "Traceback" not in out


@pytest.mark.parametrize(("hook", "code", "line"), FAILURES)
def test_under_an_outside_launcher_each_rank_says_its_own(tmp_path, hook, code, line):
    """And one that lost another says that; the launcher has the exit code."""
    path = life.write(tmp_path / "run", launch__processes="auto", launch__micro_batch_size=2)
    _, out = outside(path, **faulty(f"1 {hook}")).end()
    if line.startswith("error"):
        assert line in out
    if hook != "kill_now":
        assert "error: another process ended" in out, out
