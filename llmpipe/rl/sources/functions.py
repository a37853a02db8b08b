"""Functions of the user's files, which give scores, and how anything is taken from such a file."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from llmpipe.errors import UserError
from llmpipe.files.paths import expanded
from llmpipe.rl.sources.source import Row, Score


class UserFiles:
    """Files of the user's, each of which runs once for a job, whatever is taken from it: what it
    loads or counts is one for all of its functions and environments."""

    def __init__(self) -> None:
        self._modules: dict[Path, ModuleType] = {}

    def take(self, name: str, path: str, attribute: str) -> Callable[..., Any]:
        """What a file calls `attribute`; `name`: ./file.py:attribute, for messages.

        Raises UserError, with the line at which the file fails.
        """
        try:
            taken: Callable[..., Any] = getattr(self._module(expanded(path)), attribute)
        except Exception as error:  # the user's: whatever it raises is named with its line
            raise UserError(f"reward: {name}: {where(error, path)}") from error
        return taken

    def _module(self, file: Path) -> ModuleType:
        itself = file.resolve()
        if itself not in self._modules:
            self._modules[itself] = self._imported(file)
        return self._modules[itself]

    def _imported(self, file: Path) -> ModuleType:
        name = f"llmpipe_rewards_{file.stem}"
        if any(module.__name__ == name for module in self._modules.values()):
            name += f"_{len(self._modules)}"  # of another folder
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec and spec.loader  # the recipe takes only names that end in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # as dataclasses expect
        spec.loader.exec_module(module)
        return module


def of_function(name: str, every: set[str], files: UserFiles) -> Score:
    """A function of the user's file, `./file.py:name`, and the columns that any row has."""
    path, _, attribute = name.rpartition(":")
    function = files.take(name, path, attribute)

    def scores(rows: list[Row], responses: list[str]) -> list[Any]:
        columns = _columns(name, rows, every)
        prompts = [row["prompt"] for row in rows]
        try:
            values = function(prompts=prompts, completions=list(responses), **columns)
            return [value.item() if hasattr(value, "item") else value for value in values]
        except Exception as error:  # the user's: whatever it raises is named with its line
            raise UserError(f"reward: {name}: {where(error, path)}") from error

    return scores


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
