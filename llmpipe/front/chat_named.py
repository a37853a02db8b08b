"""What `chat` is given by name: an artifact, a model of any kind, or one format of an export."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmpipe.errors import Say, UserError
from llmpipe.front.ahead import EXTRAS, to_install
from llmpipe.recipe.names import ARTIFACT
from llmpipe.run.exported import exported
from llmpipe.run.folders import reader_of
from llmpipe.run.reference import Model, Use, resolve


@dataclass(frozen=True)
class Named:
    """A verified model."""

    label: str
    model: Model
    template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template in training, of an export: other folders know them."""
    in_llama_cpp: bool = False
    """Whether llama.cpp answers, as it will elsewhere."""


def named(name: str, say: Say) -> Named:
    """What a name of the command line means.

    Raises UserError (2) for what is no model, or needs what is not installed, and (3) for what is
    not finished or is damaged.
    """
    if name.startswith(ARTIFACT):
        hint = f"give its path, such as runs/NAME/{name.removeprefix(ARTIFACT)}"
        raise UserError(f"chat: {name}: is of a run, and chat knows of none", hint)
    export = exported(name, "chat")
    if export is None:
        # a folder needs no ./ here
        reference = os.path.abspath(name) if os.path.exists(name) else name
        return Named(name, resolve(reference, Use("chat", ("model", "adapter")), Path()))
    _refuse_unread(name, export.folder)
    in_llama_cpp = export.kind == "gguf" and find_spec("llama_cpp") is not None
    if export.kind == "gguf" and not in_llama_cpp:
        say(f"{name}: read by transformers; for llama.cpp: pip install '{EXTRAS['llama_cpp']}'")
    return Named(name, export.model, export.export.template_kwargs, in_llama_cpp)


def _refuse_unread(name: str, folder: Path) -> None:
    """Raise UserError (2) where the package is not installed that reads weights of few bits."""
    package = reader_of(folder)
    if package and find_spec(package) is None:
        problem = f"chat: {name}: {package} is not installed, which reads its weights"
        raise UserError(problem, to_install(package))
