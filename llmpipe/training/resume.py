"""Checkpoints of a trainer that is TRL's: what the library saves, and beside it what it forgets.

The library's checkpoint holds weights, optimizer, schedule, generators and its step. A resumed run
is the straight one bit by bit only if the sums since the last line of metrics go on as well; they
lie in llmpipe.json, with llmpipe's own counters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerState

from llmpipe.data.stream import Position
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.faults import reading
from llmpipe.files.writing import staging_of
from llmpipe.models.hardware import Hardware, platform_of
from llmpipe.parallel.world import World
from llmpipe.recipe import sections
from llmpipe.record import Record
from llmpipe.run import checkpoints
from llmpipe.run.manifest import Leg
from llmpipe.training.heldout import Best
from llmpipe.training.samples import samples_size
from llmpipe.training.saving import Content
from llmpipe.training.training import Training
from llmpipe.upstream.later import now


class RankState(Record):
    """What one process had counted."""

    loss_sum: float
    """Of the micro-batches since the last line of metrics."""
    last_logged: int
    """The step of that line."""
    averages: dict[str, list[int | float]]
    """TRL's metrics since that line, which it means later."""
    train_tokens: int | float
    """Tokens by TRL's count."""
    tokens: int
    """Tokens by llmpipe's, without padding."""
    seconds: float
    """Since the training began."""


class State(Record):
    """llmpipe.json: what lies beside the library's own state in a checkpoint."""

    ranks: list[RankState]
    metrics_bytes: int
    """Size of metrics.jsonl."""
    best: tuple[float, int] | None
    """The lowest held-out loss so far, and its step."""
    worse: int
    """Evaluations since then."""
    pending_evaluation: bool
    """Whether an evaluation is due that a signal put off."""
    stream: Position | None
    """Where the next block of a stream begins."""
    finished: bool
    """Whether training ended early, for want of progress."""


class Resume:
    """The checkpoint that a training goes on from, if there is one, and how others are written.

    Raises UserError (3) when it is of another recipe, or was written with other settings of the
    machine and the command does not allow that.
    """

    def __init__(self, training: Training[sections.Hosted], world: World):
        self.training = training
        self.world = world
        self.home = training.artifact.checkpoints
        refuse_another_strategy(self.home, training.hardware, adapts=bool(training.recipe.adapter))
        platform = platform_of(training.recipe, training.hardware, world)
        picked = checkpoints.pick(
            self.home,
            training.identity,
            training.hardware.resume_key(),
            platform,
            training.say,
            inexact=training.job.inexact,
            world=world,
        )
        self.checkpoint: Path | None = None
        self.exact = True
        """Whether the result is bitwise that of a run without a stop."""
        self.legs = [Leg(after=0, platform=platform)]
        self.state: State | None = None
        if picked:
            self.checkpoint, self.exact, self.legs = picked
            self.state = State.from_file(self.checkpoint / checkpoints.STATE)

    def library_state(self) -> TrainerState:
        """The library's own part of the checkpoint that is gone on from."""
        assert self.checkpoint is not None
        path = self.checkpoint / "trainer_state.json"
        with reading(path, "the state of a trainer"):
            return TrainerState.load_from_json(str(path))

    def best(self, step: int) -> Path:
        """The checkpoint of the best step. Raises UserError (3) in all processes when one of them
        finds it damaged. Collective.
        """
        path = checkpoints.folder(self.home, step)
        if problems := checkpoints.verify_together(path, self.world):
            hint = "the best checkpoint is damaged; --fresh trains anew"
            raise UserError(f"{path}/{problems[0]}", hint, INTEGRITY)
        return path

    @property
    def rank_state(self) -> RankState:
        """This process's part; the last one's where there were fewer processes."""
        assert self.state is not None
        ranks = self.state.ranks
        return ranks[min(self.world.rank, len(ranks) - 1)]

    @property
    def tokens(self) -> int:
        """What this process counts on from: all is counted once, by however many processes."""
        assert self.state is not None
        return sum(rank.tokens for rank in self.state.ranks[self.world.rank :: self.world.size])

    def staging(self, step: int) -> Path:
        """Where the library saves to."""
        return staging_of(checkpoints.folder(self.home, step))

    def content(self, state: State, best: Best | None) -> Content:
        """What a checkpoint has beside the library's files. The `best` one so far is kept: what is
        gone on from there may go back to it.
        """
        origin = checkpoints.Origin(
            identity=self.training.identity,
            machine=self.training.hardware.resume_key(),
            exact=self.exact,
            legs=self.legs,
        )
        lines = {"metrics.jsonl": state.metrics_bytes} | samples_size(self.training.artifact)
        if state.stream and state.stream.rejected_bytes is not None:
            lines["rejected.jsonl"] = state.stream.rejected_bytes
        return Content(origin, state.model_dump(), lines, best.step if best else None)


def refuse_another_strategy(home: Path, hardware: Hardware, *, adapts: bool) -> None:
    """Raise UserError (3) where what there is to go on from was saved in another form: whole, in
    parts or from under ZeRO. An adapter is saved alike, in parts or not.
    """
    before = checkpoints.settings(home)
    stage = int(before.get("zero", 0))
    sharded = bool(before.get("sharded")) and not adapts
    if before and (sharded, bool(stage)) != (hardware.sharded and not adapts, bool(hardware.zero)):
        strategy = f"zero{stage}" if stage else "fsdp" if before.get("sharded") else "ddp"
        raise UserError(
            f"{home}: the checkpoints were written with launch.strategy: {strategy}",
            "set it back, or begin anew: --fresh moves what is there aside",
            INTEGRITY,
        )


def as_numbers(averages: Mapping[str, Sequence[Any]]) -> dict[str, list[float]]:
    """What a trainer takes means of, {metric: values}, in one look at the device."""
    values = {name: [now(value) for value in of_name] for name, of_name in averages.items()}
    waiting = [value for of_name in values.values() for value in of_name if torch.is_tensor(value)]
    read = iter(torch.stack([value.double() for value in waiting]).tolist() if waiting else ())
    return {
        name: [next(read) if torch.is_tensor(value) else value for value in of_name]
        for name, of_name in values.items()
    }


def counted(trainer: Trainer, tokens: int, seconds: float) -> RankState:
    """What this process has counted, where the library keeps it."""
    return RankState(
        loss_sum=float(trainer._tr_loss),
        last_logged=trainer._globalstep_last_logged,
        averages=as_numbers(trainer._metrics["train"]),
        train_tokens=int(trainer._total_train_tokens),
        tokens=tokens,
        seconds=seconds,
    )


def put_back(trainer: Trainer, state: RankState) -> None:
    """Let the library count on from there, after it has restored its own part."""
    averages = {name: list(values) for name, values in state.averages.items()}
    trainer._tr_loss += state.loss_sum
    trainer._globalstep_last_logged = state.last_logged
    trainer._metrics["train"] = defaultdict(list, averages)
    trainer._total_train_tokens = state.train_tokens
