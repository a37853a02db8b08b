"""The graph of what was made from what: layers, no box on another, no line through a box."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from llmpipe.report.lineage import BOX_HEIGHT, BOX_WIDTH, LAYER, Edge, Lineage, Source, drawn

QUICKSTART = {
    "base": "sft eval",
    "sft": "reward dpo ppo eval",
    "reward": "ppo eval",
    "dpo": "eval",
    "ppo": "eval",
}


def graph(links: dict[str, str]) -> Lineage:
    edges = [Edge(parent, child, "model") for parent in links for child in links[parent].split()]
    names = dict.fromkeys([*links, *(edge.child for edge in edges)])
    return drawn({name: Source(name, "", "model") for name in names}, edges)


def corners(path: str) -> list[tuple[float, float]]:
    """The places that a line passes, straight parts sampled."""
    x = y = 0.0
    places = []
    for command, numbers in re.findall(r"([MCV])([^MCV]*)", path):
        values = [float(value) for value in numbers.split()]
        if command == "V":
            places += [(x, y + (values[0] - y) * part / 10) for part in range(11)]
            y = values[0]
        else:
            x, y = values[-2:]
            places.append((x, y))
    return places


def check(made: Lineage) -> None:
    for a, b in itertools.combinations(made.boxes, 2):
        assert a.y != b.y or abs(a.x - b.x) >= BOX_WIDTH, (a, b)
    for box in made.boxes:
        assert box.x >= 0 and box.x + BOX_WIDTH <= made.width
        assert box.y >= 0 and box.y + BOX_HEIGHT <= made.height
        for line in made.lines:
            for x, y in corners(line.path):
                within = box.x < x < box.x + BOX_WIDTH and box.y < y < box.y + BOX_HEIGHT
                assert not within, (box, line)


def test_the_quickstart_is_a_graph():
    made = graph(QUICKSTART)
    check(made)
    rows = {box.source.title: box.y // LAYER for box in made.boxes}
    assert rows == {"base": 0, "sft": 1, "reward": 2, "dpo": 2, "ppo": 3, "eval": 4}
    assert len(made.lines) == 10
    assert made.width < 480  # beside which a phone has to be pushed a little
    assert made.name.startswith("lineage: base → sft (model); base → eval")


@pytest.mark.parametrize("seed", range(20))
def test_nothing_lies_on_anything_else(seed):
    rng = random.Random(seed)
    count = rng.randint(2, 12)
    pairs = itertools.combinations(range(count), 2)
    edges = [Edge(f"{a}", f"{b}", "model") for a, b in pairs if rng.random() < 0.3]
    check(drawn({f"{i}": Source(f"{i}", "", "model") for i in range(count)}, edges))


def test_a_ring_ends():
    """Only a forged run has one."""
    made = graph({"a": "b", "b": "c", "c": "a"})
    assert len(made.boxes) == 3 and made.height < 4 * LAYER
    assert len(graph({"a": "a"}).boxes) == 1


def test_names_are_cut_to_their_box():
    sources = {
        "long": Source("HuggingFaceTB/SmolLM2-135M-Instruct", "", "outside"),
        "wide": Source("模型" * 20, "", "outside"),
        "short": Source("sft", "", "model"),
    }
    shorts = [box.short for box in drawn(sources, []).boxes]
    assert shorts == ["Huggi…5M-Instruct", "模型模…型模型模型", "sft"]
