"""What the policy as it is now says to prompts: answers, a batch of like length at a time, or
episodes of several turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.models.drawing.draw import Episode
from llmpipe.parallel.world import World
from llmpipe.rl.rollout.engine import Engine
from llmpipe.rl.seeds import Place
from llmpipe.rl.sources.source import Row
from llmpipe.rl.turns import Turns

Note = Callable[[int, int], None]  # told how many of how many responses there are


@dataclass(frozen=True)
class Said:
    """What the policy said to a prompt, as rewards look at it."""

    row: Row
    """The prompt; of several turns, all that was said before the last answer."""
    episode: Episode
    response: str
    """The last answer, as a person reads it."""


@dataclass(frozen=True)
class Sampler:
    """Has an engine draw a rollout."""

    engine: Engine
    tokenizer: Tokenizer
    world: World
    turns: Turns | None = None
    """Where an environment answers what the policy says."""

    def draw(
        self, prompts: Sequence[dict[str, Any]], places: list[Place], note: Note
    ) -> list[Said]:
        """What is said to prepared prompts, in their order; the numbers of its place decide each.
        Collective; raises UserError in all processes where an environment of one fails."""
        rows = [json.loads(prompt["row"]) for prompt in prompts]
        ids = [prompt["prompt_ids"] for prompt in prompts]
        answers = partial(self.answers, note)
        if self.turns is None:
            with self.engine.begun():
                episodes = answers(ids, places)
            said = zip(rows, episodes, strict=True)
            return [Said(row, episode, self.text(episode)) for row, episode in said]
        with self.world.as_one(), self.engine.begun():
            games = self.turns.play(answers, self.text, rows, ids, places)
        return [Said(game.said(), game.episode(), game.answers[-1]) for game in games]

    def answers(self, note: Note, prompts: list[list[int]], places: list[Place]) -> list[Episode]:
        """Answers to tokenized prompts, in their order."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        episodes: dict[int, Episode] = {}
        for start in range(0, len(order), self.engine.batch_size):
            batch = order[start : start + self.engine.batch_size]
            drawn = self.engine.draw([prompts[i] for i in batch], [places[i] for i in batch])
            episodes |= zip(batch, drawn, strict=True)
            note(len(episodes), len(prompts))
        return [episodes[i] for i in range(len(prompts))]

    def text(self, episode: Episode) -> str:
        """An answer as a person reads it."""
        tokens = episode.response[:-1] if episode.ended else episode.response
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text
