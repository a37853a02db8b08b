"""How long in tokens what a training reads and says may become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmpipe.parallel.world import World
from llmpipe.recipe.reinforcement import RLRecipe
from llmpipe.rl.actors import Actors
from llmpipe.rl.method import Answer
from llmpipe.run.context import refuse_rollouts, tokens_of
from llmpipe.training.training import Training


@dataclass(frozen=True)
class Lengths:
    """Those that are known before anything is drawn."""

    recipe: RLRecipe
    prompt: int
    """Of the longest prompt, held-out ones as well."""
    context: int | None
    """What the model takes; None where it does not say."""

    @classmethod
    def of(cls, training: Training[RLRecipe], actors: Actors) -> Lengths:
        """Raises UserError where a prompt leaves no room for a response."""
        longest = training.prepared.lengths.max
        held_out = training.eval_rows()
        if held_out is not None:
            longest = max(longest, *map(len, held_out["prompt_ids"]))
        context = tokens_of(actors.causal.config.to_dict())
        refuse_rollouts(context, longest, training.recipe.rollout.max_new_tokens)
        return cls(training.recipe, longest, context)

    def longest_episode(self, drawn: Sequence[Answer], world: World) -> tuple[int, int]:
        """Of the longest one that may come: what is read, of an environment as much in each of its
        turns as in any of these answers, and what is learned. Collective.
        """
        turns = [ids for answer in drawn for _, ids in answer.episode.inserted]
        inserted = int(world.greatest(max(map(len, turns), default=0)))
        read = self.prompt + inserted * (self.recipe.turns - 1)
        if self.context is None:
            return read, self.recipe.max_response
        read = min(read, self.context - self.recipe.rollout.max_new_tokens)
        return read, min(self.recipe.max_response, self.context - read)
