"""Responses of the policy as it is now, a batch of like length at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.models.drawing.draw import Episode, Sampling, draw
from llmpipe.models.drawing.replay import Replay
from llmpipe.models.generate import stop_tokens
from llmpipe.models.hardware import Hardware
from llmpipe.recipe.reinforcement import Rollout
from llmpipe.rl.actors import Actors
from llmpipe.rl.seeds import Use, generator


def sampling_of(rollout: Rollout) -> Sampling:
    """How the recipe has responses drawn."""
    return Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k)


Note = Callable[[int, int], None]  # told how many of how many responses there are


@dataclass(frozen=True)
class Sampler:
    """Draws responses of a policy."""

    actors: Actors
    tokenizer: Tokenizer
    hardware: Hardware
    rollout: Rollout
    batch_size: int
    """Responses that are drawn at a time; no choice changes them."""
    seed: int
    replay: Replay | None = None
    """What draws on a GPU."""

    def uniforms(self, use: Use, step: int, places: Sequence[int]) -> Tensor:
        """The numbers that decide the responses at some places of a batch, float64 [places,
        rollout.max_new_tokens]."""
        length = self.rollout.max_new_tokens
        rows = []
        for place in places:
            numbers = generator(self.seed, use, step, place)
            rows.append(torch.rand(length, generator=numbers, dtype=torch.float64))
        return torch.stack(rows)

    def draw(self, prompts: list[list[int]], uniforms: Tensor, note: Note) -> list[Episode]:
        """Responses to tokenized prompts, in their order."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        episodes: dict[int, Episode] = {}
        begun = self.replay.rollout_begun if self.replay else nullcontext
        with self.actors.padded(), self.hardware.autocast(), begun():
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                drawn = self._drawn([prompts[i] for i in batch], uniforms[batch])
                episodes |= zip(batch, drawn, strict=True)
                note(len(episodes), len(prompts))
        return [episodes[i] for i in range(len(prompts))]

    def _drawn(self, prompts: list[list[int]], uniforms: Tensor) -> list[Episode]:
        """A batch of responses."""
        if self.replay:
            return self.replay.draw(prompts, uniforms)
        model = self.actors.causal
        ends = stop_tokens(model, self.tokenizer)
        sampling, pad = sampling_of(self.rollout), self.tokenizer.pad_token_id
        return draw(model, prompts, uniforms, sampling, ends, pad)

    def release(self) -> None:
        """Give back the memory that drawing keeps."""
        if self.replay:
            self.replay.release()

    def text(self, episode: Episode) -> str:
        """A response as a person reads it."""
        tokens = episode.response[:-1] if episode.ended else episode.response
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text
