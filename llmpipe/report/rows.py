"""Prepared rows as a model will see them: every token as text, with what is learned marked.

What is shown is read back from the file that is trained on and decoded with the tokenizer that is
published, so it is what happens, not what was meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers

from llmpipe.data.pack import IGNORED
from llmpipe.data.prepared import PreparedRows
from llmpipe.data.template import shared_prefix
from llmpipe.errors import UserError
from llmpipe.faults import reading

OPEN, CLOSE = "[[", "]]"
GREEN, PLAIN = "\033[32m", "\033[0m"
TORN = "\ufffd"  # what decoding makes of a part of a character


class Example(NamedTuple):
    """What a model reads at once."""

    title: str
    """What it is of its row: `chosen`, `rejected`; empty where a row is one example."""
    ids: list[int]
    learned: list[bool]
    """Of each token."""


def show_rows(prepared: PreparedRows, cache: Path, count: int, colour: bool) -> Iterator[str]:
    """Lines that show `count` rows to train on, evenly through the file.

    Raises UserError where none are kept in `cache`.
    """
    folder = prepared.folder(cache)
    table = _table(folder / "train.arrow")
    firsts = np.concatenate([[0], np.cumsum(_rows_by_sequence(table))])  # row of each sequence
    total = int(firsts[-1])
    if not total:
        hint = "rows of a stream become tokens in training; data.stream: false keeps them"
        raise UserError(f"{folder}: no rows are kept here", hint)
    file = folder / "tokenizer" / "tokenizer.json"
    with reading(file, "a tokenizer"):
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    count = min(count, total)
    yield f"{count:,} of {total:,} rows as the model sees them, {OPEN}what it learns{CLOSE}:"
    for shown in range(count):
        number = shown * total // count
        sequence = int(np.searchsorted(firsts, number, "right")) - 1
        (written,) = table.slice(sequence, 1).to_pylist()
        for example in _rows_of(written)[number - int(firsts[sequence])]:
            yield ""
            yield _heading(number + 1, example)
            yield marked(tokenizer, example, colour)


def _heading(number: int, example: Example) -> str:
    title = f", {example.title}" if example.title else ""
    return f"row {number:,}{title}: {len(example.ids):,} tokens, {sum(example.learned):,} learned"


def _table(path: Path) -> pa.Table:
    """Every sequence of a file, mapped into memory; none where there is no file."""
    if not path.exists():
        return pa.table({})
    with reading(path, "Arrow"):
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _rows_by_sequence(table: pa.Table) -> np.ndarray:
    """How many rows share each sequence: int (sequences,)."""
    if "seq_lengths" not in table.column_names:
        return np.ones(len(table), np.int64)
    return pc.list_value_length(table["seq_lengths"]).to_numpy()


def _rows_of(written: dict[str, Any]) -> list[list[Example]]:
    """The rows in what `Kind.table` wrote of one sequence."""
    if "input_ids" not in written:
        return [_answered(written)]
    ids, labels = written["input_ids"], written["labels"]
    rows = []
    start = 0
    for length in written.get("seq_lengths") or [len(ids)]:
        stop = start + length
        learned = [label != IGNORED for label in labels[start:stop]]
        rows.append([Example("", ids[start:stop], learned)])
        start = stop
    return rows


def _answered(written: dict[str, Any]) -> list[Example]:
    """A prompt with each of its answers, learned but for their context; or the prompt alone."""
    prompt = written["prompt_ids"]
    answers = {}
    if "chosen_ids" in written:
        answers = {"chosen": "chosen", "rejected": "rejected"}
    elif "label" in written:
        answers = {"good" if written["label"] else "bad": "completion"}
    if not answers:
        return [Example("prompt", prompt, [False] * len(prompt))]
    examples = []
    for title, name in answers.items():
        ids = written[f"{name}_ids"]
        context = set(written[f"{name}_context"])
        learned = [number not in context for number in range(len(ids))]
        examples.append(Example(title, [*prompt, *ids], [False] * len(prompt) + learned))
    return examples


def marked(tokenizer: tokenizers.Tokenizer, example: Example, colour: bool = False) -> str:
    """The text of an example with its learned stretches marked.

    A character whose bytes are shared by two stretches stands in the second one.
    """
    text = tokenizer.decode(example.ids, skip_special_tokens=False)
    opening, closing = (OPEN + GREEN, PLAIN + CLOSE) if colour else (OPEN, CLOSE)
    parts = []
    start = read = 0
    for learned, tokens in groupby(example.learned):
        read += len(list(tokens))
        stop = len(text)
        if read < len(example.ids):
            beginning = tokenizer.decode(example.ids[:read], skip_special_tokens=False)
            stop = shared_prefix(beginning.rstrip(TORN), text)
        part = text[start:stop]
        parts.append(f"{opening}{part}{closing}" if learned else part)
        start = stop
    return "".join(parts)
