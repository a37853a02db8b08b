"""Rows -> the items of an evaluation, each with the file and row it came from.

    {"id", "at", "ask": {"text"} or {"messages"}, ...}
        perplexity   text | messages            generate     reference
        choice       choices, answer            preference   chosen, rejected: text or messages

An item that cannot be used stops the stage: a measurement on fewer items than were given is not the one asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from llmpipe.data import sources
from llmpipe.data.encode import hash_of
from llmpipe.data.formats import (
    Completion,
    Conversation,
    Document,
    Example,
    MultipleChoice,
    Preference,
    Rejected,
    convert,
    prompt_and_reference,
    question,
)
from llmpipe.errors import UserError
from llmpipe.recipe.sections import Rows
from llmpipe.run.artifact import Artifact

FORMATS = {  # what a task can use
    "perplexity": ("text", "alpaca", "sharegpt", "messages", "prompt-completion"),
    "generate": ("alpaca", "sharegpt", "messages", "prompt-completion", "prompt", "preference"),
    "choice": ("choice",),
    "preference": ("preference",),
}


def items_of(
    data: list[Rows], task: str, *, bare: bool, compared: bool, pinned: dict[str, str]
) -> list[dict[str, Any]]:
    """Every item of a task. `bare`: prompts as text, without a template; `compared`: answers need a reference. Raises
    UserError naming each bad row."""
    items: list[dict[str, Any]] = []
    errors: list[str] = []
    for source in data:
        for at, row in rows_of(source, FORMATS[task], task, pinned):
            try:
                if isinstance(row, Rejected):
                    raise row
                item = _item(row, task, bare)
                if compared and not item.get("reference", "").strip():
                    raise Rejected("no reference", "there is no answer to compare with")
                at = (
                    Path(at).name if Path(at).is_absolute() else at
                )  # no machine's path in an artifact
                items.append(
                    {"id": len(items), "at": at, "asks": hash_of(question(row).encode()), **item}
                )
            except Rejected as error:
                errors.append(f"{at}: {error}")
    if errors:
        more = f"\n... and {len(errors) - 5} more" if len(errors) > 5 else ""
        raise UserError(
            "\n".join(errors[:5]) + more, "mend or remove these rows: every item has to be measured"
        )
    return items


def rows_of(
    source: Rows,
    formats: tuple[str, ...],
    purpose: str,
    pinned: dict[str, str],
    stream: bool = False,
) -> Any:
    """(where, example or Rejected) for every row of a source, which has one of `formats`."""
    origin = sources.Origin(source, pinned, stream)
    origin.open()
    if origin.format not in formats:
        problem = f"{source.path}: format {origin.format} does not fit {purpose}"
        raise UserError(problem, f"it takes {', '.join(formats)}")
    for chunk in origin.chunks:
        for number, payload in chunk.rows:
            at = f"{origin.shown[chunk.file]}:{number}"
            try:
                yield at, convert(sources.parse(payload), origin.format, origin.columns)
            except Rejected as error:
                yield at, error


def example_of(item: dict[str, Any]) -> Document | Conversation | Completion:
    """The example that an item of perplexity is."""
    if "text" in item:
        return Document(item["text"])
    if "messages" in item:
        return Conversation(item["messages"], item["tools"], item.get("first", 0))
    return Completion(item["prompt"], item["completion"])


def _scored(row: Example) -> dict[str, Any]:
    """The fields of an example that `example_of` reads back."""
    fields = vars(row).copy()
    if isinstance(row, Conversation) and not row.first:
        del fields["first"]
    return fields


def _item(row: Example, task: str, bare: bool) -> dict[str, Any]:
    """One example as an item. Raises Rejected."""
    if task == "perplexity":
        return _scored(row)
    more: dict[str, Any] = {}
    if isinstance(row, MultipleChoice):
        prompt = row.prompt
        more = {"choices": row.choices, "answer": row.answer}
    elif isinstance(row, Preference) and task == "preference":
        prompt = row.prompt
        bare = isinstance(row.chosen, str)
        more = {"chosen": row.chosen, "rejected": row.rejected}
    else:
        prompt, reference = prompt_and_reference(row)
        more = {} if reference is None else {"reference": reference}
        # text to go on with, as in training
        texts = isinstance(row, Preference) and isinstance(row.chosen, str)
        bare = bare or texts or isinstance(row, Completion)
    if bare and isinstance(prompt, list):
        prompt = "\n\n".join(turn["content"] for turn in prompt)
    elif isinstance(prompt, str) and not bare:
        prompt = [{"role": "user", "content": prompt}]
    tools = {} if isinstance(row, Document | Completion) or not row.tools else {"tools": row.tools}
    return {"ask": {"text": prompt} if bare else {"messages": prompt}, **more, **tools}


def seen_by(items: list[dict[str, Any]], artifacts: list[Artifact]) -> dict[str, int]:
    """How many items ask what a row asked that an artifact was trained on: {artifact: count}."""
    asks = np.array([item["asks"] for item in items], np.uint64)
    counts: dict[str, int] = {}
    for artifact in artifacts:
        path: Path = artifact.path / "seen.safetensors"
        if artifact.finished and path.exists():
            try:
                counts[artifact.name] = int(np.isin(asks, load_file(path)["asks"]).sum())
            except (SafetensorError, KeyError, OSError) as error:
                raise UserError(f"{path}: cannot be read: {error}", code=3) from None
    return counts
