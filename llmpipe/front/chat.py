"""`llmpipe chat`: talk to a model, or to two side by side, with the template and stop tokens they were trained with.

One model streams its answer; two answer one after the other and are shown in columns. Piped input is one turn a line,
and only answers are printed then.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from llmpipe.errors import UserError
from llmpipe.models.generate import Sampling, generate, render
from llmpipe.models.hardware import has_bf16
from llmpipe.models.load import load_any
from llmpipe.models.pretrained import load_tokenizer
from llmpipe.run.artifact import template_kwargs

HELP = "/system TEXT  set the system turn   /reset  start over   /save FILE  write the conversation   /quit"


class _Stream(TextStreamer):
    """Prints words as they come."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, end="\n" if stream_end else "", flush=True)


@dataclass
class Voice:
    """One model and its side of the conversation."""

    label: str
    model: Any
    tokenizer: Any
    kwargs: dict[str, Any]
    turns: list[dict[str, str]] = field(default_factory=list)

    def reply(self, sampling: Sampling, stream: bool) -> str:
        """Answer the last turn, and keep the answer. Ctrl-C leaves the turn unanswered."""
        text = render(self.tokenizer, {"messages": self.turns}, self.kwargs)
        ids = self.tokenizer(text, add_special_tokens=not self.tokenizer.chat_template)["input_ids"]
        streamer = (
            _Stream(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        )
        said = generate(self.model, self.tokenizer, [ids], sampling, streamer)[0].text
        self.turns.append({"role": "assistant", "content": said})
        return said


def open_voice(label: str, folder: Path, base: Path | None = None) -> Voice:
    tokenizer = load_tokenizer(folder)
    model = load_any(folder, base, tokenizer, bf16=has_bf16())
    return Voice(label, model, tokenizer, template_kwargs(folder))


def chat(voices: list[Voice], sampling: Sampling, seed: int) -> None:
    """Read turns from standard input until it ends."""
    torch.manual_seed(seed)
    talking = sys.stdin.isatty()
    if talking:
        print(f"{' | '.join(voice.label for voice in voices)}\n{HELP}")
    for line in _lines(talking):
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word == "/reset":
            for voice in voices:
                voice.turns = [turn for turn in voice.turns if turn["role"] == "system"]
        elif word == "/system":
            for voice in voices:
                voice.turns = [{"role": "system", "content": rest}] if rest else []
        elif word == "/save":
            save(voices, Path(rest.strip() or "chat.jsonl"))
        elif word.startswith("/"):
            print(HELP)
        else:
            converse(voices, line, sampling, talking)


def _lines(talking: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> " if talking else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            return
        if line:
            yield line


def converse(voices: list[Voice], line: str, sampling: Sampling, talking: bool) -> None:
    """One turn of the user's and its answers; an interrupted turn is taken back."""
    before = [list(voice.turns) for voice in voices]
    for voice in voices:
        voice.turns.append({"role": "user", "content": line})
    try:
        said = [voice.reply(sampling, stream=len(voices) == 1) for voice in voices]
    except (KeyboardInterrupt, UserError) as stop:
        for voice, turns in zip(voices, before, strict=True):
            voice.turns = turns
        print(
            f"\n({stop.message if isinstance(stop, UserError) else 'stopped'}; the turn is taken back)"
        )
        return
    if len(voices) > 1:
        print(
            columns(
                [voice.label for voice in voices], said, shutil.get_terminal_size((100, 24)).columns
            )
        )


def columns(labels: list[str], texts: list[str], width: int) -> str:
    """Texts side by side, each in its share of `width` characters."""
    each = max(20, (width - 3 * (len(texts) - 1)) // len(texts))
    wrapped = [
        [label, *(part for line in text.split("\n") for part in textwrap.wrap(line, each) or [""])]
        for label, text in zip(labels, texts, strict=True)
    ]
    rows = itertools.zip_longest(*wrapped, fillvalue="")
    return "\n".join(" | ".join(cell.ljust(each) for cell in row).rstrip() for row in rows)


def save(voices: list[Voice], path: Path) -> None:
    """One `messages` row per voice, as `llmpipe sft` reads them; added to what the file holds."""
    try:
        with path.open("a", encoding="utf-8") as file:
            for voice in voices:
                file.write(
                    json.dumps({"messages": voice.turns, "model": voice.label}, ensure_ascii=False)
                    + "\n"
                )
        print(f"saved to {path}")
    except OSError as error:
        print(f"{path}: cannot be written: {error.strerror}")
