"""A block of thought in front of an answer, as thinking models write it: `<think>...</think>`.

The prompt ends in `OPENING`, so that what is drawn begins inside the block.
"""

from __future__ import annotations

TAG = "<think>"
OPENING = f"{TAG}\n"
CLOSING = "</think>"


def behind_thought(response: str) -> str:
    """What follows the block, without the white space around it; nothing where it was not closed:
    then no answer was given."""
    return response.partition(CLOSING)[2].strip()
