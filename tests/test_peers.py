"""Processes of one launch find one another, and nobody else, and miss one that is gone."""

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from torch.distributed import HashStore, TCPStore

from llmpipe import peers
from llmpipe.errors import LOST, UserError
from llmpipe.front.launch import free_port
from llmpipe.run.outcome import Outcome


@pytest.fixture
def store():
    """What killed processes of another start left, of which rank 1 had heard rank 0."""
    store = HashStore()
    store.set("word", json.dumps({"launch": "old", "answers": {"1": "one", "2": "two"}}))
    store.set("ask/1", "one old")
    store.set("ask/2", "two")
    return store


def soon(seconds):
    Event().wait(0.001)


def never(seconds):
    """What would be waited for does not come."""


@pytest.mark.parametrize("processes", [2, 5])
def test_all_hear_the_word_of_their_launch(store, processes):
    """Also where a launcher has started all of them anew, and keeps its store."""
    for _ in range(2):
        with ThreadPoolExecutor(processes) as pool:
            first = pool.submit(peers._answer, store, processes, soon)
            others = [pool.submit(peers._ask, store, rank, soon) for rank in range(1, processes)]
            launch = first.result()
            assert launch != "old" and {other.result() for other in others} == {launch}


def test_a_word_of_another_launch_is_never_believed(store):
    with pytest.raises(UserError, match="not all of") as refused:
        peers._ask(store, 1, never)
    assert refused.value.code == 75


def test_rank_0_does_not_go_on_before_all_have_heard(store):
    with pytest.raises(UserError, match="not all of"):
        peers._answer(store, 3, never)


def test_rank_0_that_dies_at_any_word_is_missed_with_the_same_line(monkeypatch):
    """Whoever holds the store may be gone when one says, hears, or begins to watch."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    port = free_port()
    held = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    ours = peers.Peers(TCPStore("127.0.0.1", port, is_master=False), "now")
    ours.say("early", "heard")
    monkeypatch.setattr(type(ours.store), "clone", lambda store: store)  # it was there a moment ago
    del held
    for act in (lambda: ours.hear("late", of=0), lambda: ours.say("late", "lost"), ours.watch):
        with pytest.raises(UserError, match="rank 0 is gone: its store has closed") as refused:
            act()
        assert refused.value.code == LOST


class Clones(HashStore):
    """A store that this process alone has."""

    def clone(self):
        return self


@pytest.fixture
def watching(monkeypatch):
    """Makes the watch of a rank of two, which looks when it is told to."""

    def watch(rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        launch = peers.Peers(Clones(), "this")
        launch.store = Clones()
        for other in (0, 1):
            launch.store.set(f"machine/{other}", str(other))
        return peers._Watch(launch, Event(), pytest.fail), launch.store

    return watch


@pytest.mark.parametrize("rank", [0, 1])
def test_who_is_not_heard_of_is_gone(watching, rank):
    watch, store = watching(rank)
    other = 1 - rank
    for _ in range(3):
        assert watch._look() is None
        store.add(f"beat/{other}", 1)
    looks = [watch._look() for _ in range(peers.SILENCE + 1)]
    assert set(looks[:-1]) == {None}
    silence = "nothing was heard of it for 30 seconds"
    assert looks[-1] == (f"rank {other} (machine {other}) is gone: {silence}", LOST)


def test_others_hear_from_rank_0_who_is_gone(watching):
    watch, store = watching(1)
    assert watch._look() is None
    store.set("gone", json.dumps(peers.Loss("rank 2 has ended with 4", 4)))
    assert watch._look() == ("rank 2 has ended with 4", 4)


def test_who_is_done_is_not_missed(watching):
    watch, store = watching(0)
    store.set("left/1", "0")
    assert {watch._look() for _ in range(100)} == {None}
    assert watch.others == []


def test_who_has_failed_is_given_time_for_others_to_say_so(watching):
    watch, store = watching(0)
    store.set("left/1", "4")
    looks = [watch._look() for _ in range(1 + peers.LAST_WORDS)]
    assert looks[:-1] == [None] * peers.LAST_WORDS
    assert looks[-1] == ("rank 1 (machine 1) has ended with 4", 4)
    assert peers.Loss(*json.loads(store.get("gone"))) == looks[-1]


def test_a_store_that_does_not_answer_ends_the_process(monkeypatch, watching):
    monkeypatch.setattr(peers, "EVERY", 0.001)
    watch, _ = watching(1)
    ended = []
    watch.end = ended.append
    monkeypatch.setattr(watch, "_listen", lambda: Event().wait(0.5))
    watch.run()
    assert ended == [("the machine of rank 0 is gone: its store does not answer", LOST)]


@pytest.mark.parametrize(("left", "code"), [("4", 4), ("0", LOST)])
def test_who_ends_before_it_says_a_word_is_not_waited_for(watching, left, code):
    """With its exit code: what fails again is not called what may go on."""
    watch, store = watching(1)
    store.set("left/0", left)
    with pytest.raises(UserError, match=f"rank 0 has ended with {left}") as ended:
        watch.peers.hear("word", of=0)
    assert ended.value.code == code


@pytest.mark.parametrize("first", [None, 4])
def test_an_end_for_want_of_another_has_the_code_of_the_first(monkeypatch, capsys, first):
    """As what is still to be written has it, or else what was heard."""
    ended = []
    monkeypatch.setattr(peers.os, "_exit", ended.append)
    launch = peers.Peers(HashStore(), "this")
    if first:
        launch.before_exit = lambda outcome: Outcome(first, "the loss is nan")
    launch._end(peers.Loss("rank 1 is gone"))
    launch._end(peers.Loss("rank 1 has ended with 5", 5))
    assert ended == [first or LOST, first or 5]
    assert "error: rank 1 is gone, and others cannot go on alone" in capsys.readouterr().err
