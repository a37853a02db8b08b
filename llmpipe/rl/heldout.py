"""The mean score of responses to held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llmpipe.parallel import World
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
    prompts = [held_out[i]["prompt_ids"] for i in places]
    rows = [json.loads(held_out[i]["row"]) for i in places]
    numbers = [Place(Use.HELD_OUT, 0, i) for i in places]
    episodes = sampler.draw(prompts, numbers, note)
    responses = [sampler.text(episode) for episode in episodes]
    scores = scored_together(rewards, rows, responses, world)
    sums = {
        "eval_score": sum(scores.total),
        "eval_ended": sum(episode.ended for episode in episodes),
        "eval_tokens": sum(len(episode.response) for episode in episodes),
    }
    return {name: total / len(held_out) for name, total in world.totals(sums).items()}
