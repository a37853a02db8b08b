"""`llmpipe chat`: talk to a model, or to two side by side, with their own templates.

One model streams its answer; two answer one after the other and are shown in columns. Piped input
is one turn a line, and only answers are printed then; what else there is to say goes to stderr.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from llmpipe.errors import Say, UserError
from llmpipe.front.chat_named import Named
from llmpipe.front.readable import make_readable
from llmpipe.models.device import has_bf16
from llmpipe.models.drawing.draw import Sampling
from llmpipe.models.generate import Response, generate, render
from llmpipe.models.load import load_any
from llmpipe.models.pretrained import load_tokenizer
from llmpipe.run.artifact import template_kwargs
from llmpipe.run.context import tokens_of
from llmpipe.run.reference import model_folder
from llmpipe.scores.thinking import opening_of

HELP = (
    "/system TEXT  set the system turn   /reset  start over   "
    "/save FILE  write the conversation   /quit"
)


class _Stream(TextStreamer):  # type: ignore[misc]  # transformers is not read by the type checker
    """Prints words as they come."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, end="\n" if stream_end else "", flush=True)


@dataclass(frozen=True)
class Reply:
    """What a model answers."""

    text: str
    cut: str = ""
    """Why it ends where it does, unless the model ended it."""


class Engine(Protocol):
    """A model that answers."""

    @property
    def context(self) -> int | None:
        """Tokens that it takes, with its answer."""

    def written(self, turns: list[dict[str, str]]) -> str:
        """A conversation as the model sees it. Raises UserError (2) where its template refuses."""

    def tokens(self, text: str) -> list[int]:
        """Of a conversation that is written."""

    def answer(self, ids: list[int], sampling: Sampling, stream: bool) -> Response:
        """What comes behind them; shown as it comes where it is to `stream`."""


@dataclass
class Transformers:
    """A model in transformers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template_kwargs: dict[str, Any]

    @property
    def context(self) -> int | None:
        return tokens_of(self.model.config.to_dict())

    def written(self, turns: list[dict[str, str]]) -> str:
        return render(self.tokenizer, {"messages": turns}, self.template_kwargs)

    def tokens(self, text: str) -> list[int]:
        # a template writes the special tokens itself
        bare = not self.tokenizer.chat_template
        ids: list[int] = self.tokenizer(text, add_special_tokens=bare)["input_ids"]
        return ids

    def answer(self, ids: list[int], sampling: Sampling, stream: bool) -> Response:
        streamer = None
        if stream:
            streamer = _Stream(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        responses: list[Response] = generate(self.model, self.tokenizer, [ids], sampling, streamer)
        return responses[0]


@dataclass
class Voice:
    """One model and its side of the conversation."""

    label: str
    engine: Engine
    turns: list[dict[str, str]] = field(default_factory=list)

    def reply(self, sampling: Sampling, stream: bool) -> Reply:
        """Answer the last turn, as far as the context goes, and keep the answer. Ctrl-C leaves the
        turn unanswered.

        Raises UserError (2) where the conversation fills the context.
        """
        engine = self.engine
        text = engine.written(self.turns)
        ids = engine.tokens(text)
        context = engine.context
        fitting = sampling if context is None else _fitting(sampling, len(ids), context)
        response = engine.answer(ids, fitting, stream)
        # the next turn is asked behind all that the model saw, a tag of the template's as well
        said = opening_of(text) + response.text
        self.turns.append({"role": "assistant", "content": said})
        if response.ended:
            return Reply(response.text)
        why = "--max-new-tokens allows no more"
        if fitting != sampling:
            why = (
                f"the model takes {context:,} with the conversation, whatever --max-new-tokens "
                f"allows ({sampling.max_new_tokens:,}); /reset starts over"
            )
        return Reply(response.text, f"cut after {response.tokens:,} tokens: {why}")


def _fitting(sampling: Sampling, prompt: int, context: int) -> Sampling:
    """As many new tokens as there is room for behind a prompt of so many."""
    if prompt >= context:
        raise UserError(
            f"a conversation of {prompt:,} tokens leaves no room for an answer in the {context:,} "
            "that the model takes",
            "/reset starts over",
        )
    return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, context - prompt))


def open_voice(
    label: str, folder: Path, base: Path | None = None, kwargs: dict[str, Any] | None = None
) -> Voice:
    """`folder`: of a model, or of an adapter on `base`; `kwargs`: variables of the chat template in
    training, where the folder does not know them."""
    tokenizer = load_tokenizer(folder)
    model = load_any(folder, base, tokenizer, bf16=has_bf16(), alone=True)
    kwargs = template_kwargs(folder) if kwargs is None else kwargs
    return Voice(label, Transformers(model, tokenizer, kwargs))


def open_voices(named: list[Named], seed: int, say: Say) -> list[Voice]:
    """Load models of any kind; an adapter that has to be merged first is not kept so.

    `seed`: of what llama.cpp draws.
    """
    voices = []
    with TemporaryDirectory() as converted:
        for one in named:
            model = one.model
            if one.in_llama_cpp:
                from llmpipe.models.in_llama_cpp import LlamaCpp  # which may not be installed

                assert model.folder is not None
                engine = LlamaCpp(model.folder, one.template_kwargs or {}, seed)
                voices.append(Voice(one.label, engine))
                continue
            folder = make_readable(model, Path(converted), say, few_bits=True)
            base = None
            if model.base and model.is_adapter:
                base = model_folder(model.base, Path(converted))
            voices.append(open_voice(one.label, folder, base, one.template_kwargs))
    return voices


def chat(voices: list[Voice], sampling: Sampling, seed: int) -> None:
    """Read turns from standard input until it ends.

    Raises UserError (2) at the end where piped turns got no answer.
    """
    torch.manual_seed(seed)
    typed = sys.stdin.isatty()
    if typed:
        print(" | ".join(voice.label for voice in voices))
        print(HELP)
    asked = answered = 0
    for line in _lines("> " if typed else ""):
        command, _, argument = line.partition(" ")
        if command == "/quit":
            break
        if command == "/reset":
            for voice in voices:
                voice.turns = [turn for turn in voice.turns if turn["role"] == "system"]
        elif command == "/system":
            for voice in voices:
                voice.turns = [{"role": "system", "content": argument}] if argument else []
        elif command == "/save":
            save(voices, Path(argument.strip() or "chat.jsonl"))
        elif command.startswith("/"):
            print(HELP)
        else:
            asked += 1
            answered += converse(voices, line, sampling, typed=typed)
    if answered < asked and not typed:
        raise UserError(f"{asked - answered:,} of {asked:,} turns got no answer")


def _lines(prompt: str) -> Iterator[str]:
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            return
        if line:
            yield line


def converse(voices: list[Voice], line: str, sampling: Sampling, *, typed: bool) -> bool:
    """One turn of the user's and its answers; whether there are any: an interrupted turn is taken
    back. Ctrl-C ends piped input.
    """
    notes = sys.stdout if typed else sys.stderr
    before = [list(voice.turns) for voice in voices]
    for voice in voices:
        voice.turns.append({"role": "user", "content": line})
    try:
        replies = [voice.reply(sampling, stream=len(voices) == 1) for voice in voices]
    except (KeyboardInterrupt, UserError) as stop:
        if not typed and not isinstance(stop, UserError):
            raise
        for voice, turns in zip(voices, before, strict=True):
            voice.turns = turns
        reason = stop.message if isinstance(stop, UserError) else "stopped"
        print(f"\n({reason}; the turn is taken back)", file=notes)
        return False
    if len(voices) > 1:
        width = shutil.get_terminal_size((100, 24)).columns
        texts = [reply.text for reply in replies]
        print(columns([voice.label for voice in voices], texts, width))
    for voice, reply in zip(voices, replies, strict=True):
        if reply.cut:
            print(f"({voice.label}: {reply.cut})", file=notes)
    return True


def columns(labels: list[str], texts: list[str], width: int) -> str:
    """Texts side by side, each in its share of `width` characters."""
    separators = 3 * (len(texts) - 1)
    share = max(20, (width - separators) // len(texts))
    cells = [[label, *_wrapped(text, share)] for label, text in zip(labels, texts, strict=True)]
    lines = []
    for row in itertools.zip_longest(*cells, fillvalue=""):
        lines.append(" | ".join(cell.ljust(share) for cell in row).rstrip())
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters; empty ones stay."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines += textwrap.wrap(paragraph, width) or [""]
    return lines


def save(voices: list[Voice], path: Path) -> None:
    """One `messages` row per voice, as `llmpipe sft` reads them; added to what the file holds."""
    try:
        with path.open("a", encoding="utf-8") as file:
            for voice in voices:
                row = {"messages": voice.turns, "model": voice.label}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"saved to {path}")
    except OSError as error:
        print(f"{path}: cannot be written: {error.strerror}")
