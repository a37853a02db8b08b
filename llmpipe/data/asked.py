"""Questions of an environment as a source of rows: a file that is made anew whenever it is read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llmpipe.errors import UserError
from llmpipe.faults import writing
from llmpipe.files.writing import write_whole
from llmpipe.recipe.sections import Source
from llmpipe.scores.environments import Environment

NUMBER = "number"
"""The column that says which question it is."""


def as_user(text: str) -> dict[str, str]:
    """A text as the turn of a user."""
    return {"role": "user", "content": text}


def as_source(
    environment: Environment, folder: Path, *, chats: bool, system: str | None
) -> tuple[Source, str]:
    """Every question as a row of a file in `folder`, and the file's sha256.

    `chats`: as turns for a chat template, else as text.
    """
    lines = []
    for number, question in enumerate(environment.questions()):
        prompt: Any = question
        if chats:
            before = [{"role": "system", "content": system}] if system else []
            asked = question if isinstance(question, list) else [as_user(question)]
            prompt = [*before, *asked]
        elif isinstance(question, list):
            problem = f"{environment.name}: asks in turns, and the model has no chat template"
            raise UserError(problem, "set data.template: chatml")
        lines.append(json.dumps({"prompt": prompt, NUMBER: number}, ensure_ascii=False) + "\n")
    content = "".join(lines).encode()
    sha256 = hashlib.sha256(content).hexdigest()
    path = folder / f"{environment.name.replace('/', '-')}-{sha256[:12]}.jsonl"
    with writing(folder, path):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    return Source(path=str(path), format="prompt"), sha256
