"""The other driver: under `accelerate launch llmpipe ...`, torchrun or srun every process is the
command, on one machine or on several.

Rank 0 does what the ordinary command does, but trains within this process, together with the
others. These wait for its word in the launch's store (`llmpipe.peers`), never in a collective,
which would time out while rows are prepared.

All machines have to see one run directory: rank 0 prepares the rows and publishes, and the others
read there what it has made. Where one sees another folder, that is refused before rows are read.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from llmpipe.errors import DONE, UserError
from llmpipe.files import write_whole
from llmpipe.front.launch import library_environment
from llmpipe.front.session import Session
from llmpipe.front.worker import act, as_kept, end_of
from llmpipe.run.artifact import Artifact
from llmpipe.run.ends import read_ends, verdict, write_end
from llmpipe.run.machine import (
    local_world_size,
    on_several_machines,
    rank,
    thread_count,
    world_size,
)
from llmpipe.run.outcome import LAUNCH, Outcome, new_launch
from llmpipe.run.signals import Signals

if TYPE_CHECKING:
    from llmpipe.peers import Peers

PAUSE = 0.2
"""Seconds between two looks at a file."""
LAST_WORDS = 3.0
"""Seconds in which one that was lost may still say why."""
SIGHT = 60.0
"""Seconds in which a file of another machine has to be seen."""

THREADS = os.environ.get("OMP_NUM_THREADS")
"""Of each process, where the launcher says it: torchrun does where it starts several."""

Action = Literal["look", "train", "skip", "end"]
"""What rank 0 tells the others: to look whether they see its files, to train with it, that there is
nothing for them to do, or to end as it does."""
ACTIONS: tuple[Action, ...] = get_args(Action)


class Turn:
    """What the processes of a launch say to one another while they make one artifact."""

    def __init__(self, peers: Peers | None):
        self.peers = peers
        """None where this process is alone."""
        self.launch = peers.turn() if peers else new_launch()
        """A word that no other launch, and no other artifact of this one, has."""
        self.trains = False
        """Whether they train: then they miss who ends."""
        self._words = 0

    def tell(self, action: Action, code: int = DONE) -> None:
        """Rank 0 says what it decided. `code`: of the exit where all are to end."""
        if self.peers:
            self.peers.say(self._next(), f"{action} {code}")

    def heard(self) -> tuple[Action, int]:
        """What rank 0 says next."""
        assert self.peers is not None
        action, _, code = self.peers.hear(self._next(), of=0).partition(" ")
        return next(each for each in ACTIONS if each == action), int(code)

    def _next(self) -> str:
        self._words += 1
        return f"{self.launch}/word/{self._words}"


def make_together(session: Session) -> None:
    """Make an artifact as one of several processes; raises UserError or Stopped."""
    os.environ |= library_environment("train")  # before libraries are imported
    peers = _peers() if world_size() > 1 else None
    turn = Turn(peers)
    try:
        if rank() == 0:
            lead(session, turn)
        else:
            follow(session, turn)
    except BaseException as error:
        code = getattr(error, "code", 1)
        if rank() == 0 and not turn.trains:
            with suppress(UserError):  # where the launcher is gone, nobody hears it
                turn.tell("end", code)
        if peers:
            peers.leave(code, last=not turn.trains)
        raise


@cache
def _peers() -> Peers:
    """The other processes, which have come."""
    from llmpipe.peers import meet

    peers = meet()
    peers.watch()
    atexit.register(peers.leave, DONE, last=True)
    return peers


def lead(session: Session, turn: Turn) -> None:
    """What rank 0 does."""
    with session.locked():
        refuse_unshared(session.artifact, turn)
        decision = session.plan()
        works = decision.action != "skip"
        if works:
            session.prepare(decision)
        together = works and not session.only_prepare
        Outcome.clear(session.artifact)
        turn.tell("train" if together else "skip")
        if session.only_prepare:
            return
        if together:
            train(session, turn)
        session.judge()


def follow(session: Session, turn: Turn) -> None:
    """What the other ranks do."""
    action, code = turn.heard()
    if action == "look":
        seen = sees(session.artifact, turn.launch)
        assert turn.peers is not None
        turn.peers.say(f"{turn.launch}/seen/{rank()}", "yes" if seen else "no")
        action, code = turn.heard()
    if action == "train":
        train(session, turn)
    elif action == "end":
        sys.exit(code)  # rank 0 says why


def train(session: Session, turn: Turn) -> None:
    """Train in this process, which the launcher made one of several."""
    artifact, launch = session.artifact, turn.launch
    turn.trains = True
    signals = Signals().install()
    os.environ[LAUNCH] = launch
    threads = thread_count(session.recipe.launch, local_world_size())
    os.environ["OMP_NUM_THREADS"] = THREADS or str(threads)  # else Accelerate has an opinion

    def leave_end(outcome: Outcome) -> None:
        write_end(artifact, launch, rank(), as_kept(outcome, artifact))

    def speak_for_all(outcome: Outcome) -> Outcome:
        first = verdict(read_ends(artifact, launch, world_size()), {}) or outcome
        as_kept(first, artifact).deliver(artifact, launch)
        return first

    def at_a_loss(outcome: Outcome) -> Outcome:
        leave_end(outcome)
        return speak_for_all(outcome)

    if turn.peers:
        turn.peers.before_exit = at_a_loss
    outcome = end_of(
        lambda: act("train", artifact, signals, inexact=session.inexact),
        artifact,
        session.debug,
    )
    signals.deferred = True  # what comes now changes nothing
    leave_end(outcome)
    if outcome.code == DONE and rank() != 0:
        return
    if outcome.kind == "peer":
        outcome = who_was_lost(artifact, launch, outcome)
    speak_for_all(outcome)
    outcome.check()


def who_was_lost(
    artifact: Artifact,
    launch: str,
    outcome: Outcome,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """The end of a process that lost another one: with what that one says, where it can."""
    for _ in range(round(LAST_WORDS / PAUSE)):
        first = verdict(read_ends(artifact, launch, world_size()), {})
        if first and first.kind != "peer" and first.code != DONE and not first.was_stopped:
            message = f"another process ended first: {first.message}"
            return Outcome(first.code, message, first.hint, "peer")
        sleep(PAUSE)
    return outcome


# --- one run directory ---


def refuse_unshared(artifact: Artifact, turn: Turn) -> None:
    """Raise UserError (2) where another machine has another folder in the place of the run."""
    if not turn.peers or not on_several_machines():
        return
    path = _look_path(artifact, 0)
    write_whole(path, turn.launch.encode())
    try:
        turn.tell("look")
        seen = [
            turn.peers.hear(f"{turn.launch}/seen/{other}", of=other)
            for other in range(1, world_size())
        ]
    finally:
        path.unlink(missing_ok=True)
    blind = [str(other) for other, answer in enumerate(seen, 1) if answer == "no"]
    if blind:
        ranks = f"rank{'s' * (len(blind) > 1)} {', '.join(blind)}"
        raise UserError(
            f"{artifact.run}: the run directory must be shared: {ranks} on another machine "
            "cannot see what rank 0 writes there",
            "name a folder of a file system that all machines have in one place: --run DIR",
        )


def sees(artifact: Artifact, launch: str, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Whether this process sees what rank 0 has written."""
    ours, theirs = _look_path(artifact, rank()), _look_path(artifact, 0)
    try:
        for _ in range(round(SIGHT / PAUSE)):
            # NFS looks anew into a folder that this machine itself has changed
            write_whole(ours, launch.encode())
            with suppress(OSError):
                if theirs.read_bytes() == launch.encode():
                    return True
            sleep(PAUSE)
        return False
    finally:
        ours.unlink(missing_ok=True)


def _look_path(artifact: Artifact, rank: int) -> Path:
    return artifact.run / ".locks" / f"{artifact.name}.{rank}.look"
