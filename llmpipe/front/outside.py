"""The other driver: under `accelerate launch llmpipe ...` or torchrun every process is the command.

Rank 0 does what the ordinary command does, but trains within this process, together with the
others. These wait for its word in a file, never in a collective, which would time out while rows
are prepared.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from llmpipe.front.launch import library_environment
from llmpipe.front.session import Session
from llmpipe.front.worker import act, guarded
from llmpipe.recipe.sections import Training
from llmpipe.record import Record
from llmpipe.run.artifact import Artifact
from llmpipe.run.machine import rank
from llmpipe.run.outcome import Outcome
from llmpipe.run.signals import Signals, die_with_parent

CLOCKS_DIFFER = 60  # seconds that the clocks of two machines may be apart


def make_together(session: Session) -> None:
    """Make an artifact as one of several processes; raises UserError or Stopped."""
    if rank() == 0:
        lead(session)
    elif wait_for_word(session.artifact) == "train":
        train(session)


def lead(session: Session) -> None:
    """What rank 0 does."""
    with session.locked():
        decision = session.plan()
        works = decision.action != "skip"
        if works:
            session.prepare(decision)
        together = works and not session.only_prepare and isinstance(session.recipe, Training)
        Outcome.clear(session.artifact)
        give_word(session.artifact, "train" if together else "skip")
        if session.only_prepare:
            return
        if together:
            train(session)
        elif works:  # a stage that does not train, in a process of its own
            session.start("train")
        session.judge()


def train(session: Session) -> None:
    """Train in this process, which the launcher made one of several."""
    artifact = session.artifact
    die_with_parent()
    signals = Signals().install()
    os.environ |= library_environment("train")
    outcome = guarded(
        artifact,
        lambda: act("train", artifact, signals, inexact=session.inexact),
        session.debug,
    )
    outcome.check()


class Word(Record):
    """What rank 0 decided, and in which launch."""

    action: Literal["train", "skip"]
    host: str
    parent: str
    time: float

    @property
    def from_this_machine(self) -> bool:
        return self.host == socket.gethostname()


def word_path(artifact: Artifact) -> Path:
    return artifact.run / ".locks" / f"{artifact.name}.word"


def give_word(artifact: Artifact, action: Literal["train", "skip"]) -> None:
    """Rank 0 tells the other ranks of this launch what it decided."""
    word = Word(action=action, host=socket.gethostname(), parent=parent_id(), time=time.time())
    word.to_file(word_path(artifact))


def wait_for_word(
    artifact: Artifact, sleep: Callable[[float], None] = time.sleep
) -> Literal["train", "skip"]:
    """Wait for rank 0's decision.

    Its word is of this launch when it shares our parent, or, on another machine, is younger than
    we are.
    """
    begun = time.time() - CLOCKS_DIFFER
    while True:
        word = Word.from_file(word_path(artifact))
        if word and word.from_this_machine and word.parent == parent_id():
            return word.action
        if word and not word.from_this_machine and word.time > begun:
            return word.action
        sleep(0.2)


def parent_id() -> str:
    """Pid and start time of the launcher: of no other process until the machine is started anew."""
    pid = os.getppid()
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return str(pid)
    return f"{pid} {fields[19]}"
