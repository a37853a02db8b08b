"""Under an outside launcher the processes of one launch find one another, and nobody else."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmpipe.errors import UserError
from llmpipe.files import write_json
from llmpipe.front import outside
from llmpipe.front.outside import Ask, Word
from llmpipe.run.artifact import Artifact
from llmpipe.run.ends import write_end
from llmpipe.run.outcome import Outcome
from tests import life


@pytest.fixture
def artifact(tmp_path):
    (tmp_path / ".locks").mkdir()
    return Artifact(tmp_path / "sft")


class Waited(Exception):
    """It would wait on."""


def once(seconds):
    raise Waited


def soon():
    """A `sleep` that gives up after a while: nothing may wait for ever."""
    deadline = time.monotonic() + 20

    def sleep(seconds):
        assert time.monotonic() < deadline
        time.sleep(0.001)

    return sleep


def together(artifact, processes, action="train"):
    """(rank 0's launch, what the others were told), of as many threads as processes."""
    with ThreadPoolExecutor(processes) as pool:
        others = [
            pool.submit(outside.wait_for_word, artifact, rank, soon())
            for rank in range(1, processes)
        ]
        first = pool.submit(outside.give_word, artifact, action, processes, soon())
        return first.result(), [other.result() for other in others]


def leave_another_launch(artifact):
    """What killed processes of another launch left, of which rank 1 had heard rank 0."""
    old = Word(launch="old", action="skip", answers={1: "one", 2: "two"})
    old.to_file(outside.word_path(artifact))
    Ask(word="one", heard="old").to_file(outside.ask_path(artifact, 1))
    Ask(word="two").to_file(outside.ask_path(artifact, 2))


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_all_hear_the_word_of_their_launch(artifact, processes):
    leave_another_launch(artifact)
    launch, words = together(artifact, processes)
    assert [(word.launch, word.action) for word in words] == [(launch, "train")] * (processes - 1)
    again, words = together(artifact, processes, "skip")
    assert again != launch and {word.action for word in words} <= {"skip"}
    if processes == 5:
        assert not list((artifact.run / ".locks").iterdir())


def test_a_word_of_another_launch_is_never_believed(artifact):
    leave_another_launch(artifact)
    with pytest.raises(Waited):
        outside.wait_for_word(artifact, 1, once)


def test_rank_0_does_not_go_on_before_all_have_heard(artifact):
    leave_another_launch(artifact)
    with pytest.raises(Waited):
        outside.give_word(artifact, "train", 3, once)


def test_the_word_of_an_older_version_is_none(artifact):
    old = {"action": "train", "host": "here", "parent": "1 1", "time": time.time()}
    write_json(outside.word_path(artifact), old)
    _, words = together(artifact, 2)
    assert words[0].action == "train"


def test_one_that_lost_another_says_what_that_one_says(artifact, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    lost = Outcome(5, "another process ended", None, "peer")
    assert outside.who_was_lost(artifact, "this", lost, soon()) == lost
    write_end(artifact, "other", 1, Outcome(4, "of an earlier launch"))
    assert outside.who_was_lost(artifact, "this", lost, soon()) == lost
    write_end(artifact, "this", 1, Outcome.of(UserError("out of memory", "lower it", 5)))
    known = outside.who_was_lost(artifact, "this", lost, soon())
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
