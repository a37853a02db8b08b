"""What a source of reward is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]  # a prompt as the kind of data `prompts` has it
Score = Callable[[list[Row], list[str]], list[Any]]  # a number for each response, if all is well


@dataclass(frozen=True)
class Source:
    """One source of reward."""

    name: str
    weight: float
    score: Score
    model: Any = None
    """What its weights lie in, of a reward model."""
    sees_thought: bool = False
    """Whether it looks at the block of thought as well, where there is one."""


def is_score(value: Any) -> bool:
    """Whether it is a finite number, of which a float is made."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def shortened(text: str | list[dict[str, Any]]) -> str:
    """A text, or the last turn of a conversation, for a message."""
    words: str = text if isinstance(text, str) else text[-1]["content"]
    return words if len(words) <= 60 else words[:57] + "..."
