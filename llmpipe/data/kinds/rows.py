"""Texts and conversations to learn, for `sft`: as many in a sequence as fit, or one each.

A token is learned when it overlaps a span of the assistant's; labels elsewhere are -100.

    train.arrow   input_ids, labels: list<int32>; packed also seq_lengths: list<int32>

A packed sequence keeps the lengths of its documents in `seq_lengths`; the trainer starts positions
anew at each, so that documents do not see one another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from llmpipe.data.encode import Encoder
from llmpipe.data.formats import Completion, Conversation, Document, Example, Rejected
from llmpipe.data.kinds import Encoded, Kind, Table
from llmpipe.data.pack import IGNORED, LIST, BestFit, Layout, Piece, Sequence, one_each
from llmpipe.data.template import shared_prefix


def encode(encoder: Encoder, example: Example, others: dict[str, Any]) -> Encoded:
    """An example -> ids and labels, int32 (n,) each, 0 < n <= max_length. Raises Rejected."""
    match example:
        case Document():
            return _document(encoder, example)
        case Completion():
            return _completion(encoder, example)
        case Conversation():
            return _conversation(encoder, example)
    raise TypeError(f"{type(example).__name__}: the format is none that {ROWS.name} take")


def _document(encoder: Encoder, example: Document) -> Encoded:
    """A text is learned as a whole; a longer one becomes several pieces."""
    ids = _ended(encoder, example.text.removesuffix(encoder.text_eos))
    size = encoder.max_length
    parts = [ids[start : start + size] for start in range(0, len(ids), size)]
    return Encoded([(part, part) for part in parts])


def _completion(encoder: Encoder, example: Completion) -> Encoded:
    """As TRL does: learned is from where the tokens of the prompt and of both together differ."""
    ids = _ended(encoder, example.prompt + example.completion.removesuffix(encoder.text_eos))
    if len(ids) > encoder.max_length:
        detail = f"{len(ids):,} tokens, {encoder.max_length:,} fit"
        raise Rejected("too long", detail, len(ids))
    labels = ids.copy()
    if not encoder.learn_all:
        begin = len(encoder.bos)
        alone = encoder.tokenizer.ids(example.prompt)
        labels[: begin + shared_prefix(alone, ids[begin:-1].tolist())] = IGNORED
    return Encoded([(ids, labels)])


def _ended(encoder: Encoder, text: str) -> np.ndarray:
    """Tokens of a text with its first and its last one."""
    numbers = encoder.text(text)
    if not numbers:
        raise Rejected("nothing to learn", "the text has no token")
    return np.array([*encoder.bos, *numbers, encoder.eos], np.int32)


def _conversation(encoder: Encoder, example: Conversation) -> Encoded:
    """A conversation, cut after the last whole turn of the assistant's that fits."""
    rendered = encoder.conversation(example.messages, example.tools, example.first)
    numbers = rendered.ids
    if numbers[:2] == [encoder.tokenizer.id("bos_token")] * 2:
        raise Rejected("doubled BOS", "the conversation begins with the first token twice")
    spoken = rendered.spoken()
    if not any(start < stop for start, stop in spoken):
        raise Rejected("nothing to learn", "no token is the assistant's")
    stops = [stop for _, stop in spoken if numbers[stop - 1] in encoder.ends]
    if not stops:
        detail = "no assistant turn ends with the end-of-turn token"
        raise Rejected("end of turn not supervised", detail)
    total = len(numbers)
    if total > encoder.max_length:
        total = max((stop for stop in stops if stop <= encoder.max_length), default=0)
    if not total:
        detail = f"and no assistant turn ends within {encoder.max_length:,}"
        raise Rejected("too long", f"{len(numbers):,} tokens, {detail}", len(numbers))
    ids = np.array(numbers[:total], np.int32)
    labels = ids.copy() if encoder.learn_all else np.full(total, IGNORED, np.int32)
    for start, stop in spoken:
        labels[start:stop] = ids[start:stop]
    return Encoded([(ids, labels)], truncated=total < len(numbers))


def length(piece: Piece) -> int:
    return len(piece[0])


def layout(max_length: int, packing: bool) -> Layout:
    return BestFit(max_length) if packing else one_each


def table(sequences: list[Sequence], packing: bool) -> Table:
    lengths = [[len(ids) for ids, _ in pieces] for pieces in sequences]
    sums = np.array([sum(parts) for parts in lengths])
    ids = np.concatenate([ids for pieces in sequences for ids, _ in pieces])
    labels = np.concatenate([labels for pieces in sequences for _, labels in pieces])
    offsets = pa.array(np.concatenate([[0], np.cumsum(sums)]), pa.int32())
    columns = {
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids)),
        "labels": pa.ListArray.from_arrays(offsets, pa.array(labels)),
    }
    if packing:
        columns["seq_lengths"] = pa.array(lengths, LIST)
    return Table(
        pa.RecordBatch.from_pydict(columns),
        tokens=len(ids),
        supervised=int((labels != IGNORED).sum()),
        content=sums.tobytes() + ids.tobytes() + labels.tobytes(),
    )


def filler(token: int) -> dict[str, Any]:
    return {"input_ids": [token] * 2, "labels": [IGNORED] * 2, "seq_lengths": [2]}


ROWS = Kind(
    name="rows",
    columns={"ids": LIST, "labels": LIST},
    shapes=(Document, Completion, Conversation),
    encode=encode,
    length=length,
    layout=layout,
    table=table,
    filler=filler,
)
