"""What was asked, and with what it was made: recipes, versions, machine, sums."""

from __future__ import annotations

from dataclasses import dataclass

from llmpipe.report.parts import Part
from llmpipe.report.pieces import Fact, known_facts
from llmpipe.report.text import Clipped, clip, plain

LONGEST = 20_000  # characters of a recipe
KEYS = (
    *("fingerprint", "identity", "finished", "seed", "llmpipe", "git", "versions", "machine"),
    *("hardware", "environment", "tokenizer", "verified"),
)


@dataclass(frozen=True)
class Origin:
    name: str
    recipe: Clipped
    facts: list[Fact]


def origin(part: Part) -> Origin:
    facts = {key: plain(part.known(key)) or None for key in KEYS}
    return Origin(part.name, clip(part.recipe, LONGEST), known_facts(facts))
