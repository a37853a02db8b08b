"""`llmpipe init ROWS`: a recipe for rows, by what the first of them look like.

Nothing is asked, and nothing is kept back: what was seen and taken for what is said, and every line
of the recipe that was guessed says by what.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpipe.data.examples import Completion, Conversation, Document, Example, Preference
from llmpipe.data.formats import FORMATS, Rejected
from llmpipe.data.kinds.labels import label_of
from llmpipe.data.layout import Layout
from llmpipe.data.readers.row import Payload
from llmpipe.data.sources import Origin, first_rows
from llmpipe.data.tokenizer import own_template
from llmpipe.errors import Say, UserError
from llmpipe.files.paths import expanded, unreachable
from llmpipe.files.writing import write_whole
from llmpipe.recipe.check import validate
from llmpipe.recipe.names import ARTIFACT
from llmpipe.recipe.places import is_here
from llmpipe.recipe.sections import LOCAL_SUFFIXES, Source, is_local
from llmpipe.recipe.yaml import parse
from llmpipe.run.context import of_folder
from llmpipe.secrets import secrets_in
from llmpipe.stages import schema

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FETCHED = "./models/SmolLM2-135M-Instruct.gguf"
"""The same model, as `make models` leaves it."""

BYTES_PER_TOKEN = 3
"""Of UTF-8: English has four and more, a Chinese character about three."""

LENGTHS = (128, 256, 512, 1024, 2048)

FEW = 100  # questions with answers, of which none can be spared, and which are learned by heart

SHARES = ((1_000, 0.1), (10_000, 0.05), (math.inf, 0.01))
"""Of fewer rows than this, the share that is held out."""

LONGEST_SAMPLE = 200  # characters of a prompt to be answered before and after


@dataclass(frozen=True)
class Look:
    """What the first rows of a source look like."""

    stage: str
    format: str
    columns: dict[str, str]
    """Each column that is read, and what the format calls it."""
    guessed: bool
    """Whether the names of the columns said nothing, and their order had to do."""
    unused: list[str]
    rows: int
    """Of the source; about so many where it goes on behind the first ones."""
    is_whole: bool
    """Whether all of them were looked at."""
    longest: int
    """Bytes of the longest of them."""
    prompt: str | None
    """A first question."""


def propose(path: str, model: str | None, say: Say) -> Path:
    """Write a recipe for the rows at a path beside this command's folder, and say what was seen.

    Without a `model` it is a small one, that of `make models` where that is here.

    Raises UserError where they cannot be read or are no rows to train on, and where a file would be
    overwritten; nothing is written then.
    """
    path = path if is_local(path) else f"./{path}"
    name = re.sub(r"[^\w.-]", "-", _stem(path)).strip("-.") or "rows"
    target = Path(f"{name}.yaml")
    if os.path.lexists(target):
        raise UserError(f"{target}: is there already", "move it away; nothing was written")
    model = model or (FETCHED if Path(FETCHED).is_file() else MODEL)
    look = _look(path)
    text = _recipe(path, name, model, look, target)
    values, where = parse(text, str(target))
    validate(values, where, schema(look.stage), str(target))
    write_whole(target, text.encode())
    mapping = ", ".join(f"{yours} -> {theirs}" for yours, theirs in look.columns.items())
    count = f"{look.rows:,} rows" if look.is_whole else f"about {look.rows:,} rows"
    say(f"{path}: {count}, read as {look.format}: {mapping}")
    if look.guessed:
        say("the names of the columns say nothing, so their order had to do: see whether it is so")
    if look.unused:
        say(f"not read: {', '.join(look.unused)}")
    say(f"wrote {target}, for `llmpipe {look.stage}`")
    say(f"next: llmpipe prepare {target} --show-rows 3   (the rows as the model will see them)")
    say(f"      llmpipe {look.stage} {target}")
    return target


def _stem(path: str) -> str:
    """`mine` of ./data/mine.jsonl.gz, `data` of ./data/*.csv."""
    parts = [part for part in Path(path).parts if not re.search(r"[*?\[]", part)]
    name = parts[-1] if parts else "rows"
    while name.lower().endswith(LOCAL_SUFFIXES):
        name = name.rpartition(".")[0]
    return name


# --- what the rows look like ----------------------------------------------------------------------


def _look(path: str) -> Look:
    """Raises UserError where these are no rows to train on."""
    shapes = tuple({format.shape for format in FORMATS.values()})
    guessed: dict[str, str] = {}
    try:
        origin = Origin(Source(path=path), {}, glance=True)
        origin.open(shapes)
    except UserError:
        guessed = _by_order(path)
        if not guessed:
            raise
        origin = Origin(Source(path=path, columns=guessed), {}, glance=True)
        origin.open(shapes)
    layout = origin.layout
    chunk = next(origin.chunks)
    sizes = [_size(payload) for _, payload in chunk.rows]
    is_whole = next(origin.chunks, None) is None
    share = chunk.bytes / max(sum(file.bytes for file in origin.files), chunk.bytes, 1)
    rows = len(sizes) if is_whole else round(len(sizes) / share)
    return Look(
        stage=_stage(layout, origin.sample, path, rows),
        format=layout.format,
        columns=layout.columns,
        guessed=bool(guessed),
        unused=[name for name in layout.unused if name != "label"],
        rows=rows,
        is_whole=is_whole,
        longest=max(sizes),
        prompt=_prompt(layout, origin.sample),
    )


def _size(payload: Payload) -> int:
    """Bytes of a row, about."""
    return len(payload if isinstance(payload, bytes) else str(payload).encode(errors="replace"))


def _by_order(path: str) -> dict[str, str]:
    """What two columns of texts mean whose names say nothing, or one; else nothing."""
    texts: dict[str, None] = {}
    for row in first_rows(Source(path=path)):
        texts |= dict.fromkeys(name for name, value in row.items() if isinstance(value, str))
    names = {1: ("text",), 2: ("instruction", "output")}.get(len(texts), ())
    return dict(zip(texts, names, strict=True)) if names else {}


def _stage(layout: Layout, sample: list[dict[str, Any]], path: str, rows: int) -> str:
    """Which stage learns from rows of a shape. Raises UserError for those that none does."""
    if layout.shape is Preference:
        return "dpo"
    if layout.shape is Document:
        return "sft"
    if layout.shape in (Completion, Conversation):
        if _are_judged(sample):
            return "kto"
        return "lora" if rows < FEW else "sft"
    problem = f"{path}: rows of format {layout.format} ask, and say no answer to learn"
    raise UserError(problem, "see recipes/ppo.yaml to learn by a reward, recipes/eval.yaml to test")


def _are_judged(sample: list[dict[str, Any]]) -> bool:
    """Whether every row says in `label` whether its answer is good."""
    try:
        return all(label_of(row) in (0, 1) for row in sample)
    except Rejected:
        return False


def _prompt(layout: Layout, sample: list[dict[str, Any]]) -> str | None:
    """A first question that is short, and no secret."""
    for row in sample:
        try:
            asked = _asked(layout.convert(row).example)
        except Rejected:
            continue
        if asked and len(asked) <= LONGEST_SAMPLE and not list(secrets_in({"prompt": asked})):
            return asked
    return None


def _asked(example: Example) -> str | None:
    """What a user says first."""
    if isinstance(example, Conversation):
        turns = example.messages
    elif isinstance(example, (Completion, Preference)):
        if isinstance(example.prompt, str):
            return example.prompt
        turns = example.prompt
    else:
        return None
    return next((turn["content"] for turn in turns if turn["role"] == "user"), None)


# --- the recipe -----------------------------------------------------------------------------------


def _recipe(path: str, name: str, model: str, look: Look, target: Path) -> str:
    """Its text, with comments."""
    folder = _place(model)
    length, why = _length(look, folder)
    is_few = look.stage == "lora"
    batch = next(size for size in (32, 16, 8, 4, 2) if size <= max(2, look.rows * 3 // 50))
    batch = 1 if is_few else batch
    lines = [
        f"# llmpipe {look.stage} {target}",
        "#",
        f"# Written by `llmpipe init` for {path}. Every field is documented: llmpipe schema "
        f"{look.stage}",
        f"stage: {look.stage}",
        f"run: {_quoted(f'runs/{name}')}",
        *_noted(f"model: {_quoted(model)}", "Hub id, ./folder, ./file.gguf or artifact:NAME"),
        "",
        "data:",
        "  train:",
        f"    - path: {_quoted(path)}",
        *_noted(f"      format: {look.format}", "how a row is laid out"),
    ]
    if any(yours != theirs for yours, theirs in look.columns.items()):
        pairs = ", ".join(f"{_quoted(a)}: {_quoted(b)}" for a, b in look.columns.items())
        lines += _noted(f"      columns: {{{pairs}}}", "yours -> the format's")
    if look.rows >= FEW:
        share = next(share for rows, share in SHARES if look.rows < rows)
        lines += _noted(f"  eval: {{holdout: {share}}}", "a share of the rows, never trained on")
    if folder and look.format != "text" and folder.is_dir() and own_template(folder) is None:
        lines += _noted("  template: chatml", "the model has no chat template of its own")
    lines += _noted(f"  max_length: {length}", why)
    if look.stage in ("sft", "lora"):
        lines += _noted("  packing: true", "short rows share a sequence, and do not see each other")
    rate, why = {
        "lora": ("1.0e-3", "high, so that a small model knows few rows by heart; else 2.0e-4"),
        "sft": ("2.0e-5", "of all weights; an adapter takes ten times as much"),
    }.get(look.stage, ("1.0e-6", "of all weights; an adapter takes ten times as much"))
    epochs = {"lora": 12, "sft": 3}.get(look.stage, 1)
    beside = "adapter" if is_few else "# adapter"
    lines += [
        "",
        "optim:",
        *_noted(f"  learning_rate: {rate}", why),
        *_noted(f"  batch_size: {batch}", "sequences per step, whatever the number of GPUs"),
        *_noted(f"  epochs: {epochs}", "passes over the rows"),
        "",
        *_noted(f"{beside}: {{rank: 16}}", "learn that alone, beside a model that is frozen"),
        *_noted("checkpoint: {every: 50}", "kill it and run the same command again: it goes on"),
        *_noted(f"log: {{every: {1 if look.rows < 1_000 else 10}}}", "steps"),
    ]
    if look.prompt:
        lines += ["samples:", "  prompts:", "    # answered before and after training"]
        lines += [f"    - {json.dumps(look.prompt, ensure_ascii=False)}"]
    return "\n".join(lines) + "\n"


def _place(model: str) -> Path | None:
    """Where a model lies, if not on the Hub or in the run. Raises UserError where it does not."""
    if model.startswith(ARTIFACT) or not is_here(model, "model"):
        return None
    place = expanded(model)
    if reason := unreachable(place):
        raise UserError(f"--model {model}: {reason}", "a path is looked up from the current folder")
    return place


def _length(look: Look, folder: Path | None) -> tuple[int, str]:
    """`max_length`, and why."""
    tokens = look.longest // BYTES_PER_TOKEN
    length = next((length for length in LENGTHS if length >= tokens), LENGTHS[-1])
    why = f"tokens; the longest of the first rows has {look.longest:,} bytes"
    context = of_folder(folder) if folder and folder.is_dir() else None
    if context and context.tokens < length:
        return context.tokens, f"{why}, and the model takes no more"
    return length, why


def _noted(line: str, note: str) -> list[str]:
    """A line with a comment behind it, from a column on."""
    return [f"{line:<39} # {note}"]


def _quoted(text: str) -> str:
    """A text as YAML reads it, in quotes where it needs some."""
    plain = re.fullmatch(r"[A-Za-z./~][\w./@~-]*", text)
    is_word = text.lower() not in ("true", "false", "null")
    return text if plain and is_word and text != "~" else json.dumps(text, ensure_ascii=False)
