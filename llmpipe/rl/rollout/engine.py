"""What an engine is: prompts in, responses out, with log-probabilities under the very distribution
that they were drawn from.

Responses depend on the weights, the recipe's seed and their places alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.errors import Say
from llmpipe.models.drawing.draw import Episode, Sampling
from llmpipe.models.generate import stop_tokens
from llmpipe.models.hardware import Hardware
from llmpipe.rl.actors import Actors
from llmpipe.rl.seeds import Place


@dataclass(frozen=True)
class Terms:
    """What every engine draws by."""

    actors: Actors
    tokenizer: Tokenizer
    hardware: Hardware
    sampling: Sampling
    batch_size: int
    """Responses that are drawn at a time."""
    seed: int
    say: Say

    @property
    def ends(self) -> list[int]:
        """Tokens that end a response."""
        return stop_tokens(self.actors.causal, self.tokenizer)


class Engine(Protocol):
    """Draws responses of the policy as it is now."""

    batch_size: int
    """Responses that it is asked for at a time; no choice changes them."""

    def begun(self) -> AbstractContextManager[None]:
        """What the batches of a rollout are drawn in; no weight moves meanwhile."""
        ...

    def draw(self, prompts: list[list[int]], places: list[Place]) -> list[Episode]:
        """Responses to tokenized prompts, in their order, by the random numbers of their places."""
        ...

    def release(self) -> None:
        """Give back the memory that drawing keeps."""
        ...
