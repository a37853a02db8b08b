"""Under an outside launcher the processes of one launch find one another, and nobody else."""

import time

import pytest

from llmpipe.errors import UserError
from llmpipe.front import outside
from llmpipe.run.artifact import Artifact
from llmpipe.run.ends import write_end
from llmpipe.run.lock import Lock
from llmpipe.run.outcome import Outcome
from tests import life


@pytest.fixture
def artifact(tmp_path):
    (tmp_path / ".locks").mkdir()
    return Artifact(tmp_path / "sft")


def soon():
    """A `sleep` that gives up after a while: nothing may wait for ever."""
    deadline = time.monotonic() + 20

    def sleep(seconds):
        assert time.monotonic() < deadline
        time.sleep(0.001)

    return sleep


def test_others_end_as_rank_0_does_and_it_alone_says_why(tmp_path):
    """Before there is anything to train: here another command is at work."""
    path = life.write(tmp_path / "run", launch__processes="auto")
    with Lock(Artifact(tmp_path / "run" / "sft")).acquire():
        first, second = life.ranks(path)
    assert first[0] == second[0] == 75, (first, second)
    assert "busy" in first[1] and second[1] == ""


def test_one_that_lost_another_says_what_that_one_says(artifact, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    lost = Outcome(5, "another process ended", None, "peer")
    turn = outside.Turn(None)
    turn.launch = "this"
    assert outside.who_was_lost(artifact, turn, lost, soon()) == lost
    write_end(artifact, "other", 1, Outcome(4, "of an earlier launch"))
    assert outside.who_was_lost(artifact, turn, lost, soon()) == lost
    write_end(artifact, "this", 1, Outcome.of(UserError("out of memory", "lower it", 5)))
    known = outside.who_was_lost(artifact, turn, lost, soon())
    assert known == Outcome(5, "another process ended first: out of memory", "lower it", "peer")


def test_a_rank_that_is_lost_is_said_by_the_other(tmp_path):
    """Rank 1 fails before it gives its gradients: its own line and code, and rank 0 names them."""
    path = life.write(tmp_path / "run", launch__processes="auto")
    lost, failed = life.ranks(path, hooks=(None, "bug_in_step_4"))
    line = "a bug: KeyError: 'forgotten'"
    assert failed[0] == 1 and f"error: {line}" in failed[1], failed
    assert lost[0] == 1 and f"error: another process ended first: {line}" in lost[1], lost
    outcome = Outcome.read(Artifact(tmp_path / "run" / "sft"))
    assert (outcome.code, outcome.message) == (1, line)


LOST = [
    ((None, "kill_once_met"), "rank 1 is gone: nothing was heard of it for 10 seconds"),
    (("miss_after_10", "stop_in_step_4"), "rank 1 is gone: nothing was heard of it for 10 seconds"),
    (("stop_in_step_4", "miss_after_10"), "rank 0 is gone: its store does not answer"),
]


@pytest.mark.faults
@pytest.mark.parametrize(("hooks", "line"), LOST, ids=lambda value: str(value[0]))
def test_one_machine_without_a_launcher_ends_when_a_process_is_gone(tmp_path, hooks, line):
    """As under srun, which leaves the others alone: before there is a group, and in a step."""
    path = life.write(tmp_path / "run", launch__processes="auto")
    hooks = [hook or "miss_after_10" for hook in hooks]
    survivor = hooks.index("miss_after_10")
    processes = life.started(path, hooks=hooks)
    try:
        processes[survivor].join(90)
        assert processes[survivor].exitcode == 75
    finally:
        for process in processes:
            process.kill()
    text = path.with_suffix(f".{survivor}.out").read_text()
    assert line in text and "Traceback" not in text, text
    outcome = Outcome.read(Artifact(tmp_path / "run" / "sft"))
    assert outcome.code == 75 and line in outcome.message
    for code, text in life.ranks(path):
        assert code == 0, text


def test_who_waits_for_the_first_one_ends_with_it(tmp_path):
    """It waits as long as rows are prepared; a first one that is killed is not waited for."""
    path = life.write(tmp_path / "run", launch__processes="auto")
    killed, waiting = life.ranks(path, hooks=("kill_once_met", None))
    assert killed[0] == -9
    assert waiting[0] == 75 and "error: rank 0 is gone: its store has closed" in waiting[1]


def test_tokens_are_summed_over_ranks(tmp_path):
    """As one process counts them, in an epoch that fillers even out, and gone on from a stop."""
    settings = {"optim__epochs": 2, "optim__steps": None, "launch__processes": "auto"}
    alone = life.command(life.write(tmp_path / "alone", **settings)).verify()
    path = life.write(tmp_path / "run", **settings)
    stopped = life.ranks(path, hooks=(None, "term_in_step_5"))
    assert [code for code, _ in stopped] == [143, 143], stopped
    together = life.pair(path).verify()
    assert together.training.tokens == alone.training.tokens
    assert alone.training.tokens == 2 * alone.data.tokens.train
