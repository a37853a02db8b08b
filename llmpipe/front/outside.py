"""The other driver: under `accelerate launch llmpipe ...` or torchrun every process is the command.

Rank 0 does what the ordinary command does, but trains within this process, together with the
others. These wait for its word in a file, never in a collective, which would time out while rows
are prepared.

Files of an earlier launch may lie there, even one on another machine with another clock. So each
process asks with a word that nobody else has, and believes who answers with it; rank 0 goes on when
all have heard its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from llmpipe.errors import DONE
from llmpipe.front.launch import library_environment
from llmpipe.front.session import Session
from llmpipe.front.worker import act, as_kept, end_of
from llmpipe.record import Record
from llmpipe.run.artifact import Artifact, make_run
from llmpipe.run.ends import read_ends, verdict, write_end
from llmpipe.run.machine import rank
from llmpipe.run.outcome import LAUNCH, Outcome, new_launch
from llmpipe.run.signals import Signals

PAUSE = 0.2
"""Seconds between two looks at a file."""
LAST_WORDS = 3.0
"""Seconds in which one that was lost may still say why."""

Action = Literal["train", "skip"]


def make_together(session: Session) -> None:
    """Make an artifact as one of several processes; raises UserError or Stopped."""
    if rank() == 0:
        lead(session)
        return
    word = wait_for_word(session.artifact, rank())
    if word.action == "train":
        train(session, word.launch)


def lead(session: Session) -> None:
    """What rank 0 does."""
    with session.locked():
        decision = session.plan()
        works = decision.action != "skip"
        if works:
            session.prepare(decision)
        together = works and not session.only_prepare
        Outcome.clear(session.artifact)
        launch = give_word(session.artifact, "train" if together else "skip", world_size())
        if session.only_prepare:
            return
        if together:
            train(session, launch)
        session.judge()


def train(session: Session, launch: str) -> None:
    """Train in this process, which the launcher made one of several."""
    artifact = session.artifact
    signals = Signals().install()
    os.environ |= library_environment("train") | {LAUNCH: launch}
    outcome = end_of(
        lambda: act("train", artifact, signals, inexact=session.inexact),
        artifact,
        session.debug,
    )
    signals.deferred = True  # what comes now changes nothing
    write_end(artifact, launch, rank(), as_kept(outcome, artifact))
    if outcome.code == DONE and rank() != 0:
        return
    if outcome.kind == "peer":
        outcome = who_was_lost(artifact, launch, outcome)
    first = verdict(read_ends(artifact, launch, world_size()), {}) or outcome
    as_kept(first, artifact).deliver(artifact, launch)
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


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class Word(Record):
    """What rank 0 decided."""

    launch: str
    """Rank 0's own word: of this launch, and of no other."""
    action: Action
    answers: dict[int, str]
    """The words of the ranks that it has heard."""


class Ask(Record):
    """What another rank says."""

    word: str
    """Its own."""
    heard: str = ""
    """Rank 0's, when it has heard that."""


def word_path(artifact: Artifact) -> Path:
    return artifact.run / ".locks" / f"{artifact.name}.word"


def ask_path(artifact: Artifact, rank: int) -> Path:
    return artifact.run / ".locks" / f"{artifact.name}.{rank}.ask"


def give_word(
    artifact: Artifact,
    action: Action,
    processes: int,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Rank 0 tells the other ranks of this launch what it decided; returns when all have heard."""
    launch = new_launch()
    answers: dict[int, str] = {}
    while True:
        asks = {other: Ask.if_readable(ask_path(artifact, other)) for other in range(1, processes)}
        if all(ask and ask.heard == launch for ask in asks.values()):
            break
        asked = {other: ask.word for other, ask in asks.items() if ask}
        if asked != answers:
            answers = asked
            Word(launch=launch, action=action, answers=answers).to_file(word_path(artifact))
        sleep(PAUSE)
    for path in [word_path(artifact), *(ask_path(artifact, other) for other in asks)]:
        path.unlink(missing_ok=True)
    return launch


def wait_for_word(
    artifact: Artifact, rank: int, sleep: Callable[[float], None] = time.sleep
) -> Word:
    """Wait for rank 0's decision, which is of this launch when it answers what was asked."""
    mine = new_launch()
    path = ask_path(artifact, rank)
    make_run(artifact.run)
    Ask(word=mine).to_file(path)
    while True:
        word = Word.if_readable(word_path(artifact))
        if word and word.answers.get(rank) == mine:
            Ask(word=mine, heard=word.launch).to_file(path)
            return word
        sleep(PAUSE)
