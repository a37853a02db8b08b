"""The tasks of `eval`, each in a file of this folder: a `Task` that says by `task:` what it is."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from importlib import import_module
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from llmpipe.evaluation.task import Task
from llmpipe.files.paths import modules_in


def _tasks() -> Iterator[type[Task]]:
    for name in modules_in(Path(__file__).parent):
        module = import_module(f"{__name__}.{name}")
        for value in vars(module).values():
            defined = isinstance(value, type) and value.__module__ == module.__name__
            if defined and issubclass(value, Task) and "task" in value.model_fields:
                yield value


if TYPE_CHECKING:
    AnyTask = Task
else:
    AnyTask = Annotated[reduce(or_, _tasks()), Field(discriminator="task")]
