"""`json`: the answer is JSON (RFC 8259), alone or in a fenced block. No reference is read.

NaN and Infinity are none.
"""

from __future__ import annotations

import json
from typing import Any

from llmpipe.scores.check import Check, never

FENCE = "```"


def is_right(answer: str, reference: str = "", pattern: str = "") -> bool:
    try:
        # numbers stay text, since one of JSON may have more digits than Python converts
        json.loads(_unfenced(answer), parse_int=str, parse_float=str, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def loaded(answer: str) -> Any:
    """What an answer is that is JSON. Raises ValueError or RecursionError for another."""
    return json.loads(_unfenced(answer), parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _unfenced(answer: str) -> str:
    """What stands in a block fenced by ``` or ```json, where the answer is one."""
    block = answer.strip()
    if not (block.startswith(FENCE) and block.endswith(FENCE)):
        return answer
    first, _, rest = block.partition("\n")
    named = first.removeprefix(FENCE).strip() in ("", "json")
    return rest.removesuffix(FENCE) if named else answer


CHECK = Check(is_right, never)
