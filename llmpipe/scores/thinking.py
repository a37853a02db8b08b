"""A block of thought in front of an answer, as thinking models write it: `<think>...</think>`.

The prompt ends in `OPENING`, so that what is drawn begins inside the block.
"""

from __future__ import annotations

import re

TAG = "<think>"
OPENING = f"{TAG}\n"
CLOSING = "</think>"
ENDING = 32  # tokens at a prompt's end that hold the tag, however it is cut into them

_OPENED = re.compile(rf"{re.escape(TAG)}\s*$")


def opening_of(prompt: str) -> str:
    """The tag that a prompt ends in, with the white space behind it; nothing where what follows
    begins in no block."""
    opened = _OPENED.search(prompt)
    return opened.group() if opened else ""


def answer_to(prompt: str, response: str) -> str:
    """What a response answers: what follows the block of thought, where the prompt opens one."""
    return behind_thought(response) if opening_of(prompt) else response


def behind_thought(response: str) -> str:
    """What follows the block, without the white space around it; nothing where it was not closed:
    then no answer was given."""
    return response.partition(CLOSING)[2].strip()
