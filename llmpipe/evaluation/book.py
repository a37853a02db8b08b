"""samples.jsonl of an evaluation: what is scored is kept line by line and never scored again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.evaluation.statistics import item_key
from llmpipe.files import read_json, write_json

Line = dict[str, Any]


class Book:
    """samples.jsonl: one line per item and model, appended batch by batch; a line cut off by a kill is dropped."""

    def __init__(self, path: Path, machine: dict[str, Any]):
        """`machine`: what the numbers also depend on; one evaluation is scored with one setting (3)."""
        self.path = path
        settings = path.with_name("settings.json")
        before = read_json(settings) if path.exists() else None
        if before not in (None, machine):
            changed = ", ".join(
                f"{k} {before.get(k)} there, {v} now"
                for k, v in machine.items()
                if before.get(k) != v
            )
            raise UserError(
                f"{path}: was begun with other settings: {changed}",
                "--fresh starts anew",
                INTEGRITY,
            )
        write_json(settings, machine)
        self.lines: dict[tuple, Line] = {}
        whole = 0
        if path.exists():
            with path.open("rb") as file:
                for raw in file:
                    if not raw.endswith(b"\n"):
                        break
                    line = json.loads(raw)
                    self.lines[line["task"], line["model"], line["item"]] = line
                    whole += len(raw)
        with path.open("ab") as file:
            file.truncate(whole)

    def add(self, lines: list[Line]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
        self.lines |= {(line["task"], line["model"], line["item"]): line for line in lines}

    def of(self, task: str) -> list[Line]:
        return [line for key, line in self.lines.items() if key[0] == task]

    def close(self, tasks: list[str], models: list[str]) -> None:
        """Write the lines in a fixed order, each item of a model once."""
        rank = {name: i for i, name in enumerate([*tasks, *models])}
        order = sorted(
            self.lines.items(), key=lambda kv: (rank[kv[0][0]], rank[kv[0][1]], item_key(kv[1]))
        )
        new = self.path.with_name(f".{self.path.name}")
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for _, line in order)
        new.write_text(text, encoding="utf-8")
        new.rename(self.path)

    def missing(self, task: str, model: str, batches: list[list[Line]]) -> list[list[Line]]:
        """The batches of items that are not scored whole."""
        return [
            b for b in batches if any((task, model, item["id"]) not in self.lines for item in b)
        ]
