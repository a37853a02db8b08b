"""The policy itself draws: with recorded steps on a GPU, token by token on a CPU.

One that is in parts is whole in every process meanwhile: gathered once a rollout and not for every
token, and each process is done when its answers are. Its weights lie elsewhere each time, so that
nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from llmpipe.models.drawing import replay as replays
from llmpipe.models.drawing.draw import Episode, draw
from llmpipe.models.drawing.replay import Replay
from llmpipe.parallel.parts import gathered, is_sharded
from llmpipe.rl.rollout.engine import Terms
from llmpipe.rl.seeds import Place, generator


class Local:
    """Each token is where a number of its place falls in the policy's distribution."""

    def __init__(self, terms: Terms):
        self.terms = terms
        self.batch_size = terms.batch_size
        self.replay: Replay | None = None
        if terms.hardware.device in replays.DEVICES and not is_sharded(terms.actors.causal):
            pad = terms.tokenizer.pad_token_id
            self.replay = Replay(terms.actors.causal, terms.sampling, terms.ends, pad, terms.say)

    @contextmanager
    def begun(self) -> Iterator[None]:
        begun = self.replay.rollout_begun if self.replay else nullcontext
        actors = self.terms.actors
        with actors.padded(), gathered(actors.causal), self.terms.hardware.autocast(), begun():
            yield

    def draw(self, prompts: list[list[int]], places: list[Place]) -> list[Episode]:
        terms, uniforms = self.terms, self._uniforms(places)
        if self.replay:
            return self.replay.draw(prompts, uniforms)
        pad = terms.tokenizer.pad_token_id
        return draw(terms.actors.causal, prompts, uniforms, terms.sampling, terms.ends, pad)

    def _uniforms(self, places: list[Place]) -> Tensor:
        """The numbers that decide the responses, float64 [places, sampling.max_new_tokens]."""
        length = self.terms.sampling.max_new_tokens
        rows = []
        for place in places:
            numbers = generator(self.terms.seed, *place.key)
            rows.append(torch.rand(length, generator=numbers, dtype=torch.float64))
        return torch.stack(rows)

    def release(self) -> None:
        if self.replay:
            self.replay.release()
