"""Numbers and texts as the page shows them."""

from __future__ import annotations

import math
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
    if isinstance(value, int) and (not decimals or abs(value) >= 1e15):
        text = f"{value:{sign},}"  # of any size
    elif decimals is None or abs(value) >= 1e15:
        text = f"{value:{sign},.{digits}g}"
    else:
        text = f"{value:{sign}z,.{decimals}f}"  # z: no zero below zero
    if not text.strip("+0.,"):
        text = text.removeprefix("+")  # and none above it
    return text.replace("-", "−").replace("e−0", "e−")


def percent(share: Any) -> str:
    """A share in per cent, without the sign: 0.675 -> `68`."""
    return number(share * 100, 0) if is_number(share) else number(None)


def decimals_of(uncertainty: float) -> int:
    """Decimals that a number has a right to: two digits of its uncertainty up to 354, one above.

    The rule of the Particle Data Group (Review of Particle Physics, 5.3).
    """
    if not (math.isfinite(uncertainty) and uncertainty > 1e-12):
        return 3
    power = math.floor(math.log10(uncertainty))
    digits = 2 if uncertainty < 3.55 * 10.0**power else 1
    return min(max(digits - 1 - power, 0), 12)


def in_words(items: list[str]) -> str:
    """`a, b and c`."""
    *first, last = items or [""]
    return f"{', '.join(first)} and {last}" if first else last


def counted(count: int, noun: str, many: str | None = None) -> str:
    """`1 item`, `2 items`."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"
