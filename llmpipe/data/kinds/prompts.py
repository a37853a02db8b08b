"""Prompts to answer, for `ppo`, `grpo` and `sample`, with what rewards read of a row.

    train.arrow   prompt_ids: list<int32>; row: string, JSON

`row` holds the prompt (text or messages), its tools, the `reference` answer that the row has, its
other `columns`, as the recipe calls them, and, where there are verifiers, `right`: the answers that
they compare with, any of which is right. Where programs are run, `tests` are what against; where an
environment takes turns, `at` is the row's file and line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from llmpipe.data.encode import Encoder
from llmpipe.data.formats import (
    Completion,
    Conversation,
    Document,
    Example,
    Preference,
    Prompt,
    Rejected,
    prompt_and_reference,
)
from llmpipe.data.kinds import Encoded, Kind, Table
from llmpipe.data.pack import LIST, Layout, Piece, Sequence, one_each
from llmpipe.data.references import right_answers
from llmpipe.scores.confined import tests_of
from llmpipe.scores.references import Comparison
from llmpipe.scores.thinking import ENDING, opening_of


class Needs(NamedTuple):
    """What a recipe asks of prompts beside right answers."""

    thinks: bool = False
    """Whether an answer begins with a block of thought."""
    tests: bool = False
    """Whether there have to be tests, which a program is run against."""
    turns: bool = False
    """Whether an environment answers what the policy says, and so needs a conversation."""

    @property
    def settings(self) -> list[str]:
        """As `Kind.settings` has them; nothing where nothing is needed, as before there were
        needs."""
        return [name for name, needed in self._asdict().items() if needed]


NOTHING = Needs()

UNTOLD = (
    "prompts end in <think>, and rollout.think is off: rewards look at the block of thought as well"
)


def encode(
    encoder: Encoder,
    example: Example,
    others: dict[str, Any],
    comparisons: Items[Comparison] = (),
    all_read: bool = False,
    needs: Needs = NOTHING,
) -> Encoded:
    """A row that asks something -> its tokens up to where an answer begins, and the row, as JSON
    in UTF-8. Raises Rejected, also for what no answer can equal by the `comparisons`."""
    prompt, reference = prompt_and_reference(example)
    if needs.turns and isinstance(prompt, str):
        raise Rejected("no conversation", "the environment takes turns, and the prompt is a text")
    right = right_answers(reference, others, comparisons, all_read=all_read and not reference)
    tools = None if isinstance(example, Document | Completion) else example.tools
    ids = encoder.prompt(prompt, tools, think=needs.thinks)
    if len(ids) > encoder.max_length:
        detail = f"the prompt has {len(ids):,} tokens, {encoder.max_length:,} fit"
        raise Rejected("too long", detail, len(ids))
    if not ids:
        raise Rejected("empty text", "the prompt has no token")
    if not needs.thinks and opening_of(encoder.tokenizer.backend.decode(ids[-ENDING:], False)):
        encoder.noted.add(UNTOLD)
    row: dict[str, Any] = {
        "prompt": prompt,
        "tools": tools,
        "reference": reference,
        "columns": others,
    }
    if comparisons:
        row["right"] = right
    if needs.tests:
        row["tests"] = _tests(others)
    if needs.turns:
        row["at"] = encoder.at
    text = json.dumps(row, default=str).encode()
    return Encoded([(np.array(ids, np.int32), np.frombuffer(text, np.uint8))])


def _tests(others: dict[str, Any]) -> list[str]:
    try:
        return tests_of(others.get("tests"))
    except ValueError as error:
        raise Rejected("no tests", str(error)) from None


def length(piece: Piece) -> int:
    return len(piece[0])


def layout(max_length: int, packing: bool) -> Layout:
    return one_each


def table(sequences: list[Sequence], packing: bool) -> Table:
    prompts = [prompt for (prompt,) in sequences]
    columns = {
        "prompt_ids": pa.array([ids for ids, _ in prompts], LIST),
        "row": [row.tobytes().decode() for _, row in prompts],
    }
    return Table(
        pa.RecordBatch.from_pydict(columns),
        tokens=sum(len(ids) for ids, _ in prompts),
        supervised=0,
        content=b"".join(ids.tobytes() + b"|" + row.tobytes() for ids, row in prompts),
    )


PROMPTS = Kind(
    name="prompts",
    columns={"prompt": LIST, "row": pa.list_(pa.uint8())},
    shapes=(Conversation, Completion, Preference, Prompt),
    encode=encode,
    length=length,
    layout=layout,
    table=table,
    learned=False,
    keeps_others=True,
)


def compared(comparisons: Items[Comparison], *, all_read: bool, needs: Needs = NOTHING) -> Kind:
    """PROMPTS whose right answers are those that verifiers can give more than 0 for.

    `all_read`: nothing else reads the column `answer`, so that one which no verifier reads is a
    mistake.
    """
    check = partial(encode, comparisons=tuple(comparisons), all_read=all_read, needs=needs)
    settings = (*comparisons, all_read, *needs.settings)
    return replace(PROMPTS, encode=check, settings=settings, thinks=needs.thinks)
