"""The other driver: under `accelerate launch llmpipe ...`, torchrun or srun every process is the
command, on one machine or on several.

Rank 0 does what the ordinary command does, but trains within this process, together with the
others. These wait for its word in the launch's store (`llmpipe.peers`), never in a collective,
which would time out while rows are prepared.

Rank 0 prepares the rows and publishes, and the others read there what it has made. A machine that
does not see rank 0's run directory has a mirror of it (`front.mirrored`).
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from llmpipe.errors import DONE, LOST, UserError
from llmpipe.faults import writing
from llmpipe.files.tables import in_bytes
from llmpipe.files.writing import write_whole
from llmpipe.front.launch import library_environment
from llmpipe.front.mirrored import (
    Sight,
    copies_for,
    keepers,
    look,
    look_path,
    progress_of,
    refuse_behind,
    refuse_other_models,
)
from llmpipe.front.session import Session
from llmpipe.front.worker import act, as_kept, end_of
from llmpipe.run.artifact import Artifact, mirror_of
from llmpipe.run.ends import read_ends, verdict, write_end
from llmpipe.run.lock import Lock
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
    from llmpipe.mirror import Mirrors
    from llmpipe.peers import Peers

PAUSE = 0.2
"""Seconds between two looks at a file."""
LAST_WORDS = 3.0
"""Seconds in which one that was lost may still say why."""

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
        self.mirrors: Mirrors | None = None
        """Where machines do not see rank 0's run."""
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

    def look(self, artifact: Artifact) -> Artifact:
        """Find out which machines see rank 0's run; the artifact as this process has it.

        Every process calls it, and rank 0 has written the launch's word by then.
        """
        assert self.peers is not None
        if rank():
            self.peers.say(self._sight_of(rank()), look(artifact, self.launch).told())
        others = range(1, world_size())
        told = [self.peers.hear(self._sight_of(other), of=other) for other in others]
        sights = [Sight.of(each) for each in told]
        if machines := keepers(sights):
            self.mirrors = self._mirrors(artifact, sights, machines)
            return Artifact(self.mirrors.run / artifact.name)
        return artifact

    def _mirrors(
        self, artifact: Artifact, sights: Sequence[Sight], machines: dict[int, str]
    ) -> Mirrors:
        from llmpipe.mirror import Mirrors

        assert self.peers is not None
        word = f"{self.launch}/mirror"
        if rank() == 0 or sights[rank() - 1].sees:
            return Mirrors(self.peers, word, artifact.run, machines)
        mine = sights[rank() - 1].machine
        keeper = next(other for other, machine in machines.items() if machine == mine)
        return Mirrors(self.peers, word, mirror_of(artifact.run), machines, keeper)

    def _sight_of(self, other: int) -> str:
        return f"{self.launch}/sight/{other}"

    def say_of_mirror(self, problem: UserError | None) -> None:
        """Say that this machine's mirror holds all that is read, or why it does not."""
        assert self.peers is not None
        told = [problem.message, problem.hint, problem.code] if problem else None
        self.peers.say(f"{self.launch}/mirrored/{rank()}", json.dumps(told))

    def hear_of_mirror(self, keeper: int) -> UserError | None:
        """Why a machine has no mirror of all that is read; None as soon as it has."""
        assert self.peers is not None
        told = json.loads(self.peers.hear(f"{self.launch}/mirrored/{keeper}", of=keeper))
        return UserError(*told) if told else None

    def say_end(self, end: dict[str, object]) -> None:
        """Say how this process ends to those that do not see its files."""
        if self.peers and self.mirrors:
            with suppress(UserError):  # where rank 0 is gone, nobody hears it
                self.peers.say(f"{self.launch}/end/{rank()}", json.dumps(end))

    def ends_said(self) -> list[object]:
        """How others have ended that this process does not see the files of."""
        if not self.peers or not self.mirrors:
            return []
        with suppress(UserError):
            told = [self.peers.known(f"{self.launch}/end/{n}") for n in range(world_size())]
            return [json.loads(each) for each in told if each]
        return []


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


def leave(code: int) -> None:
    """Let the other processes hear that this one ends, and how, before they wait for it."""
    with suppress(UserError):  # of those that do not come
        _peers().leave(code, last=True)


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
    artifact = session.artifact
    with session.locked():
        find_mirrors(session, turn)
        decision = session.plan()
        works = decision.action != "skip"
        if works:
            session.prepare(decision)
        together = works and not session.only_prepare
        Outcome.clear(artifact)
        turn.tell("train" if together else "skip")
        if session.only_prepare:
            return
        if together:
            if turn.mirrors:
                send_mirrors(session, turn.mirrors, turn)
            train(session, artifact, turn)
        session.judge()


def find_mirrors(session: Session, turn: Turn) -> None:
    """Find out which machines have a run directory of their own, and say what that means."""
    artifact = session.artifact
    if not turn.peers or not on_several_machines():
        return
    path = look_path(artifact, 0)
    write_whole(path, turn.launch.encode())
    try:
        turn.tell("look")
        turn.look(artifact)
    finally:
        path.unlink(missing_ok=True)
    if turn.mirrors:
        machines = ", ".join(turn.mirrors.machines.values())
        session.say(
            f"{artifact.run}: is not seen on machine {machines}: what is made lies here, on the "
            f"machine of rank 0; there .{Path(os.path.abspath(artifact.run)).name}.mirror, beside "
            "the run, is sent what is read"
        )


def follow(session: Session, turn: Turn) -> None:
    """What the other ranks do."""
    artifact = session.artifact
    action, code = turn.heard()
    if action == "look":
        artifact = turn.look(artifact)
        action, code = turn.heard()
    if action == "train":
        with mirrored(session, artifact, turn):
            train(session, artifact, turn)
    elif action == "end":
        sys.exit(code)  # rank 0 says why


@contextmanager
def mirrored(session: Session, artifact: Artifact, turn: Turn) -> Iterator[None]:
    """Have what rank 0 sends to this machine. Once the artifact is published nothing of it stays
    there, but what the next one may have use for.
    """
    mirrors = turn.mirrors
    if mirrors is None or mirrors.keeper is None:
        yield
    elif not mirrors.keeps:
        if problem := turn.hear_of_mirror(mirrors.keeper):
            sys.exit(problem.code)
        yield
    else:
        # of a launch that was killed a process may not have ended yet
        with writing(artifact.path), Lock(artifact, "write").acquire(wait=10):
            keep_mirror(session, artifact, turn)
            yield
            mirrors.forget(artifact)


def keep_mirror(session: Session, artifact: Artifact, turn: Turn) -> None:
    """Take what rank 0 sends; where that cannot be, rank 0 says why."""

    def heed(about: str) -> None:
        if about:
            refuse_behind(about, session.artifact)

    assert turn.mirrors is not None
    try:
        turn.mirrors.bring(list, heed=heed)
        refuse_other_models(artifact)
    except UserError as error:
        if error.code == LOST:
            raise
        turn.say_of_mirror(error)
        sys.exit(error.code)
    turn.say_of_mirror(None)


def send_mirrors(session: Session, mirrors: Mirrors, turn: Turn) -> None:
    """What rank 0 does for the machines that do not see its run, before all train.

    Raises UserError as one of them meets it.
    """
    artifact = session.artifact
    about = "" if session.fresh else progress_of(artifact)
    if about:
        refuse_behind(about, artifact)
    files, size = mirrors.bring(lambda: copies_for(artifact, session.recipe), about)
    for keeper in mirrors.machines:
        if problem := turn.hear_of_mirror(keeper):
            raise problem
    session.say(f"mirrored: {files:,} files were sent, {in_bytes(size)}")


def train(session: Session, artifact: Artifact, turn: Turn) -> None:
    """Train in this process, which the launcher made one of several."""
    launch = turn.launch
    turn.trains = True
    signals = Signals().install()
    os.environ[LAUNCH] = launch
    threads = thread_count(session.recipe.launch, local_world_size())
    os.environ["OMP_NUM_THREADS"] = THREADS or str(threads)  # else Accelerate has an opinion
    if turn.peers:
        from llmpipe import mirror

        mirror.use(turn.mirrors)

    def leave_end(outcome: Outcome) -> None:
        turn.say_end(write_end(artifact, launch, rank(), as_kept(outcome, artifact)))

    def speak_for_all(outcome: Outcome) -> Outcome:
        ends = read_ends(artifact, launch, world_size(), turn.ends_said())
        first = verdict(ends, {}) or outcome
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
        outcome = who_was_lost(artifact, turn, outcome)
    speak_for_all(outcome)
    outcome.check()


def who_was_lost(
    artifact: Artifact,
    turn: Turn,
    outcome: Outcome,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """The end of a process that lost another one: with what that one says, where it can."""
    for _ in range(round(LAST_WORDS / PAUSE)):
        ends = read_ends(artifact, turn.launch, world_size(), turn.ends_said())
        first = verdict(ends, {})
        if first and first.kind != "peer" and first.code != DONE and not first.was_stopped:
            message = f"another process ended first: {first.message}"
            return Outcome(first.code, message, first.hint, "peer")
        sleep(PAUSE)
    return outcome
