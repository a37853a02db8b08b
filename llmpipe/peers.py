"""The other processes of a launch: how they find one another, and miss one that is gone.

They speak through torch's store, which lies with the launcher or with rank 0, before there is a
process group and beside it. A launcher that starts its processes anew keeps its store, with what
the processes before have left there. So each one asks with a word that nobody else has, and
believes who answers with it; rank 0 goes on when all have heard its own, the word of this launch,
under which all else is said.

Where they are on several machines, each is heard of every second. A machine without power, or
behind a broken cable, closes no connection: who waits for it in a collective would wait for that
one's timeout, which has to be long. Who is not heard of for `SILENCE` is gone, and the others end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from threading import Event, Thread
from typing import Any

from torch.distributed import DistError, PrefixStore, Store, rendezvous

from llmpipe.errors import DONE, LOST, UserError
from llmpipe.run.ends import GO_ON
from llmpipe.run.machine import machine_rank, on_several_machines, rank, world_size
from llmpipe.run.outcome import Outcome, new_launch

PAUSE = 0.1
"""Seconds between two looks at the store."""
ARRIVAL = 600
"""Seconds in which all processes of a launch have to come."""
EVERY = 1.0
"""Seconds between two signs of life."""
SILENCE = 30
"""Times that nothing new is heard of a process until it is gone."""
CLOSED = "its store has closed"
LAST_WORDS = 5
"""Times more for one that said that it ends: the others may be about to say why themselves."""


class Peers:
    """The processes of this launch, which have all come."""

    def __init__(self, store: Store, launch: str):
        self.launch = launch
        """The word of this launch."""
        self.store = PrefixStore(launch, store)
        self.before_exit: Callable[[Outcome], None] = lambda _: None
        """What is still to be written where others are gone."""
        self._left = Event()
        self._turns = 0

    def turn(self) -> str:
        """A word for what all of them do next, and for nothing else."""
        self._turns += 1
        return f"{self.launch}.{self._turns}"

    def say(self, key: str, text: str) -> None:
        self.store.set(key, text)

    def hear(self, key: str, of: int) -> str:
        """What a rank says under a key, as soon as it does: however long that takes.

        Raises UserError (75) where it ends before.
        """
        try:
            while not self.store.check([key]):
                if self.store.check([_left(of)]) and not self.store.check([key]):
                    problem = f"rank {of} has ended with {_text(self.store, _left(of))}"
                    raise UserError(f"{problem}, see what it says", GO_ON, LOST)
                time.sleep(PAUSE)
            return _text(self.store, key)
        except DistError as error:
            raise UserError(f"rank 0 is gone: {CLOSED}", GO_ON, LOST) from error

    def gather(self, key: str, text: str) -> list[str]:
        """What every process says under a key, in the order of ranks, once all have said it."""
        self.say(f"{key}/{rank()}", text)
        return [self.hear(f"{key}/{number}", number) for number in range(world_size())]

    def watch(self) -> None:
        """Give signs of life from now on, and end where another process gives none."""
        self.store.add(_beat(rank()), 1)
        self.gather("machine", machine_rank())
        Thread(target=_Watch(self, self._left, self._end).run, daemon=True).start()

    def leave(self, code: int, last: bool) -> None:
        """Say that this process ends, and how. `last`: let others hear what the first one has said,
        who may hold the store.
        """
        if self._left.is_set():
            return
        self._left.set()
        _briefly(lambda: self._farewell(code, last))

    def _farewell(self, code: int, last: bool) -> None:
        self.say(_left(rank()), str(code))
        if rank() == 0 and last:
            for other in range(1, world_size()):
                self.hear(_left(other), other)

    def _end(self, who: str) -> None:
        """End this process: it may wait in a collective for one that never comes."""
        outcome = Outcome(LOST, f"{who}, and others cannot go on alone", GO_ON, "peer")
        print(f"error: {outcome.message}\n  {outcome.hint}", file=sys.stderr, flush=True)
        _briefly(lambda: self.before_exit(outcome))
        os._exit(LOST)


class _Watch:
    """Rank 0 hears of all; the others hear of rank 0, and from it of others that are gone."""

    def __init__(self, peers: Peers, left: Event, end: Callable[[str], None]):
        self.peers = peers
        self.left = left
        self.end = end
        self.store = peers.store.clone()  # a store takes one question at a time
        self.others = list(range(1, world_size())) if rank() == 0 else [0]
        self.last: dict[int, bytes] = {}
        self.silent = dict.fromkeys(self.others, 0)
        self.rounds = 0
        self.gone = ""

    def run(self) -> None:
        """Look whether something new was heard, and whether the store has answered at all."""
        Thread(target=self._listen, daemon=True).start()
        rounds, unanswered = 0, 0
        # times are counted, not seconds: this process may have been stopped, and go on
        while not self.left.wait(EVERY) and not self.gone and unanswered < SILENCE:
            unanswered = unanswered + 1 if self.rounds == rounds else 0
            rounds = self.rounds
        if not self.left.is_set():
            self.end(self.gone or "the machine of rank 0 is gone: its store does not answer")

    def _listen(self) -> None:
        while not self.left.wait(EVERY) and not self.gone and self.others:
            try:
                self.gone = self._look()
            except (DistError, RuntimeError):
                self.gone = f"rank 0 is gone: {CLOSED}"
            self.rounds += 1
        while not self.left.wait(EVERY):
            self.rounds += 1  # there is nobody left to be heard of

    def _look(self) -> str:
        """Give a sign of life, and look at those of others; who is gone, or nothing."""
        self.store.add(_beat(rank()), 1)
        if rank() and self.store.check(["gone"]):
            return _text(self.store, "gone")
        beats = self.store.multi_get([_beat(other) for other in self.others])
        for other, beat in zip(list(self.others), beats, strict=True):
            fresh = self.last.get(other) != beat
            self.last[other] = beat
            self.silent[other] = 0 if fresh else self.silent[other] + 1
            if self.silent[other] and (gone := self._of_silent(other)):
                if rank() == 0:
                    self.store.set("gone", gone)
                return gone
        return ""

    def _of_silent(self, other: int) -> str:
        """What to say of a process of which nothing new was heard; nothing where that may be."""
        times, place = self.silent[other], f"rank {other}"
        if on := _text(self.store, f"machine/{other}"):
            place += f" (machine {on})"
        if self.store.check([_left(other)]):
            code = _text(self.store, _left(other))
            if code == str(DONE):
                self.others.remove(other)
            elif times >= LAST_WORDS:
                return f"{place} has ended with {code}"
        elif times >= SILENCE:
            return f"{place} is gone: nothing was heard of it for {times * EVERY:.0f} seconds"
        return ""


@cache
def meet() -> Peers:
    """The processes of this launch, of which there are several. Collective.

    Raises UserError (75) where not all of them come.
    """
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=ARRIVAL)))
        store = PrefixStore("llmpipe", store)
        launch = _ask(store, rank()) if rank() else _answer(store, world_size())
    except DistError as error:
        raise _missing() from error
    peers = Peers(store, launch)
    if on_several_machines():
        peers.watch()
    return peers


def _answer(store: Store, processes: int, sleep: Callable[[float], None] = time.sleep) -> str:
    """Rank 0 answers all others; the word of the launch, when they have heard it."""
    launch = new_launch()
    answers: dict[str, str] = {}
    for _ in range(round(ARRIVAL / PAUSE)):
        asks = {other: _asked(store, other) for other in range(1, processes)}
        if all(heard == launch for _, heard in asks.values()):
            return launch
        words = {str(other): word for other, (word, _) in asks.items() if word}
        if words != answers:
            answers = words
            store.set("word", json.dumps({"launch": launch, "answers": answers}))
        sleep(PAUSE)
    raise _missing()


def _ask(store: Store, rank: int, sleep: Callable[[float], None] = time.sleep) -> str:
    """Another rank asks rank 0; the word of the launch, when the answer is to what was asked."""
    mine, key = new_launch(), f"ask/{rank}"
    store.set(key, mine)
    for _ in range(round(ARRIVAL / PAUSE)):
        if store.check(["word"]):
            word: dict[str, Any] = json.loads(_text(store, "word"))
            if word["answers"].get(str(rank)) == mine:
                launch: str = word["launch"]
                store.set(key, f"{mine} {launch}")
                return launch
        sleep(PAUSE)
    raise _missing()


def _asked(store: Store, other: int) -> tuple[str, str]:
    """(the word of another rank, the launch that it has heard), empty as long as there is none."""
    key = f"ask/{other}"
    word, _, heard = (_text(store, key) if store.check([key]) else "").partition(" ")
    return word, heard


def _missing() -> UserError:
    problem = f"not all of {world_size()} processes came within {ARRIVAL // 60} minutes"
    hint = "see that every machine runs the command, and reaches MASTER_ADDR at MASTER_PORT"
    return UserError(problem, hint, LOST)


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _left(rank: int) -> str:
    return f"left/{rank}"


def _text(store: Store, key: str) -> str:
    return bytes(store.get(key)).decode()


def _briefly(work: Callable[[], None]) -> None:
    """Do what may hang or fail where another machine is gone, but not for long."""

    def carefully() -> None:
        try:
            work()
        except Exception:  # the process ends, and has said why
            return

    thread = Thread(target=carefully, daemon=True)
    thread.start()
    thread.join(LAST_WORDS)
