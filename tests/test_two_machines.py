"""Two machines with one cable, and one file system or a run directory each: equal to one machine,
and what ends one ends both.
"""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from llmpipe.run.artifact import Artifact
from llmpipe.run.outcome import Outcome
from tests import life, machines
from tests.front.test_processes import last_step
from tests.machines import accelerate, srun, torchrun
from tests.rl.test_ppo import LONGER
from tests.rl.test_ppo import write as write_ppo
from tests.training.test_sharded import assert_alike, write

pytestmark = pytest.mark.faults
LAUNCHER = "torch/distributed/elastic"
"""A launcher begins so to say that a process has failed, with a traceback of its own."""
LONG = {"optim__steps": 12, "checkpoint__every": 3, "evaluation": {}}


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
    (kill_second, torchrun, ("another process ended, see what it says", ""), 75),
    # by its connection, or by the store that its launcher had
    (kill_first, torchrun, ("", "another process ended, see what it says|rank 0 is gone"), 75),
    # there torchrun itself may wait on, for a rendezvous that nobody answers
    (unplug, accelerate, (r"rank 1 \(machine 1\) is gone", "is gone"), 75),
    (unplug, srun, (r"rank 1 \(machine 1\) is gone", "is gone"), 75),
    (stop_second, torchrun, ("checkpoint written", "checkpoint written"), 143),
]


ENDS = [("ddp", *fault) for fault in FAULTS]
ENDS += [("fsdp", *fault) for fault in (FAULTS if life.FULL else FAULTS[3:])]
"""At night all of them for both strategies: who misses whom does not depend on it."""


@pytest.mark.parametrize(("strategy", "fault", "launcher", "lines", "code"), ENDS)
def test_what_ends_one_machine_ends_both_and_the_same_command_goes_on(
    tmp_path, names, strategy, fault, launcher, lines, code
):
    path = write(tmp_path / "run", strategy, **LONG)
    artifact = Artifact(tmp_path / "run" / "sft")
    running = machines.start(names, path, launcher)
    machines.wait_until(lambda: last_step(artifact) > 3, running)
    fault(names, running)
    begun = time.monotonic()
    codes, texts = machines.ends(running)
    assert time.monotonic() - begun < 60, texts
    # a launcher of processes has a code of its own
    assert codes == [code] * 2 if launcher is srun else all(codes), texts
    assert Outcome.read(artifact).code == code
    for text, line in zip(texts, lines, strict=True):
        assert re.search(line, text), text
        assert "Traceback" not in text.partition(LAUNCHER)[0], text
    assert list(artifact.checkpoints.glob("step-*"))
    subprocess.run(["ip", "-n", names[1], "link", "set", "cable", "up"], check=True)
    again = path.with_name("again.yaml")
    again.write_text(path.read_text())
    machines.made(names, again, launcher)
    assert "resuming from step-" in machines.out_of(again, 0).read_text()


def test_a_launcher_that_starts_all_anew_goes_on_from_the_checkpoint(tmp_path, names):
    """torchrun's --max-restarts: the launcher and its store stay, with what was said there."""
    path = write(tmp_path / "run", "ddp", **LONG)
    artifact = Artifact(tmp_path / "run" / "sft")
    options = ("--max_restarts=1", "--monitor_interval=0.5")
    running = machines.start(names, path, torchrun, *options)
    machines.wait_until(lambda: last_step(artifact) > 3, running)
    kill_second(names, running)
    codes, texts = machines.ends(running)
    assert codes == [0, 0], texts
    assert texts[0].count("resuming from step-") == 1
    assert artifact.verify().training.exact_resume


# --- a run directory on each ----------------------------------------------------------------------


def apart(tmp_path, write, *arguments, **settings):
    """A recipe that both machines see, and within what each starts it: what lies in `home`, the run
    among it, the second one has in `other`.
    """
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir(exist_ok=True)
    other.mkdir(exist_ok=True)
    path = write(home / "run", *arguments, **settings).rename(tmp_path / "run.yaml")
    hidden = f'mount --bind {other} {home} && exec "$@"'
    return path, ((), ["unshare", "-m", "sh", "-c", hidden, "-"])


def made_apart(names, path, hides, launcher=torchrun, stage="sft"):
    codes, texts = machines.ends(machines.start(names, path, launcher, stage=stage, hides=hides))
    assert codes == [0, 0], "\n---\n".join(texts)
    artifact = Artifact(path.parent / "home" / "run" / stage)
    assert artifact.verify().hardware["processes"] == 2
    mirror = path.parent / "other" / ".run.mirror"
    assert mirror.exists() and not list(mirror.rglob("manifest.json"))
    assert not (path.parent / "home" / ".run.mirror").exists()
    return artifact


@pytest.mark.parametrize(
    ("launcher", "strategy"), [(torchrun, "fsdp"), (accelerate, "ddp"), (srun, "fsdp")]
)
def test_two_machines_with_a_run_directory_each_are_one(
    tmp_path, names, one_machine, launcher, strategy
):
    """And the first of them says what that means, once."""
    path, hides = apart(tmp_path, write, strategy)
    artifact = made_apart(names, path, hides, launcher)
    assert life.essence(artifact) == life.essence(one_machine[strategy])
    first, second = [machines.out_of(path, number).read_text() for number in (0, 1)]
    assert first.count("is not seen on machine 1: what is made lies here") == 1
    assert "mirror" not in second and "step" not in second, second


APART = [("ddp", kill_second, torchrun), ("fsdp", unplug, srun)]
APART += [("ddp", unplug, srun), ("fsdp", kill_first, torchrun)] if life.FULL else []


@pytest.mark.parametrize(("strategy", "fault", "launcher"), APART)
def test_with_a_run_directory_each_the_same_command_goes_on(
    tmp_path, names, one_machine, strategy, fault, launcher
):
    """Though the second machine has lost what it had."""
    path, hides = apart(tmp_path, write, strategy, **LONG)
    artifact = Artifact(tmp_path / "home" / "run" / "sft")
    running = machines.start(names, path, launcher, hides=hides)
    machines.wait_until(lambda: last_step(artifact) > 3, running)
    fault(names, running)
    begun = time.monotonic()
    codes, texts = machines.ends(running)
    assert time.monotonic() - begun < 60, texts
    assert codes == [75, 75] if launcher is srun else all(codes), texts
    for text in texts:
        assert "Traceback" not in text.partition(LAUNCHER)[0], text
    subprocess.run(["ip", "-n", names[1], "link", "set", "cable", "up"], check=True)
    shutil.rmtree(tmp_path / "other")
    (tmp_path / "other").mkdir()
    again = path.with_name("again.yaml")
    again.write_text(path.read_text())
    artifact = made_apart(names, again, hides, launcher)
    assert "resuming from step-" in machines.out_of(again, 0).read_text()
    assert artifact.manifest().training.exact_resume


def test_ppo_with_a_run_directory_each_is_ppo_on_one(tmp_path, names):
    settings = LONGER | {"launch__processes": "auto", "optim__steps": 3}
    (tmp_path / "one").mkdir()
    alone = life.pair(write_ppo(tmp_path / "one" / "run", **settings))
    path, hides = apart(tmp_path, write_ppo, **settings)
    together = made_apart(names, path, hides, stage="ppo")
    assert life.essence(together) == life.essence(alone)


# --- names and addresses --------------------------------------------------------------------------


def test_a_first_machine_that_is_127_0_1_1_to_itself(tmp_path, names):
    """As Debian writes the own name of a machine into its hosts; the second one knows better."""
    hides = []
    for number, address in enumerate(("127.0.1.1", machines.ADDRESSES[0])):
        hosts = tmp_path / f"hosts{number}"
        hosts.write_text(f"127.0.0.1 localhost\n{address} node1\n")
        hidden = f'mount --bind {hosts} /etc/hosts && exec "$@"'
        hides.append(["unshare", "-m", "sh", "-c", hidden, "-"])

    def named(number):
        return [word.replace(f"={machines.ADDRESSES[0]}", "=node1") for word in srun(number)]

    path = write(tmp_path / "run", "ddp", optim__steps=2)
    codes, texts = machines.ends(machines.start(names, path, named, hides=hides))
    assert codes == [0, 0], texts


def test_ppo_on_two_machines_is_ppo_on_one(tmp_path, names):
    """Each draws its share of the answers; the gradients are added up over the cable."""
    settings = LONGER | {"launch__processes": "auto", "optim__steps": 3}
    (tmp_path / "one").mkdir()
    alone = life.pair(write_ppo(tmp_path / "one" / "run", **settings))
    together = machines.made(names, write_ppo(tmp_path / "run", **settings), stage="ppo")
    assert life.essence(together) == life.essence(alone)
