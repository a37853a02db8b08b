"""Judged responses, for `kto`: a prompt, one response to it, and whether that is good.

    train.arrow   prompt_ids, completion_ids, KL_completion_ids: list<int32>; label: int8
                  completion_context, KL_completion_context: list<int32>, as in `pairs`

A row brings its own `label` (true or false, 1 or 0), or is a preference, which becomes two: its
chosen response is good, the other one is not. `KL_completion_ids` is a response to another prompt,
from which KTO estimates how far the policy is from the reference (Ethayarajh 2024, section 4.1).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from llmpipe.data.encode import Encoder
from llmpipe.data.examples import Messages, Tools, is_learned
from llmpipe.data.formats import Completion, Conversation, Example, Preference, Rejected
from llmpipe.data.kinds import Encoded, Kind, Table
from llmpipe.data.pack import LIST, Layout, Piece, Sequence, one_each
from llmpipe.data.template import shared_prefix

GOOD, BAD = 1, 0
FILLER = -1  # the label of a row of which nothing is learned

Text = str | Messages


def encode(encoder: Encoder, example: Example, others: dict[str, Any]) -> Encoded:
    """A row -> (prompt, response, label), twice for a preference. Raises Rejected."""
    if isinstance(example, Preference):
        chosen = judged(encoder, example.prompt, example.chosen, example.tools, GOOD)
        rejected = judged(encoder, example.prompt, example.rejected, example.tools, BAD)
        truncated = chosen.truncated or rejected.truncated
        return Encoded([*chosen.pieces, *rejected.pieces], truncated)
    prompt, response, tools = prompt_and_response(example)
    return judged(encoder, prompt, response, tools, label_of(others))


def prompt_and_response(example: Example) -> tuple[Text, Text, Tools]:
    """What was asked, and the turns that were judged: the last ones, all of the assistant."""
    if isinstance(example, Completion):
        return example.prompt, example.completion, None
    assert isinstance(example, Conversation)
    messages = example.messages
    if messages[-1]["role"] != "assistant":
        raise Rejected("no assistant turn", "the conversation does not end with a response")
    first = example.first or len(messages) - 1
    if not first:
        raise Rejected("no prompt", "the conversation has nothing before the response")
    spoken = (turn for turn in messages[first:] if turn["role"] == "assistant")
    if not all(map(is_learned, spoken)):
        raise Rejected(
            "loss of a turn", "a part of the response is not to be learned; all of it is"
        )
    return messages[:first], messages[first:], example.tools


def label_of(others: dict[str, Any]) -> int:
    """The row's `label`. Raises Rejected for anything but true and false, 1 and 0."""
    label = others.get("label")
    if label is None:
        raise Rejected("missing column", "label: whether the response is good, true or false")
    if label in ("true", "false", "True", "False", "1", "0"):  # a CSV knows texts only
        return GOOD if label in ("true", "True", "1") else BAD
    if not isinstance(label, bool | int | float) or label not in (GOOD, BAD):
        raise Rejected("bad label", f"{label!r:.40} is not true or false")
    return int(label)


def judged(encoder: Encoder, prompt: Text, response: Text, tools: Tools, label: int) -> Encoded:
    """One piece. As in TRL, a response begins where its rendering and the prompt's part."""
    answered = encoder.answered(prompt, response, tools)
    ids = answered.ids
    begin = shared_prefix(encoder.prompt(prompt, tools), ids)
    most = encoder.max_length
    if begin >= most:
        detail = f"the prompt has {begin:,} tokens, {most:,} fit with a response"
        raise Rejected("too long", detail, len(ids))
    learned = np.array(ids[begin:most], np.int32)
    if not len(learned):
        raise Rejected("nothing to learn", "the response has no token of its own")
    context = np.array(answered.context(begin, most), np.int32)
    piece = (np.array(ids[:begin], np.int32), learned, np.array([label], np.int32), context)
    return Encoded([piece], truncated=len(ids) > most)


def length(piece: Piece) -> int:
    """Tokens of the prompt with its response."""
    prompt, response, *_ = piece
    return len(prompt) + len(response)


def layout(max_length: int, packing: bool) -> Layout:
    return one_each


def table(sequences: list[Sequence], packing: bool) -> Table:
    pieces = [piece for (piece,) in sequences]
    prompts, responses, labels, contexts = zip(*pieces, strict=True)
    others = mismatched(prompts)
    columns = {
        "prompt_ids": pa.array(prompts, LIST),
        "completion_ids": pa.array(responses, LIST),
        "KL_completion_ids": pa.array([responses[other] for other in others], LIST),
        "label": pa.array([int(label[0]) for label in labels], pa.int8()),
        "completion_context": pa.array(contexts, LIST),
        "KL_completion_context": pa.array([contexts[other] for other in others], LIST),
    }
    answers = sum(map(len, responses))
    return Table(
        pa.RecordBatch.from_pydict(columns),
        tokens=sum(map(len, prompts)) + answers,
        supervised=answers - sum(map(len, contexts)),
        content=b"".join(column.tobytes() + b"|" for piece in pieces for column in piece),
    )


def mismatched(prompts: tuple[np.ndarray, ...]) -> list[int]:
    """For each prompt the number of the nearest row before it that asks something else.

    The first rows look at the last ones; where all prompts are equal, so are these.
    """
    count = len(prompts)
    taken = []
    for i, prompt in enumerate(prompts):
        before = ((i - step) % count for step in range(1, count))
        other = (j for j in before if not np.array_equal(prompts[j], prompt))
        taken.append(next(other, (i - 1) % count))
    return taken


def filler(token: int) -> dict[str, Any]:
    return {
        "prompt_ids": [token],
        "completion_ids": [token],
        "KL_completion_ids": [token],
        "label": FILLER,
        "completion_context": [],
        "KL_completion_context": [],
    }


LABELS = Kind(
    name="labels",
    columns={"prompt": LIST, "response": LIST, "label": LIST, "context": LIST},
    shapes=(Preference, Completion, Conversation),
    encode=encode,
    length=length,
    layout=layout,
    table=table,
    filler=filler,
    lacks="response that could be judged",
    mapping="{question: prompt, answer: completion}, beside a column label",
    also_reads=("label",),
)
