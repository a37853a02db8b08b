"""Random numbers without a state: the same for a place, others for every other place."""

import itertools

import torch

from llmpipe.rl.seeds import Shuffled, Use, generator


def test_every_place_has_numbers_of_its_own():
    places = list(itertools.product((0, 1, 42), Use, (0, 1, 7), (0, 1, 7)))
    drawn = {tuple(torch.rand(4, generator=generator(*place)).tolist()) for place in places}
    assert len(drawn) == len(places)
    again = {tuple(torch.rand(4, generator=generator(*place)).tolist()) for place in places}
    assert again == drawn


def test_a_sequence_of_shuffled_epochs():
    """Each epoch has every row once, in an order of its own, wherever reading begins."""
    rows = Shuffled([{"row": i} for i in range(20)], 3, Use.ORDER)
    seen = [rows[i]["row"] for i in range(60)]
    epochs = [seen[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    afresh = Shuffled(rows.rows, 3, Use.ORDER)
    assert [afresh[i]["row"] for i in range(35, 60)] == seen[35:]
    assert [Shuffled(rows.rows, 3, Use.MIXTURE)[i]["row"] for i in range(20)] != epochs[0]
