"""How far another model's predictions are from the source's: on held-out rows, token by token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmpipe.errors import NUMERIC, UserError
from llmpipe.evaluation.task import Marked
from llmpipe.run.exports import Measured
from llmpipe.run.probe import Probe

MOST_TOKENS = 2048
"""Tokens that are compared: of each the source's whole distribution is in memory, 0.4 GB for a
vocabulary of 49,152."""

Predicts = Callable[[list[int]], Tensor]
"""Logits of every token of a sequence: float32 [tokens, vocabulary], on the CPU."""


@dataclass(frozen=True)
class Passage:
    """A sequence, and what the source predicts at the marked tokens."""

    ids: list[int]
    places: Tensor
    """Of the tokens in front of the marked ones: int64 [marked]."""
    targets: Tensor
    """The marked tokens: int64 [marked]."""
    log_probs: Tensor
    """The source's distributions there: float32 [marked, vocabulary]."""


@dataclass(frozen=True)
class Yardstick:
    """What readers are measured with."""

    passages: list[Passage]
    rows_named: int
    """How many there are; more than passages where these are enough."""

    @property
    def tokens(self) -> int:
        return sum(len(passage.targets) for passage in self.passages)

    @property
    def words(self) -> str:
        """What is measured on."""
        rows = f"{len(self.passages):,} of {self.rows_named:,} rows"
        return f"{rows}, {self.tokens:,} tokens"

    def measure(self, predicts: Predicts) -> tuple[Measured, float]:
        """How far a reader is from the source, and how many tokens a second it read.

        Raises UserError (4) where a number is not finite.
        """
        kl = nats = nats_of_source = 0.0
        begun, read = time.monotonic(), 0
        seconds = 0.0
        for passage in self.passages:
            begun = time.monotonic()
            logits = predicts(passage.ids)
            seconds += time.monotonic() - begun
            read += len(passage.ids)
            theirs = logits[passage.places].log_softmax(-1)
            ours = passage.log_probs
            kl += float((ours.exp() * (ours - theirs)).sum())
            nats -= float(theirs.gather(1, passage.targets[:, None]).sum())
            nats_of_source -= float(ours.gather(1, passage.targets[:, None]).sum())
        if not (math.isfinite(kl) and math.isfinite(nats)):
            raise UserError("a prediction is not finite", "the export is broken", NUMERIC)
        count = self.tokens
        measured = Measured(
            rows=len(self.passages),
            tokens=count,
            mean_kl=max(kl / count, 0.0),  # which rounding may take below
            perplexity=math.exp(nats / count),
            perplexity_of_source=math.exp(nats_of_source / count),
        )
        return measured, read / max(seconds, 1e-9)


@torch.no_grad()
def yardstick(sequences: Iterable[Marked], predicts: Predicts) -> Yardstick:
    """What the source predicts at the marked tokens of sequences, as far as memory allows."""
    passages: list[Passage] = []
    room, named = MOST_TOKENS, 0
    for ids, marks in sequences:
        named += 1
        marked = [i for i, mark in enumerate(marks) if mark and i > 0][:room]
        if not marked:
            continue
        room -= len(marked)
        kept = ids[: marked[-1] + 1]
        places = torch.tensor(marked) - 1
        log_probs = predicts(kept)[places].log_softmax(-1)
        passages.append(Passage(kept, places, torch.tensor(kept)[marked], log_probs))
    return Yardstick(passages, named)


def of_probe(probe: Probe) -> list[Marked]:
    """The questions with their continuations, which are measured where a recipe names no rows."""
    return [Marked.after(said.tokens + said.continuation, len(said.tokens)) for said in probe.asked]
