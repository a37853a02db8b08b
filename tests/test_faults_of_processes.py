"""`make faults`: real process trees that are killed or stopped, or of which one rank fails.

FAULTS=full: the nightly count.
"""

import fcntl
import os
import pty
import random
import signal
import subprocess
import termios
import time
import uuid
from pathlib import Path

import pytest

from llmpipe.front.launch import free_port
from llmpipe.run.artifact import Artifact
from llmpipe.run.ends import reported
from llmpipe.run.outcome import Outcome
from tests import life
from tests.front.test_processes import ACCELERATE, ENVIRONMENT, PYTHON, last_step

pytestmark = pytest.mark.faults
FULL = os.environ.get("FAULTS") == "full"
SEED = 20261126
EARLY = 20
"""Seconds of a busy machine in which two ranks import, connect and begin to train."""
TWO = {"launch__processes": 2, "launch__micro_batch_size": 2}
POOL = {"data__processes": 2}
PREPARES, TRAINS = "start_worker\0prepare", "start_worker\0train"
"""In the command lines of workers."""


class Tree:
    """A command and all that it starts, which are known by a word in their environment."""

    def __init__(self, command, terminal=None, **variables):
        self.word = uuid.uuid4().hex

        def begin():
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
            if terminal is not None:
                fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command,
            cwd=life.ROOT,
            env=ENVIRONMENT | {"TREE": self.word, "OMP_NUM_THREADS": "1"} | variables,
            stdin=terminal,
            stdout=subprocess.PIPE if terminal is None else terminal,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=begin,
        )

    def pids(self, named=""):
        """Of the processes that live, and have `named` in their command line."""
        return life.pids_of(self.word, named)

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


def outside_alone(path):
    return Tree([*ACCELERATE, "-m", "llmpipe", "sft", str(path)])


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
    ("pool", PREPARES),
    ("pool", TRAINS),
]


@pytest.mark.parametrize("trial", range(10 if FULL else 3))
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
        os.kill(pid, signal.SIGSTOP)
        said = Outcome.read(Artifact(tmp_path / "run" / "sft"))
        os.kill(pid, signal.SIGKILL)
        # a worker that has said that it is done is not missed: its command goes on; as it does with
        # another one in place of one that waits for work
        assert (victim in (PREPARES, TRAINS) and said) or victim == TRAINS or tree.gone()
    ended, out = tree.end()
    assert victim != TRAINS or ended in (0, 5), out
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
    others = {
        "kill_now": "",  # rank 0 is ended before it asks
        "nan_loss_4": "error: step 4: the gradient norm is nan",
    }
    path = life.write(tmp_path / "run", launch__processes="auto", launch__micro_batch_size=2)
    _, out = outside(path, **faulty(f"1 {hook}")).end()
    if line.startswith("error"):
        assert line in out
    assert others.get(hook, "error: another process ended") in out, out
    statuses = {"kill_now": -9, "kill_in_step_4": -9, "crash_in_step_4": -11}
    assert statuses.get(hook, code) in reported(out).values(), out


LONG = {"optim__steps": 60, "log__every": 1, "checkpoint__every": 1000, "evaluation": {}}
RANKS = pytest.mark.parametrize("settings", [{}, TWO], ids=["one", "two"])


def training(tmp_path, start, **settings):
    """A tree that trains, and its artifact, whose one checkpoint would be the last."""
    path = life.write(tmp_path / "run", **LONG, **settings)
    tree, artifact = start(path), Artifact(tmp_path / "run" / "sft")
    while last_step(artifact) < 2:
        assert tree.process.poll() is None, tree.end()
        time.sleep(0.02)
    return tree, artifact


def steps(artifact):
    """Of which there are checkpoints."""
    return [int(path.name.split("-")[1]) for path in (artifact.path / "checkpoints").glob("step-*")]


def state(pid):
    return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]


def stop_all(tree):
    """Ctrl-Z, and that all of a tree stand still."""
    tree.process.send_signal(signal.SIGTSTP)
    deadline = time.monotonic() + 10
    while {state(pid) for pid in tree.pids()} != {"T"}:
        assert time.monotonic() < deadline, tree.end()
        time.sleep(0.02)


@RANKS
def test_ctrl_z_stops_every_process_and_a_continue_goes_on(tmp_path, settings):
    tree, artifact = training(tmp_path, sft, **settings)
    stop_all(tree)
    reached = last_step(artifact)
    time.sleep(1)
    assert last_step(artifact) == reached < LONG["optim__steps"]
    tree.process.send_signal(signal.SIGCONT)
    code, out = tree.end()
    assert code == 0, out
    assert artifact.verify() and last_step(artifact) == LONG["optim__steps"]


def test_ctrl_z_stops_one_that_waits_for_work_as_well(tmp_path):
    path = life.write(tmp_path / "run", optim__steps=2, evaluation={})
    tree = sft(path)
    tree.wait_for(TRAINS)
    stop_all(tree)
    tree.process.send_signal(signal.SIGCONT)
    code, out = tree.end()
    assert code == 0, out


@pytest.mark.parametrize("whom", ["group", "all"])
@pytest.mark.parametrize("worker", [PREPARES, TRAINS])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_there_is_work_leaves_nobody(tmp_path, worker, whom, number, code):
    """And no traceback of a worker that has begun nothing."""
    path = life.write(tmp_path / "run", optim__steps=2, evaluation={})
    tree = sft(path)
    tree.wait_for(worker)
    for pid in tree.pids() if whom == "all" else [-tree.process.pid]:
        os.kill(pid, number)
    ended, out = tree.end()
    # before it prepares, the command itself ends by what ends any process
    assert ended in (code, -number) and "Traceback" not in out, out
    assert tree.gone()


STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]


@RANKS
@pytest.mark.parametrize("whom", ["group", "all"])
@pytest.mark.parametrize(("number", "code"), STOPS)
def test_one_signal_to_several_processes_leaves_a_checkpoint(
    tmp_path, settings, whom, number, code
):
    """By the terminal to the command's group, or by somebody to whatever runs."""
    tree, artifact = training(tmp_path, sft, **settings)
    for pid in tree.pids() if whom == "all" else [-tree.process.pid]:
        os.kill(pid, number)
    ended, out = tree.end()
    assert ended == code and "checkpoint written" in out, out
    assert steps(artifact) == [last_step(artifact)]


@RANKS
def test_nohup(tmp_path, settings):
    tree, artifact = training(
        tmp_path, lambda path: Tree(["nohup", *PYTHON, "sft", str(path)]), **settings
    )
    os.killpg(tree.process.pid, signal.SIGHUP)
    code, out = tree.end()
    assert code == 0, out
    assert artifact.verify()


@RANKS
def test_a_terminal_that_goes_leaves_a_checkpoint(tmp_path, settings):
    """Which is a signal, and the end of what is printed to."""
    ours, theirs = pty.openpty()
    tree, artifact = training(
        tmp_path, lambda path: Tree([*PYTHON, "sft", str(path)], theirs), **settings
    )
    os.close(theirs)
    os.close(ours)
    assert tree.end()[0] == 143
    assert steps(artifact) == [last_step(artifact)]


@RANKS
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_outside_launcher_that_is_stopped_leaves_a_checkpoint(tmp_path, settings, number):
    """With one process it hands nothing on, and ends at once."""
    start = outside if settings else outside_alone
    tree, artifact = training(tmp_path, start, **(settings | {"launch__processes": "auto"}))
    os.killpg(tree.process.pid, number) if number == signal.SIGINT else tree.process.terminate()
    tree.process.wait()
    assert tree.gone()
    tree.end()
    assert steps(artifact) == [last_step(artifact)]
