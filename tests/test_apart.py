"""Two machines with a run directory each: the first one's is the truth, and what comes of it is
what comes of one that both see.

They are processes of this machine, whose runs lie in two places; test_two_machines.py has a cable
between them.
"""

import os
import re
import shutil
import signal
import time

import pytest

from llmpipe.errors import LOST
from llmpipe.run.artifact import MANIFEST, Artifact, artifacts, mirror_of
from llmpipe.run.outcome import Outcome
from tests import life
from tests.rl.test_ppo import LONGER
from tests.rl.test_ppo import write as write_ppo
from tests.training.test_sharded import ADAPTER, assert_alike, straight, write

__all__ = ["straight"]  # what two processes make that see one run, in parts

SENT = "mirrored: "
PPO = LONGER | {"launch__processes": "auto", "optim__steps": 3, "checkpoint__every": 2}


SHORT = {"optim__steps": 3, "checkpoint__every": 2}


def nodes(tmp_path, strategy="fsdp", stage="sft", **changes):
    """The same recipe for two machines; its run lies in another place on each."""
    homes = [tmp_path / "node0", tmp_path / "node1"]
    for home in homes:
        home.mkdir(exist_ok=True)
    if stage == "ppo":
        settings = PPO | {"launch__strategy": strategy} | changes
        return [write_ppo(home / "run", **settings) for home in homes]
    return [write(home / "run", strategy, stage, **changes) for home in homes]


def run_of(path):
    return path.parent / "run"


def made(paths, stage="sft", each=1):
    """What they make of it, verified; the second machine has a mirror alone, which nobody takes for
    a run of its own."""
    for code, text in life.apart(paths, each=each):
        assert code == 0, text
    artifact = Artifact(run_of(paths[0]) / stage)
    assert artifact.verify().hardware["processes"] == 2 * each
    assert not run_of(paths[1]).exists()
    mirror = mirror_of(run_of(paths[1]))
    assert not (mirror / stage).exists(), "it is published, and nobody reads it there any more"
    for copied in artifacts(mirror):
        theirs = Artifact(artifact.run / copied.name)
        assert copied.verify() == theirs.verify() and not copied.steps
    return artifact


def said(paths, rank=0):
    return paths[rank].with_suffix(f".{rank}.out").read_text()


def test_what_is_made_is_what_one_run_holds(tmp_path, straight):
    paths = nodes(tmp_path)
    assert life.essence(made(paths)) == life.essence(straight)
    machine = f"{run_of(paths[0])}: is not seen on machine 1: what is made lies here"
    assert said(paths).count(machine) == 1 and said(paths).count(SENT) == 1
    assert "mirror" not in said(paths, 1) and "step" not in said(paths, 1), "once, by the first"
    before = said(paths)
    assert [code for code, _ in life.apart(paths)] == [0, 0]
    assert "skip: finished" in said(paths).removeprefix(before)


STAGES = [
    ("sft", "ddp", {}),
    ("pretrain", "fsdp", {}),  # the weights that are drawn lie in a file
    ("dpo", "ddp", {}),
    ("dpo", "fsdp", {}),
    ("dpo", "ddp", {"precompute": True}),
    ("lora", "ddp", {}),
    ("lora", "fsdp", {}),
    ("ppo", "ddp", {}),
    ("ppo", "fsdp", {}),
]


@pytest.mark.faults
@pytest.mark.parametrize(("stage", "strategy", "changes"), STAGES)
def test_every_kind_of_stage_is_what_one_run_holds(tmp_path, stage, strategy, changes):
    if stage != "ppo":
        changes = changes | SHORT
    artifact = made(nodes(tmp_path, strategy, stage, **changes), stage)
    if stage == "ppo":
        settings = PPO | {"launch__strategy": strategy} | changes
        one = life.pair(write_ppo(tmp_path / "one", **settings))
    else:
        one = life.pair(write(tmp_path / "one", strategy, stage, **changes))
        assert_alike(artifact, one)
    assert life.essence(artifact) == life.essence(one)


@pytest.mark.faults
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_parent_is_sent_whole_and_an_adapter_with_its_base(tmp_path, strategy):
    for run in (tmp_path / "one", None):
        for stage, changes in (
            ("sft", SHORT),
            ("lora", {"model": "artifact:sft"} | SHORT),
            ("dpo", {"model": "artifact:lora"} | SHORT | ADAPTER),
        ):
            if run:
                one = life.pair(write(run, strategy, stage, **changes))
            else:
                paths = nodes(tmp_path, strategy, stage, **changes)
                artifact = made(paths, stage)
    mirror = mirror_of(run_of(paths[1]))
    assert {each.name for each in artifacts(mirror)} == {"sft", "lora"}
    assert life.essence(artifact) == life.essence(one)


@pytest.mark.faults
def test_the_best_step_is_sent_to_go_back_to(tmp_path):
    changes = {"evaluation": {"every": 3, "keep_best": True}, "optim__learning_rate": 3e-2}
    artifact = made(nodes(tmp_path, **changes))
    assert artifact.manifest().training.published_step < 12
    assert life.essence(artifact) == life.essence(life.pair(write(tmp_path / "one", **changes)))


@pytest.mark.faults
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp"])
def test_two_processes_on_each(tmp_path, strategy):
    """One of them keeps the mirror of both."""
    artifact = made(nodes(tmp_path, strategy, **SHORT), each=2)
    if strategy == "hsdp":
        assert artifact.manifest().hardware["copies"] == 2
        return
    path = write(tmp_path / "one", strategy, **SHORT)
    assert [code for code, _ in life.ranks(path, hooks=[None] * 4)] == [0] * 4
    assert life.essence(artifact) == life.essence(Artifact(tmp_path / "one" / "sft"))


# --- what is lost, and goes on --------------------------------------------------------------------


def stays(mirror):
    """Its own part lies there still."""
    (checkpoint,) = (mirror / "sft" / "checkpoints").glob("step-*")
    assert list(checkpoint.rglob("shard-00002-*")) and not list(checkpoint.rglob("shard-00001-*"))


def is_gone(mirror):
    """Another machine is in its place."""
    shutil.rmtree(mirror)


def is_damaged(mirror):
    """A bit of its part of the checkpoint, and one of the rows; and what it begins with is cut."""
    for path in (*mirror.rglob("shard-00002-*"), *mirror.rglob("train.arrow")):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    os.truncate(mirror / "sft" / "plan.json", 100)


def is_of_another_run(mirror):
    """Rank 0's was begun anew meanwhile, and made other steps."""
    home = mirror / "sft" / "checkpoints"
    (checkpoint,) = home.glob("step-*")
    for step in (9, 12):
        shutil.copytree(checkpoint, home / f"step-{step}")
    (mirror / "sft" / "model").mkdir()
    (mirror / "sft" / MANIFEST).write_text("{}")


MIRRORS = [stays, is_damaged] + [life.by_the_dozen(each) for each in (is_gone, is_of_another_run)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Both machines after the second one was killed behind its sixth step, and the first ended."""
    paths = nodes(tmp_path_factory.mktemp("killed"))
    ends = life.apart(paths, hooks=(None, "kill_after_checkpoint_6"))
    assert ends[1][0] == -signal.SIGKILL and ends[0][0] in (1, LOST), ends
    assert Artifact(run_of(paths[0]) / "sft").steps[-1] == 6
    return paths


@pytest.mark.parametrize("what", MIRRORS)
def test_what_was_killed_goes_on_whatever_became_of_the_mirror(tmp_path, killed, straight, what):
    paths = nodes(tmp_path)
    runs = [run_of(path) for path in killed]
    shutil.copytree(runs[0], run_of(paths[0]))
    shutil.copytree(mirror_of(runs[1]), mirror_of(run_of(paths[1])))
    what(mirror_of(run_of(paths[1])))
    artifact = made(paths)
    assert "resuming from step-6" in said(paths)
    assert artifact.manifest().training.exact_resume
    assert life.essence(artifact) == life.essence(straight)


@pytest.mark.faults
def test_a_checkpoint_that_is_damaged_at_rank_0_is_named_and_an_older_one_taken(
    tmp_path, killed, straight
):
    """Also where the damage is in a part that rank 0 does not read itself."""
    paths = nodes(tmp_path)
    shutil.copytree(run_of(killed[0]), run_of(paths[0]))
    (part,) = (run_of(paths[0]) / "sft" / "checkpoints" / "step-6").rglob("shard-00002-*")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    artifact = made(paths)
    assert "checkpoint step-6 is damaged (sharded/shard-00002" in said(paths)
    assert "resuming from step-3" in said(paths)
    assert life.essence(artifact) == life.essence(straight)


@pytest.mark.faults
@pytest.mark.parametrize("number", [1, 12, 15])  # of the rows, the plan, the saved model
def test_a_kill_in_the_middle_of_a_transfer_leaves_no_trace(tmp_path, straight, number):
    paths = nodes(tmp_path)
    began = time.monotonic()
    ends = life.apart(paths, hooks=("miss_after_10", f"kill_at_arrival_{number}"))
    assert time.monotonic() - began < 60
    assert ends[1][0] == -signal.SIGKILL and ends[0][0] == LOST, ends
    assert "Traceback" not in ends[0][1]
    assert life.essence(made(paths)) == life.essence(straight)


FULL = [
    # where, at which file that arrives there, what the first machine says
    (1, 2, r"error: machine 1: .*No space left on device"),
    (1, 15, r"error: machine 1: .*No space left on device"),
    (0, 3, r"error: /.*No space left on device"),
]


@pytest.mark.faults
@pytest.mark.parametrize(("rank", "number", "line"), FULL)
def test_a_disk_that_fills_up_ends_both_with_5(tmp_path, straight, rank, number, line):
    """The second one's, with what it is sent; the first one's, with parts of a checkpoint."""
    paths = nodes(tmp_path)
    hooks = [None, None]
    hooks[rank] = f"full_at_arrival_{number}"
    ends = life.apart(paths, hooks=hooks)
    assert [code for code, _ in ends] == [5, 5], ends
    assert re.search(line, ends[0][1]) and "Traceback" not in ends[0][1], ends
    artifact = Artifact(run_of(paths[0]) / "sft")
    assert artifact.steps == ([3] if rank == 0 else artifact.steps)
    assert number == 2 or Outcome.read(artifact).code == 5
    assert life.essence(made(paths)) == life.essence(straight)


@pytest.mark.faults
def test_what_one_fails_of_the_other_says(tmp_path):
    """Though none sees the other's files."""
    paths = nodes(tmp_path)
    lost, failed = life.apart(paths, hooks=(None, "bug_in_step_4"))
    line = "a bug: KeyError: 'forgotten'"
    assert failed[0] == 1 and f"error: {line}" in failed[1], failed
    assert lost[0] == 1 and f"error: another process ended first: {line}" in lost[1], lost
    assert Outcome.read(Artifact(run_of(paths[0]) / "sft")).message == line


# --- who was the first one ------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [life.by_the_dozen(False), True])
def test_another_machine_that_is_the_first_one_does_not_begin_anew(
    tmp_path, killed, straight, lost
):
    """The run lies with the one that was; where that is lost, too, a mirror tells of it."""
    paths = nodes(tmp_path)
    was_first = run_of(paths[1])
    shutil.copytree(mirror_of(run_of(killed[1])), mirror_of(run_of(paths[0])))
    if not lost:
        shutil.copytree(run_of(killed[0]), was_first)
    line = "sft: a checkpoint of step 6 is known of here, and rank 0's run has none"
    for _ in range(2):
        ends = life.apart(paths)
        assert [code for code, _ in ends] == [3, 3], ends
        assert line in ends[0][1] and "error" not in ends[1][1], ends
    if lost:
        ends = life.apart(paths, fresh=True)
        assert [code for code, _ in ends] == [0, 0], ends
        return
    shutil.rmtree(run_of(paths[0]), ignore_errors=True)
    shutil.copytree(was_first, run_of(paths[0]))
    shutil.rmtree(was_first)
    artifact = made(paths)
    assert "resuming from step-6" in said(paths)
    assert life.essence(artifact) == life.essence(straight)


# --- what nobody sends ----------------------------------------------------------------------------


def test_a_model_outside_of_the_run_has_to_be_there_and_the_same(tmp_path):
    """The ways that lead there are those of rank 0."""
    paths = nodes(tmp_path, model=str(tmp_path / "node0" / "base"), optim__steps=1)
    bases = [path.parent / "base" for path in paths]
    shutil.copytree(life.TINY / "model", bases[0])
    ends = life.apart(paths)
    assert [code for code, _ in ends] == [2, 2], ends
    assert "base: is not on machine 1, and lies outside the run" in ends[0][1], ends
    assert "error" not in ends[1][1]
    shutil.copytree(life.TINY / "model", bases[1])
    config = bases[1] / "generation_config.json"
    config.write_text(config.read_text() + "\n")
    ends = life.apart(paths)
    assert [code for code, _ in ends] == [3, 3], ends
    assert "base: is another one on machine 1 than at rank 0" in ends[0][1], ends
    shutil.copy(bases[0] / "generation_config.json", config)
    made(paths)


@pytest.mark.faults
def test_a_mistake_that_the_first_one_finds_ahead_is_not_waited_for(tmp_path):
    """The second one looks at no rows: it need not have them."""
    paths = nodes(tmp_path, data__train=[{"path": str(tmp_path / "none.jsonl")}])
    began = time.monotonic()
    ends = life.apart(paths)
    assert [code for code, _ in ends] == [2, 2] and time.monotonic() - began < 60, ends
    assert "none.jsonl: no such file" in ends[0][1] and "none.jsonl" not in ends[1][1], ends
