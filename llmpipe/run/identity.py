"""What decides a result, and when two recipes ask for the same one.

Content decides. Where a file lies and what it is called does not, and neither does the spelling of
a reference: `./rows.jsonl`, its absolute path and a copy under another name are one thing.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from llmpipe.data.sources import hub_key, identity_of
from llmpipe.files.json import digest
from llmpipe.recipe.places import portable, portable_paths, value_at, with_values
from llmpipe.recipe.sections import Recipe, science
from llmpipe.run.manifest import Asked

HASH = re.compile(r"\S{64}")

LONGEST = 60
"""Characters of a value in a message."""


def meanings(recipe: Recipe, asked: Asked) -> dict[str, Any]:
    """What each field stands for that names rows, a file or a model, by its path in the recipe."""
    meant: dict[str, Any] = dict(asked.models)
    for field, source in recipe.rows().items():
        revision = None if source.is_here else asked.content[hub_key(source)]
        meant[field] = identity_of(source, asked.files(field), revision)
    for field, path in recipe.files().items():
        hashes = [sha256 for _, sha256 in asked.files(field)]
        text = value_at(asked.recipe, field)
        meant[field] = [text.removeprefix(portable(path)), hashes]
    return meant


def meaning(recipe: Recipe, asked: Asked) -> dict[str, Any]:
    """The recipe with what its names stand for in their place: equal for equal results.

    `asked.recipe` holds the fields of `recipe`.
    """
    replaced = with_values(asked.recipe, meanings(recipe, asked))
    assert isinstance(replaced, dict)
    return replaced


def identity(recipe: Recipe, asked: Asked) -> str:
    return digest(meaning(recipe, asked))


def document(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The fields of a recipe that decide the result, without a path of this machine."""
    values: dict[str, Any] = with_values(science(recipe), portable_paths(recipe))
    return values | {"stage": stage}


def changed_fields(
    old: Asked, new: Asked, same: set[str] | frozenset[str] = frozenset()
) -> list[tuple[str, Any, Any]]:
    """(field, old value, new value) of what differs, less the fields that mean the `same`."""

    def spelled_otherwise(field: str) -> bool:
        return any(field == at or field.startswith((f"{at}.", f"content.{at}:")) for at in same)

    every = changes(asdict(old), asdict(new))
    return [change for change in every if not spelled_otherwise(change[0])]


def changes(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Every (dotted path, old value, new value) in which two documents differ."""
    pairs: dict[Any, tuple[Any, Any]]
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        pairs = {key: (old.get(key, "absent"), new.get(key, "absent")) for key in keys}
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = dict(enumerate(zip(old, new, strict=True)))
    else:
        return [] if old == new else [(path.removeprefix("recipe."), old, new)]
    prefix = f"{path}." if path else ""
    return [change for key, pair in pairs.items() for change in changes(*pair, f"{prefix}{key}")]


def short(value: Any) -> str:
    """A value as a message shows it: a hash by its beginning, a long text cut."""
    text = str(value)
    if HASH.fullmatch(text):
        return text[:12]
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
