"""What was made from what: a graph from top to bottom, in layers (Sugiyama 1981).

Everything stands below what it was made from. A line that passes a layer has a place of its own in
it, so that no line crosses a box, and the places of a layer are ordered by where their lines come
from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unicodedata import east_asian_width

from llmpipe.report.parts import Part, Run
from llmpipe.report.text import in_words, text_of

BOX_WIDTH, BOX_HEIGHT = 140, 44
PASS_WIDTH = 22  # of a line that passes a layer
GAP, LAYER = 16, 84  # between two places of a layer, and from layer to layer
CHARACTERS = 17  # that fit into a box; Chinese ones are two


@dataclass(frozen=True)
class Source:
    """A box of the graph: an artifact, or a model from elsewhere."""

    title: str
    note: str
    kind: str
    """`outside`, `model` or `evaluation`."""


@dataclass(frozen=True)
class Edge:
    """Something was made from `parent`, or with it."""

    parent: str
    child: str
    role: str
    """`model`: trained from it; `measured`; or what else it was, `reward`, `reference`."""


@dataclass(frozen=True)
class Box:
    source: Source
    short: str
    x: float
    y: float


@dataclass(frozen=True)
class Line:
    path: str
    role: str


@dataclass(frozen=True)
class Lineage:
    """The graph as it is drawn."""

    boxes: list[Box]
    lines: list[Line]
    width: int
    height: int
    roles: list[str]
    """That occur, for the legend."""
    name: str
    """What it shows, in words."""


def lineage(run: Run) -> Lineage:
    sources, edges = gathered(run)
    return drawn(sources, edges)


# --- what there is --------------------------------------------------------------------------------


def gathered(run: Run) -> tuple[dict[str, Source], list[Edge]]:
    """Artifacts and the models from elsewhere, by key, and what was made from what."""
    parts = {part.name: part for part in run.parts}
    sources = {part.name: _artifact(part) for part in run.parts}
    edges: dict[tuple[str, str], Edge] = {}
    for part in run.parts:
        for field, model in part.known("models").items():
            parent = parts.get(text_of(model.get("artifact")))
            reference = text_of(model["reference"])
            if parent and ("checkpoint" in model or _is_the_same(parent, model)):
                key = parent.name
            else:
                key = f"from {reference}"
                note = "made anew since" if parent else "from outside"
                sources.setdefault(key, Source(reference, note, "outside"))
            edge = Edge(key, part.name, _role(part, text_of(field)))
            if edges.get((key, part.name), edge).role != "model":
                edges[key, part.name] = edge
            edges.setdefault((key, part.name), edge)
    return sources, list(edges.values())


def _artifact(part: Part) -> Source:
    state = part.status.partition(",")[0].partition(":")[0]
    made = text_of(part.known("kind") or part.stage) if part.name == part.stage else part.stage
    note = made if state == "finished" else state
    return Source(part.name, note, "evaluation" if part.is_evaluation else "model")


def _role(part: Part, field: str) -> str:
    if part.is_evaluation:
        return "measured"
    return "model" if field == "model" else field.split(".")[0]


def _is_the_same(parent: Part, model: dict[str, Any]) -> bool:
    """Whether an artifact is still the one that was used."""
    return parent.known("fingerprint") in ({}, model.get("fingerprint"))


# --- where it lies --------------------------------------------------------------------------------


@dataclass
class _Place:
    """A box, or a line on its way, in one layer."""

    key: str
    width: float
    x: float = 0

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def drawn(sources: dict[str, Source], edges: list[Edge]) -> Lineage:
    layer = _layers(sources, edges)
    chains = [_chain(edge, layer) for edge in edges]
    layers = _ordered(layer, chains)
    places = {place.key: place for row in layers for place in row}
    _centred(layers, chains, places)
    right = max((place.x + place.width for place in places.values()), default=0)
    boxes = [
        Box(source, _short(source.title), round(places[key].x, 1), layer[key] * LAYER)
        for key, source in sources.items()
    ]
    lines = [
        Line(_path(chain, places, layer[edge.parent]), edge.role)
        for edge, chain in zip(edges, chains, strict=True)
    ]
    said = "; ".join(
        f"{sources[e.parent].title} → {sources[e.child].title} ({e.role})" for e in edges
    )
    return Lineage(
        boxes=boxes,
        lines=lines,
        width=round(right) + 2,
        height=max(layer.values(), default=0) * LAYER + BOX_HEIGHT + 2,
        roles=list(dict.fromkeys(edge.role for edge in edges)),
        name=f"lineage: {said or in_words([source.title for source in sources.values()])}",
    )


def _layers(sources: dict[str, Source], edges: list[Edge]) -> dict[str, int]:
    """The longest way to each box; a ring, which only a forged run has, ends at the bottom."""
    layer = dict.fromkeys(sources, 0)
    for _ in sources:
        for edge in edges:
            below = min(layer[edge.parent] + 1, len(sources) - 1)
            layer[edge.child] = max(layer[edge.child], below)
    return layer


def _chain(edge: Edge, layer: dict[str, int]) -> list[str]:
    """The places of an edge from its parent down to its child."""
    passed = range(layer[edge.parent] + 1, layer[edge.child])
    return [edge.parent, *(f"{edge.parent}\n{edge.child}\n{row}" for row in passed), edge.child]


def _ordered(layer: dict[str, int], chains: list[list[str]]) -> list[list[_Place]]:
    """Layers of places, each ordered by the middle of what it hangs from."""
    rows: list[list[_Place]] = [[] for _ in range(max(layer.values(), default=0) + 1)]
    for key, depth in layer.items():
        rows[depth].append(_Place(key, BOX_WIDTH))
    for chain in chains:
        first = layer[chain[0]]
        for depth, key in enumerate(chain[1:-1], first + 1):
            rows[depth].append(_Place(key, PASS_WIDTH))
    links = [link for chain in chains for link in pairwise(chain)]
    for _ in range(4):
        for above, row in pairwise(rows):
            _order(row, above, [(child, parent) for parent, child in links])
        for below, row in pairwise(reversed(rows)):
            _order(row, below, links)
    return rows


def _order(row: list[_Place], fixed: list[_Place], links: list[tuple[str, str]]) -> None:
    """Order a layer by the mean place, in the layer beside it, of what each is linked with."""
    index = {place.key: i for i, place in enumerate(fixed)}
    own = {place.key: i for i, place in enumerate(row)}

    def mean(place: _Place) -> float:
        linked = [index[other] for key, other in links if key == place.key and other in index]
        return sum(linked) / len(linked) if linked else own[place.key]

    row.sort(key=mean)


def _centred(
    layers: list[list[_Place]], chains: list[list[str]], places: dict[str, _Place]
) -> None:
    """Each layer as wide as it is, its places moved towards what they are linked with."""
    for row in layers:
        _spread(row, [0.0] * len(row))
    neighbours: dict[str, list[str]] = {}
    for chain in chains:
        for parent, child in pairwise(chain):
            neighbours.setdefault(parent, []).append(child)
            neighbours.setdefault(child, []).append(parent)
    for row in [*layers, *reversed(layers)] * 4:
        wanted = []
        for place in row:
            middles = [places[key].middle for key in neighbours.get(place.key, ())]
            middle = sum(middles) / len(middles) if middles else place.middle
            wanted.append(middle - place.width / 2)
        _spread(row, wanted)
    left = min((place.x for place in places.values()), default=0)
    for place in places.values():
        place.x += 1 - left


def _spread(row: list[_Place], wanted: list[float]) -> None:
    """Places as near as can be to where they are wanted, in their order and not over each other."""
    groups: list[tuple[list[int], float]] = []  # that touch, and where the first of them begins
    for i in range(len(row)):
        members, begin = [i], wanted[i]
        while groups and groups[-1][1] + _width(row, groups[-1][0]) > begin:
            members = groups.pop()[0] + members
            begin = sum(wanted[k] - _offset(row, members, k) for k in members) / len(members)
        groups.append((members, begin))
    for members, begin in groups:
        for k in members:
            row[k].x = begin + _offset(row, members, k)


def _offset(row: list[_Place], members: list[int], k: int) -> float:
    return sum(row[i].width + GAP for i in members if i < k)


def _width(row: list[_Place], members: list[int]) -> float:
    return sum(row[i].width + GAP for i in members)


def _path(chain: list[str], places: dict[str, _Place], first: int) -> str:
    """From the lower edge of a box through the places that it passes to the upper edge of one."""
    return "".join(_pieces(chain, places, first))


def _pieces(chain: list[str], places: dict[str, _Place], first: int) -> Iterator[str]:
    y = first * LAYER + BOX_HEIGHT
    yield f"M{places[chain[0]].middle:.1f} {y}"
    for depth, (above, key) in enumerate(pairwise(chain), first + 1):
        a, b = places[above].middle, places[key].middle
        end, bend = depth * LAYER, (depth * LAYER + y) / 2
        yield f"C{a:.1f} {bend:g} {b:.1f} {bend:g} {b:.1f} {end}"
        y = end
        if key != chain[-1]:
            y += BOX_HEIGHT
            yield f"V{y}"


def _short(title: str) -> str:
    if _columns(title) <= CHARACTERS:
        return title
    end = title[-11:]
    while _columns(end) > CHARACTERS - 6:
        end = end[1:]
    begin = title[:5]
    while _columns(begin) > CHARACTERS - 1 - _columns(end):
        begin = begin[:-1]
    return f"{begin}…{end}"


def _columns(text: str) -> int:
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)
