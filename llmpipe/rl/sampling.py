"""Responses of the policy as it is now, a batch of like length at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.models.drawing.draw import Episode
from llmpipe.rl.rollout.engine import Engine
from llmpipe.rl.seeds import Place

Note = Callable[[int, int], None]  # told how many of how many responses there are


@dataclass(frozen=True)
class Sampler:
    """Has an engine draw the responses of a rollout."""

    engine: Engine
    tokenizer: Tokenizer

    def draw(self, prompts: list[list[int]], places: list[Place], note: Note) -> list[Episode]:
        """Responses to tokenized prompts, in their order; the numbers of its place decide each."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        episodes: dict[int, Episode] = {}
        with self.engine.begun():
            for start in range(0, len(order), self.engine.batch_size):
                batch = order[start : start + self.engine.batch_size]
                drawn = self.engine.draw([prompts[i] for i in batch], [places[i] for i in batch])
                episodes |= zip(batch, drawn, strict=True)
                note(len(episodes), len(prompts))
        return [episodes[i] for i in range(len(prompts))]

    def text(self, episode: Episode) -> str:
        """A response as a person reads it."""
        tokens = episode.response[:-1] if episode.ended else episode.response
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text
