"""The other processes of a launch: how they find one another, and miss one that is gone.

They speak through torch's store, which lies with the launcher or with rank 0, before there is a
process group and beside it. A launcher that starts its processes anew keeps its store, with what
the processes before have left there. So each one asks with a word that nobody else has, and
believes who answers with it; rank 0 goes on when all have heard its own, the word of this launch,
under which all else is said.

Where a launcher of the user's has started them, each is heard of every second. A machine without
power, or behind a broken cable, closes no connection, and srun leaves the others alone when it is
told to: who waits for one that is gone would wait for a collective's timeout, which has to be long.
Who is not heard of for `SILENCE` is gone, and the others end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, NamedTuple

from torch.distributed import PrefixStore, Store, rendezvous

from llmpipe.errors import DONE, LOST, UserError
from llmpipe.faults import GO_ON
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


class Loss(NamedTuple):
    """A process without which the others cannot go on."""

    who: str
    """Which one, and what is known of it."""
    code: int = LOST
    """The exit code of the others: its own, where it has said so."""


class Peers:
    """The processes of this launch, which have all come."""

    def __init__(self, store: Store, launch: str):
        self.launch = launch
        """The word of this launch."""
        self.store = PrefixStore(launch, store)
        self.before_exit: Callable[[Outcome], Outcome] = lambda outcome: outcome
        """What is still to be written where others are gone; gives how all of them have ended."""
        self._left = Event()
        self._aside = _Aside()
        self._turns = 0

    def turn(self) -> str:
        """A word for what all of them do next, and for nothing else."""
        self._turns += 1
        return f"{self.launch}.{self._turns}"

    def say(self, key: str, text: str) -> None:
        """Say something under a key. Raises UserError (75) where the store is gone."""
        with missing_rank_0():
            self.store.set(key, text)

    def hear(self, key: str, of: int) -> str:
        """What a rank says under a key, as soon as it does: it may hash a model first, or prepare
        rows, and takes as long as that does.

        Raises UserError where it ends before, with its exit code, or 75 where it was done. Of one
        that is gone without a word `watch` takes notice; where the store is gone with it, the next
        look does.
        """
        with missing_rank_0():
            while not self.store.check([key]):
                self.refuse_gone(of, key)
                time.sleep(PAUSE)
            return _text(self.store, key)

    def refuse_gone(self, other: int, key: str) -> None:
        """Raise UserError where a rank has ended and said nothing under a key, with its exit code,
        or 75 where it was done."""
        with missing_rank_0():
            if self.store.check([_left(other)]) and not self.store.check([key]):
                code = int(_text(self.store, _left(other)))
                hint = GO_ON if code in (DONE, LOST) else "see what it says"
                raise UserError(f"rank {other} has ended with {code}", hint, code or LOST)

    def known(self, key: str) -> str | None:
        """What was said under a key, if anything was by now."""
        with missing_rank_0():
            return _text(self.store, key) if self.store.check([key]) else None

    def gather(self, key: str, text: str) -> list[str]:
        """What every process says under a key, in the order of ranks, once all have said it."""
        self.say(f"{key}/{rank()}", text)
        return [self.hear(f"{key}/{number}", number) for number in range(world_size())]

    def watch(self) -> None:
        """Give signs of life from now on, and end where another process gives none.

        Raises UserError (75) where rank 0 is gone before the first one.
        """
        if on_several_machines():
            self.say(_machine(rank()), machine_rank())
        with missing_rank_0():
            watch = _Watch(self, self._left, self._end)
        Thread(target=watch.run, daemon=True).start()

    def leave(self, code: int, last: bool) -> None:
        """Say that this process ends, and how. `last`: let others hear what the first one has said,
        who may hold the store.
        """
        if self._left.is_set():
            return
        self._left.set()
        self._aside.briefly(lambda: self._farewell(code, last))

    def _farewell(self, code: int, last: bool) -> None:
        self.say(_left(rank()), str(code))
        if rank() == 0 and last:
            for other in range(1, world_size()):
                self.hear(_left(other), other)

    def _end(self, loss: Loss) -> None:
        """End this process: it may wait in a collective for one that never comes."""
        hint = GO_ON if loss.code == LOST else "see what it says"
        outcome = Outcome(loss.code, f"{loss.who}, and others cannot go on alone", hint, "peer")
        print(f"error: {outcome.message}\n  {outcome.hint}", file=sys.stderr, flush=True)
        ends = [outcome]
        self._aside.briefly(lambda: ends.append(self.before_exit(outcome)))
        os._exit(ends[-1].code)


class _Watch:
    """Rank 0 hears of all; the others hear of rank 0, and from it of others that are gone."""

    def __init__(self, peers: Peers, left: Event, end: Callable[[Loss], None]):
        self.peers = peers
        self.left = left
        self.end = end
        self.store = peers.store.clone()  # a store takes one question at a time
        self.others = list(range(1, world_size())) if rank() == 0 else [0]
        self.last: dict[int, bytes] = {}
        self.silent = dict.fromkeys(self.others, 0)
        self.rounds = 0
        self.gone: Loss | None = None
        for other in self.others:
            self.store.add(_beat(other), 0)  # so that no look waits for the first one

    def run(self) -> None:
        """Look whether something new was heard, and whether the store has answered at all."""
        Thread(target=self._listen, daemon=True).start()
        rounds, unanswered = 0, 0
        # times are counted, not seconds: this process may have been stopped, and go on
        while not self.left.wait(EVERY) and not self.gone and unanswered < SILENCE:
            unanswered = unanswered + 1 if self.rounds == rounds else 0
            rounds = self.rounds
        if not self.left.is_set():
            self.end(self.gone or Loss("the machine of rank 0 is gone: its store does not answer"))

    def _listen(self) -> None:
        while not self.left.wait(EVERY) and not self.gone and self.others:
            try:
                self.gone = self._look()
            except RuntimeError:
                self.gone = Loss(f"rank 0 is gone: {CLOSED}")
            self.rounds += 1
        while not self.left.wait(EVERY):
            self.rounds += 1  # there is nobody left to be heard of

    def _look(self) -> Loss | None:
        """Give a sign of life, and look at those of others; who is gone, or None."""
        self.store.add(_beat(rank()), 1)
        if rank() and self.store.check(["gone"]):
            return Loss(*json.loads(_text(self.store, "gone")))
        beats = self.store.multi_get([_beat(other) for other in self.others])
        for other, beat in zip(list(self.others), beats, strict=True):
            fresh = self.last.get(other) != beat
            self.last[other] = beat
            self.silent[other] = 0 if fresh else self.silent[other] + 1
            if self.silent[other] and (gone := self._of_silent(other)):
                if rank() == 0:
                    self.store.set("gone", json.dumps(gone))
                return gone
        return None

    def _of_silent(self, other: int) -> Loss | None:
        """What to say of a process of which nothing new was heard; None where that may be."""
        times, place = self.silent[other], f"rank {other}"
        if self.store.check([_machine(other)]):
            place += f" (machine {_text(self.store, _machine(other))})"
        if self.store.check([_left(other)]):
            code = int(_text(self.store, _left(other)))
            if code == DONE:
                self.others.remove(other)
            elif times >= LAST_WORDS:
                return Loss(f"{place} has ended with {code}", code)
        elif times >= SILENCE:
            silence = f"nothing was heard of it for {times * EVERY:.0f} seconds"
            return Loss(f"{place} is gone: {silence}")
        return None


@contextmanager
def missing_rank_0() -> Iterator[None]:
    """A store that is gone is rank 0, who holds it, or the launcher that does: UserError (75)."""
    try:
        yield
    except RuntimeError as error:  # DistError is one
        raise UserError(f"rank 0 is gone: {CLOSED}", GO_ON, LOST) from error


@cache
def meet() -> Peers:
    """The processes of this launch, of which there are several. Collective.

    Raises UserError (75) where not all of them come.
    """
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=ARRIVAL)))
        store = PrefixStore("llmpipe", store)
        launch = _ask(store, rank()) if rank() else _answer(store, world_size())
    except RuntimeError as error:
        raise _missing() from error
    return Peers(store, launch)


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


def _machine(rank: int) -> str:
    return f"machine/{rank}"


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _left(rank: int) -> str:
    return f"left/{rank}"


def _text(store: Store, key: str) -> str:
    return bytes(store.get(key)).decode()


class _Aside:
    """A thread for what may hang or fail where another machine is gone. It is there before it is
    needed: where memory has ended, none begins, and who begins one waits for it forever.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Callable[[], object], Event]] = SimpleQueue()
        Thread(target=self._run, daemon=True).start()

    def briefly(self, work: Callable[[], object]) -> None:
        """Do this, but not for long."""
        done = Event()
        self._work.put((work, done))
        done.wait(LAST_WORDS)

    def _run(self) -> None:
        while True:
            work, done = self._work.get()
            with suppress(Exception):  # the process ends, and has said why
                work()
            done.set()
