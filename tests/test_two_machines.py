"""Two machines with one cable and one file system: equal to one, and what ends one ends both."""

import os
import signal
import subprocess
import time

import pytest

from llmpipe.run.artifact import Artifact
from tests import life, machines
from tests.front.test_processes import last_step
from tests.machines import accelerate, srun, torchrun
from tests.training.test_sharded import assert_alike, write

pytestmark = pytest.mark.faults
LONG = {"optim__steps": 30, "checkpoint__every": 3, "evaluation": {}}


@pytest.fixture(scope="module")
def names():
    with machines.cabled() as names:
        yield names


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory):
    """{strategy: what two processes of one machine make}."""
    home = tmp_path_factory.mktemp("one")
    return {strategy: life.pair(write(home / strategy, strategy)) for strategy in ("ddp", "fsdp")}


@pytest.mark.parametrize("launcher", [torchrun, accelerate, srun])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_machines_are_one(tmp_path, names, one_machine, launcher, strategy):
    """And the first of them says what there is to say, once."""
    path = write(tmp_path / "run", strategy)
    artifact = machines.made(names, path, launcher)
    assert_alike(artifact, one_machine[strategy])
    assert life.essence(artifact) == life.essence(one_machine[strategy])
    first, second = [machines.out_of(path, number).read_text() for number in (0, 1)]
    assert first.count("model published") == 1
    assert "sft" not in second and "it/s" not in second and "step" not in second, second


def unplug(names, running):
    subprocess.run(["ip", "-n", names[1], "link", "set", "cable", "down"], check=True)


def kill_second(names, running):
    os.kill(running[1].rank(), signal.SIGKILL)


def kill_first(names, running):
    os.kill(running[0].rank(), signal.SIGKILL)


def stop_second(names, running):
    running[1].process.terminate()


FAULTS = [
    (kill_second, ("another process ended, see what it says", None)),
    (kill_first, (None, "another process ended, see what it says")),
    (unplug, ("rank 1 (machine 1) is gone", "is gone")),
    (stop_second, ("checkpoint written", "checkpoint written")),
]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(("fault", "lines"), FAULTS)
def test_what_ends_one_machine_ends_both_and_the_same_command_goes_on(
    tmp_path, names, fault, lines, strategy
):
    path = write(tmp_path / "run", strategy, **LONG)
    artifact = Artifact(tmp_path / "run" / "sft")
    running = machines.start(names, path)
    machines.wait_until(lambda: last_step(artifact) > 3, running)
    fault(names, running)
    begun = time.monotonic()
    _, texts = machines.ends(running)
    assert time.monotonic() - begun < 60 or fault is unplug, texts
    for text, line in zip(texts, lines, strict=True):
        assert line is None or line in text, text
        assert "Traceback" not in text.partition("ChildFailedError")[0]
    assert list(artifact.checkpoints.glob("step-*"))
    subprocess.run(["ip", "-n", names[1], "link", "set", "cable", "up"], check=True)
    again = path.with_name("again.yaml")
    again.write_text(path.read_text())
    machines.made(names, again)
    assert "resuming from step-" in machines.out_of(again, 0).read_text()
