"""An adapter as PEFT has it, for transformers and vLLM, which take it beside its base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from llmpipe.errors import UserError
from llmpipe.export.source import Source
from llmpipe.files.json import read_json
from llmpipe.run.folders import ADAPTER

LARGEST_RANK = 16
"""Of vLLM, unless it is started with --max-lora-rank."""


def write_adapter(source: Source, folder: Path) -> list[str]:
    """Copy what was published: it has the names that PEFT gives, and these are expected.

    Raises UserError (2) for a model that is no adapter.
    """
    if source.base is None:
        problem = "formats.adapter: the model has all of its weights, and no adapter"
        raise UserError(problem, "take merged")
    for path in sorted(source.folder.iterdir()):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    return _notes_on(folder)


def _notes_on(folder: Path) -> list[str]:
    """What vLLM does not take, or takes only when it is told, of an adapter."""
    config: Any = read_json(folder / ADAPTER)
    notes = []
    base = config.get("base_model_name_or_path")
    vllm = "--tokenizer FOLDER --enable-lora --lora-modules NAME=FOLDER"
    notes.append(f"its base is {base}; vLLM: {vllm}")
    if config.get("r", 0) > LARGEST_RANK:
        notes.append(f"vLLM needs --max-lora-rank {config['r']}")
    beside = [key for key in ("modules_to_save", "trainable_token_indices") if config.get(key)]
    beside += ["dora"] if config.get("use_dora") else []
    if beside:
        notes.append(f"vLLM takes no {', '.join(beside)}: take merged there")
    return notes
