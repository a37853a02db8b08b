"""Of several processes the first failure is shown: not who lost it, nor who was stopped for it."""

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from llmpipe.errors import DONE, INTEGRITY, NUMERIC, RESOURCES, SIGTERM, UserError
from llmpipe.run.artifact import Artifact
from llmpipe.run.ends import End, clear_ends, read_ends, reported, verdict, write_end
from llmpipe.run.outcome import Outcome

NAN = Outcome(NUMERIC, "the loss is nan")
MEMORY = Outcome(RESOURCES, "out of memory", "lower it")
BUG = Outcome(1, "a bug: KeyError", None, "bug")
PEER = Outcome(RESOURCES, "another process ended", None, "peer")
STOPPED = Outcome(SIGTERM, "stopped")
DRIFT = Outcome(INTEGRITY, "altered")


def of(*ends, statuses=None, stopped=False):
    """The verdict on ends of (rank, outcome), in the order of time."""
    known = [End(rank, at, outcome) for at, (rank, outcome) in enumerate(ends)]
    return verdict(known, statuses or {}, remedy="lower it", stopped=stopped)


@pytest.mark.parametrize(
    ("ends", "first"),
    [
        ([(0, PEER), (1, MEMORY)], MEMORY),
        ([(1, MEMORY), (0, NAN)], MEMORY),
        ([(0, NAN), (1, MEMORY)], NAN),
        ([(0, BUG), (1, DRIFT)], DRIFT),
        ([(0, PEER), (1, BUG)], BUG),
        ([(0, STOPPED), (1, PEER)], PEER),
        ([(0, STOPPED), (1, BUG)], BUG),
        ([(0, STOPPED), (1, STOPPED)], STOPPED),
        ([(1, BUG), (0, Outcome(DONE))], Outcome(DONE)),
        ([(1, Outcome(DONE)), (0, NAN)], NAN),
        ([], None),
    ],
)
def test_the_first_failure_wins(ends, first):
    assert of(*ends) == first


@pytest.mark.parametrize("other", [PEER, BUG, STOPPED])
def test_a_killed_process_wins_over_what_others_say_of_it(other):
    killed = of((0, other), statuses={0: 1, 1: -9})
    assert (killed.code, killed.message) == (
        RESOURCES,
        "rank 1 was killed (SIGKILL), most likely for want of memory",
    )
    assert killed.hint == "lower it"


def test_a_mistake_wins_over_a_kill_and_over_a_stop():
    assert of((0, NAN), statuses={1: -9}) == NAN
    assert of((0, STOPPED), (1, NAN), stopped=True) == NAN


def test_who_is_stopped_by_a_person_is_stopped():
    assert of((0, STOPPED), (1, PEER), stopped=True) == STOPPED
    assert of((1, BUG), (0, STOPPED), stopped=True) == STOPPED


def test_deaths_of_other_signals_and_statuses_without_a_word():
    died = of((0, PEER), statuses={1: -11})
    assert (died.code, died.message) == (1, "rank 1 died of signal SIGSEGV")
    assert of((0, PEER), statuses={1: 5}).message == "rank 1 ended with status 5"
    assert of((0, PEER), statuses={1: -15}) == PEER  # its launcher ended it


def test_only_ends_of_this_launch_are_read(tmp_path):
    artifact = Artifact(tmp_path / "sft")
    (tmp_path / ".locks").mkdir()
    write_end(artifact, "earlier", 0, NAN)
    write_end(artifact, "this", 1, PEER)
    (tmp_path / ".locks" / "sft.2.end").write_text('{"launch": "this", "code": ')
    assert [(end.rank, end.outcome) for end in read_ends(artifact, "this", 3)] == [(1, PEER)]
    said = [{"launch": name, "rank": 0, "at": 1.0, "code": 4} for name in ("this", "earlier")]
    heard = read_ends(artifact, "this", 3, said)
    assert [(end.rank, end.outcome.code) for end in heard] == [(1, 5), (0, 4)]
    clear_ends(artifact, 3)
    assert not list((tmp_path / ".locks").iterdir())


def test_what_torchrun_reports_is_read():
    """The canary: torchrun's own words for two processes that failed."""
    failures = {
        0: ProcessFailure(local_rank=0, pid=11, exitcode=5, error_file="<N/A>"),
        1: ProcessFailure(local_rank=1, pid=12, exitcode=-9, error_file="<N/A>"),
    }
    text = f"something before\n{ChildFailedError('llmpipe', failures)}\nand behind"
    assert reported(text) == {0: 5, 1: -9}
    assert reported("rank 1 (local_rank") == {}


def test_an_outcome_of_another_launch_is_none(tmp_path):
    artifact = Artifact(tmp_path)
    Outcome.of(UserError("no", None, NUMERIC)).write(artifact, "earlier")
    assert Outcome.read(artifact, "this") is None
    assert Outcome.read(artifact, "earlier") == Outcome.read(artifact) == Outcome(NUMERIC, "no")
    BUG.write(artifact)
    assert Outcome.read(artifact) == BUG
