"""The mean score of responses to held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmpipe.parallel.world import World
from llmpipe.rl.rewards import Rewards, scored_together
from llmpipe.rl.sampling import Note, Sampler
from llmpipe.rl.seeds import Place, Use
from llmpipe.rl.watch import Metrics


def evaluate(
    sampler: Sampler,
    rewards: Rewards,
    held_out: Sequence[dict[str, Any]],
    world: World,
    note: Note,
) -> Metrics:
    """Each response is drawn with the same numbers every time."""
    places = list(range(world.rank, len(held_out), world.size))
    numbers = [Place(Use.HELD_OUT, 0, i) for i in places]
    said = sampler.draw([held_out[i] for i in places], numbers, note)
    scores = scored_together(rewards, said, world)
    sums = {
        "eval_score": sum(scores.total),
        "eval_ended": sum(each.episode.ended for each in said),
        "eval_tokens": sum(len(each.episode.response) for each in said),
    }
    if sampler.turns:
        sums["eval_turns"] = sum(each.episode.turns for each in said)
    return {name: total / len(held_out) for name, total in world.totals(sums).items()}
