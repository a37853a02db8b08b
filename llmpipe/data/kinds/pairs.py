"""Preferences, for `reward` and `dpo`: a prompt with a chosen and a rejected answer.

    train.arrow   prompt_ids, chosen_ids, rejected_ids: list<int32>; margin: float32
                  chosen_context, rejected_context: list<int32>

A context holds which tokens of an answer are the user's and the tools', between turns of the
assistant's: read, and not learned; the answer's first token is number 0. `margin` says by how much
the chosen answer is better, 0 where a row does not say. `reward` has JUDGED, without thoughts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from llmpipe.data.encode import Encoder
from llmpipe.data.formats import Example, Preference, Rejected
from llmpipe.data.judged import judged, notes_on
from llmpipe.data.kinds import Encoded, Kind, Table
from llmpipe.data.pack import LIST, Layout, Piece, Sequence, one_each
from llmpipe.data.template import shared_prefix


def encode(encoder: Encoder, example: Example, others: dict[str, Any]) -> Encoded:
    """A preference -> (prompt, chosen, rejected, margin, contexts). Raises Rejected.

    As in TRL, an answer begins where its rendering and the prompt's part, the same for both; it
    ends with its end-of-turn token. `margin` is a number, or empty.
    """
    assert isinstance(example, Preference)
    chosen = encoder.answered(example.prompt, example.chosen, example.tools)
    rejected = encoder.answered(example.prompt, example.rejected, example.tools)
    alone = encoder.prompt(example.prompt, example.tools)
    begin = min(shared_prefix(alone, answer.ids) for answer in (chosen, rejected))
    most = encoder.max_length
    if begin >= most:
        detail = f"the prompt has {begin:,} tokens, {most:,} fit with an answer"
        raise Rejected("too long", detail, max(len(chosen.ids), len(rejected.ids)))
    better = np.array(chosen.ids[begin:most], np.int32)
    worse = np.array(rejected.ids[begin:most], np.int32)
    truncated = max(len(chosen.ids), len(rejected.ids)) > most
    if not len(better) or not len(worse):
        raise Rejected("nothing to learn", "an answer has no token of its own")
    if np.array_equal(better, worse):
        reason = "cut to the same text" if truncated else "chosen equals rejected"
        raise Rejected(reason, "in tokens")
    margin = [] if example.margin is None else [example.margin]
    contexts = [np.array(it.context(begin, most), np.int32) for it in (chosen, rejected)]
    prompt = np.array(chosen.ids[:begin], np.int32)
    piece = (prompt, better, worse, np.array(margin, np.float32), *contexts)
    return Encoded([piece], truncated)


def encode_judged(encoder: Encoder, example: Example, others: dict[str, Any]) -> Encoded:
    """The same of what a judge sees of the answers, see `judged`. Raises Rejected."""
    assert isinstance(example, Preference)
    shown = judged(example)
    encoded = encode(encoder, shown, others)
    encoder.noted |= notes_on(example, shown)
    return encoded


def length(piece: Piece) -> int:
    """Tokens of the prompt with its longer answer."""
    prompt, chosen, rejected, *_ = piece
    return len(prompt) + max(len(chosen), len(rejected))


def layout(max_length: int, packing: bool) -> Layout:
    return one_each


def table(sequences: list[Sequence], packing: bool) -> Table:
    pairs = [pair for (pair,) in sequences]
    prompts, chosen, rejected, margins, *contexts = zip(*pairs, strict=True)
    columns = {
        "prompt_ids": pa.array(prompts, LIST),
        "chosen_ids": pa.array(chosen, LIST),
        "rejected_ids": pa.array(rejected, LIST),
        "margin": pa.array(
            [float(margin[0]) if len(margin) else 0.0 for margin in margins], pa.float32()
        ),
        "chosen_context": pa.array(contexts[0], LIST),
        "rejected_context": pa.array(contexts[1], LIST),
    }
    answers = sum(map(len, chosen)) + sum(map(len, rejected))
    read = sum(len(numbers) for context in contexts for numbers in context)
    return Table(
        pa.RecordBatch.from_pydict(columns),
        tokens=2 * sum(map(len, prompts)) + answers,
        supervised=answers - read,
        content=b"".join(column.tobytes() + b"|" for pair in pairs for column in pair),
    )


def filler(token: int) -> dict[str, Any]:
    """A pair whose margin is no number: a trainer knows it by that."""
    return {
        "prompt_ids": [token],
        "chosen_ids": [token],
        "rejected_ids": [token],
        "margin": math.nan,
        "chosen_context": [],
        "rejected_context": [],
    }


PAIRS = Kind(
    name="pairs",
    columns={
        "prompt": LIST,
        "chosen": LIST,
        "rejected": LIST,
        "margin": pa.list_(pa.float32()),
        "chosen_context": LIST,
        "rejected_context": LIST,
    },
    shapes=(Preference,),
    encode=encode,
    length=length,
    layout=layout,
    table=table,
    filler=filler,
    lacks="chosen and rejected answers",
    mapping="{better: chosen, worse: rejected}",
)

JUDGED = replace(PAIRS, encode=encode_judged, settings=("as a judge sees them",))
"""Pairs for a reward model."""
