"""In what order rewards score, and what is whole meanwhile."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from llmpipe.errors import UserError
from llmpipe.rl import rewards
from llmpipe.rl.sampling import Said
from llmpipe.run.checkpoints import Alone


class World(Alone):
    def agree(self, error):
        if error:
            raise error


@pytest.fixture
def seen(monkeypatch):
    """What happens, in order."""
    seen = []

    @contextmanager
    def gathered(model):
        seen.append(f"{model} whole")
        yield
        seen.append(f"{model} in parts")

    monkeypatch.setattr(rewards, "gathered", gathered)
    return seen


def sources(seen, fails=""):
    def one(name, weight, score, model=None):
        def scores(rows, responses):
            seen.append(name)
            if name == fails:
                raise UserError(f"{name} fails")
            return [score] * len(rows)

        return rewards.Source(name, weight, scores, model)

    made = rewards.Rewards.__new__(rewards.Rewards)
    made.thinks = False
    made.sources = [one("f", 2.0, 1.0), one("a", 1.0, 3.0, "A"), one("b", 0.5, 4.0, "B")]
    return made


def said(*responses):
    return [Said({}, None, response) for response in responses]


def test_one_reward_model_is_whole_at_a_time_and_functions_come_last(seen):
    scores = rewards.scored_together(sources(seen), said("x", "y"), World())
    assert seen == ["A whole", "a", "A in parts", "B whole", "b", "B in parts", "f"]
    assert scores.total == [2 + 3 + 2] * 2
    assert list(scores.by_source) == ["f", "a", "b"], "as the recipe has them"


def test_who_has_no_rows_or_fails_is_there_when_the_next_is_gathered(seen):
    """All processes gather as often: a collective that one skips would hold the others."""
    assert rewards.scored_together(sources(seen), [], World()).total == []
    gatherings = ["A whole", "A in parts", "B whole", "B in parts"]
    assert seen == gatherings
    seen.clear()
    with pytest.raises(UserError, match="a fails"):
        rewards.scored_together(sources(seen, "a"), said("x"), World())
    assert seen == [gatherings[0], "a", *gatherings[1:]]
