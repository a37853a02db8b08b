"""Functions of the user's files, which give scores, and how anything is taken from such a file."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmpipe.errors import UserError
from llmpipe.files import expanded
from llmpipe.rl.sources.source import Row, Score


def of_function(name: str, every: set[str]) -> Score:
    """A function of the user's file, `./file.py:name`, and the columns that any row has."""
    path, _, attribute = name.rpartition(":")
    function = imported(name, path, attribute)

    def scores(rows: list[Row], responses: list[str]) -> list[Any]:
        columns = _columns(name, rows, every)
        prompts = [row["prompt"] for row in rows]
        try:
            values = function(prompts=prompts, completions=list(responses), **columns)
            return [value.item() if hasattr(value, "item") else value for value in values]
        except Exception as error:  # the user's: whatever it raises is named with its line
            raise UserError(f"reward: {name}: {where(error, path)}") from error

    return scores


def imported(name: str, path: str, attribute: str) -> Callable[..., Any]:
    """What the user's file calls `attribute`; it runs once, here."""
    file = expanded(path)
    module_name = f"llmpipe_rewards_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec and spec.loader  # the recipe takes only names that end in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as dataclasses expect
    try:
        spec.loader.exec_module(module)
        function: Callable[..., Any] = getattr(module, attribute)
    except Exception as error:  # the user's: whatever it raises is named with its line
        raise UserError(f"reward: {name}: {where(error, path)}") from error
    return function


def _columns(name: str, rows: list[Row], every: set[str]) -> dict[str, list[Any]]:
    """What a function is given beside prompts and completions: a list for each column of any row,
    with None for the rows that have it not."""
    names = every.union(*(row["columns"] for row in rows))
    if taken := names & {"prompts", "completions"}:
        raise UserError(
            f"reward: {name}: the rows have a column '{taken.pop()}', a name that the call has",
            "rename it",
        )
    columns = {column: [row["columns"].get(column) for row in rows] for column in sorted(names)}
    if "reference" not in columns:
        columns["reference"] = [row["reference"] for row in rows]
    return columns


def where(error: BaseException, path: str) -> str:
    """An error of the user's file, with its line."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    name = Path(path).name
    lines = [frame.lineno for frame in frames if os.path.basename(frame.filename) == name]
    at = f"line {lines[-1]}: " if lines else ""
    text = str(error)
    return f"{at}{type(error).__name__}: {text.splitlines()[0] if text else ''}"
