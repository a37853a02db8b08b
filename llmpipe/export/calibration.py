"""The rows that GPTQ and AWQ look at: none of them is held out."""

from __future__ import annotations

from collections.abc import Callable

from llmpipe.errors import Say, UserError
from llmpipe.evaluation.tasks.perplexity import Passage
from llmpipe.files.json import digest

MOST_ROWS = 512
"""That are looked at, as llm-compressor does unless told."""
LONGEST = 1024
"""Tokens of a row that are looked at."""


def rows_to_look_at(
    rows: list[Passage],
    held_out: list[Passage],
    tokens_of: Callable[[Passage], list[int]],
    say: Say,
) -> list[list[int]]:
    """The tokens of the first rows that are not held out as well, counted and said.

    Raises UserError (2) where there is no such row.
    """
    measured = set(map(_content, held_out))
    usable = [row for row in rows if _content(row) not in measured]
    whole = [tokens_of(row) for row in usable[:MOST_ROWS]]
    looked_at = [ids[:LONGEST] for ids in whole]
    words = f"{len(whole):,} of {len(rows):,} rows, {sum(map(len, looked_at)):,} tokens"
    if held := len(rows) - len(usable):
        words += f"; {held:,} that are held out as well are left out"
    if cut := sum(len(ids) > LONGEST for ids in whole):
        words += f"; of {cut:,} the first {LONGEST:,} tokens"
    say(f"calibration: {words}")
    if not whole:
        raise UserError("calibration: every row of it is held out as well", "take other rows")
    return looked_at


def _content(row: Passage) -> str:
    """By which a row is known again, wherever it lies."""
    return digest([row.text, row.messages, row.tools, row.prompt, row.completion])
