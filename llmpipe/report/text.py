"""Numbers and texts as the page shows them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeGuard

HASH = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Clipped:
    """The beginning of a text, and how many more characters it has."""

    text: str
    more: int = 0


def clip(text: object, most: int) -> Clipped:
    text = str(text)
    return Clipped(text[:most], max(len(text) - most, 0))


def plain(value: Any) -> str:
    """A value of a recipe or a manifest in a few words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(inner)}" for name, inner in value.items())
    text = str(value)
    return text[:12] if HASH.fullmatch(text) else text


def text_of(value: Any) -> str:
    """What a file holds where a text belongs; a text in full."""
    return value if isinstance(value, str) else plain(value)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of a JSON file is a number; `true` is none."""
    return type(value) in (int, float)


def number(value: Any, decimals: int | None = None, sign: str = "", digits: int = 4) -> str:
    """A number with its thousands set apart: with `decimals`, or with `digits` that count."""
    if not is_number(value):
        return "–" if value is None else str(value)
    if decimals is None and 10_000 <= abs(value) < 1e15:
        decimals = 0
    if isinstance(value, int) and not decimals:
        text = f"{value:{sign},}"  # of any size
    elif decimals is None:
        text = f"{value:{sign},.{digits}g}"
    else:
        text = f"{value:{sign},.{decimals}f}"
    return text.replace("-", "−").replace("e−0", "e−")
