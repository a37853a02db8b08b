"""Rows -> the items of a task, each with the file and row it came from.

An item that cannot be used stops the stage: a measurement on fewer items than were given is not the
one asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from llmpipe.data import sources
from llmpipe.data.counts import in_rows
from llmpipe.data.encode import hash_of
from llmpipe.data.formats import Rejected, question
from llmpipe.data.layout import Converted, awaited, formats_of, never_came
from llmpipe.errors import Say, UserError
from llmpipe.evaluation.task import Item, OnItems, Place
from llmpipe.faults import reading
from llmpipe.recipe.sections import Rows
from llmpipe.run.artifact import Artifact


def items_of(task: OnItems, pinned: dict[str, str], say: Say) -> list[Item]:
    """Every item of a task; what of its rows nobody reads is said. Raises UserError (2) naming bad
    rows."""
    items: list[Item] = []
    errors: list[str] = []
    for source in task.data:
        origin = sources.Origin(source, pinned)
        for note in origin.notes:
            say(f"{task.label}: {source.path}: {note}")
        seen: Counter[str] = Counter()
        for at, row in rows_in(origin, task.shapes, task.task):
            try:
                if isinstance(row, Rejected):
                    raise row
                asks = hash_of(question(row.example).encode())
                place = Place(len(items), _portable(at), asks)
                items.append(task.item_of(row.example, row.others, place))
            except Rejected as error:
                errors.append(f"{at}: {error}")
            else:
                seen.update(row.values.noted)
                seen.update(f"not used: {what}" for what in row.values.unread)
        for sentence, rows in sorted(seen.items()):
            say(f"{task.label}: {source.path}: {sentence}: {in_rows(rows)}")
    if errors:
        more = f"\n... and {len(errors) - 5} more" if len(errors) > 5 else ""
        hint = "mend or remove these rows: every item has to be measured"
        raise UserError("\n".join(errors[:5]) + more, hint)
    if not items:
        raise UserError(f"tasks: {task.label}: has no items", "nothing would be measured")
    return items


def _portable(at: str) -> str:
    """No path of this machine lies in an artifact."""
    return Path(at).name if Path(at).is_absolute() else at


def rows_of(
    source: Rows,
    shapes: tuple[type, ...],
    purpose: str,
    pinned: dict[str, str],
    stream: bool = False,
) -> Iterator[tuple[str, Converted | Rejected]]:
    """File and row, and the row itself, of every row of a source, which has one of `shapes`."""
    yield from rows_in(sources.Origin(source, pinned, stream), shapes, purpose)


def rows_in(
    origin: sources.Origin, shapes: tuple[type, ...], purpose: str
) -> Iterator[tuple[str, Converted | Rejected]]:
    """`rows_of`, of a source whose files are known."""
    source = origin.source
    origin.open(shapes)
    if origin.layout.shape not in shapes:
        problem = f"{source.path}: format {origin.layout.format} does not fit {purpose}"
        raise UserError(problem, f"it takes {', '.join(formats_of(shapes))}")
    missing = awaited(origin.layout)
    for chunk in origin.chunks:
        for number, payload in chunk.rows:
            at = f"{origin.shown[chunk.file]}:{number}"
            try:
                row = sources.parse(payload)
                missing.difference_update(row)
                yield at, origin.layout.convert(row)
            except Rejected as error:
                yield at, error
    if missing:
        raise never_came(source.path, missing)


def seen_by(items: list[Item], artifacts: list[Artifact]) -> dict[str, int]:
    """How many items ask what a row asked that an artifact was trained on: {artifact: count}."""
    asks = np.array([item.asks for item in items], np.uint64)
    counts: dict[str, int] = {}
    for artifact in artifacts:
        path = artifact.published("seen.safetensors") if artifact.finished else None
        if path:
            with reading(path, "hashes of questions"):
                counts[artifact.name] = int(np.isin(asks, load_file(path)["asks"]).sum())
    return counts
