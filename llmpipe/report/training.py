"""What the page says of a stage that trained: key facts, the curves that matter, what it drew."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from llmpipe.files.tables import table_of
from llmpipe.report.panels import MOST, Panels, panels
from llmpipe.report.parts import Part, dig
from llmpipe.report.pieces import (
    Answer,
    Card,
    Content,
    Fact,
    Fold,
    Group,
    Heading,
    Table,
    known_facts,
)
from llmpipe.report.sampled import told
from llmpipe.report.terminal import duration_of, size_of
from llmpipe.report.text import Clipped, clip, counted, is_number, number, percent, text_of

ITEMS = 24  # of a list
CHARACTERS = 2000  # of a text


@dataclass(frozen=True)
class Trained:
    """An artifact that is a model."""

    name: str
    status: str
    facts: list[Fact]
    panels: Panels
    calibration: Table | None
    """Of a reward model: whether it is right more often where it is surer."""
    rollouts: Fold | None


def trained(part: Part, scale: int) -> Trained:
    return Trained(
        name=part.name,
        status=part.status,
        facts=known_facts(_facts(part)),
        panels=panels({"": part}, MOST // scale),
        calibration=_calibration(part),
        rollouts=_answers(part, ITEMS // scale),
    )


def _facts(part: Part) -> dict[str, str | None]:
    asked = part.known("asked", "recipe")
    optim = dig(asked, "optim")
    rank = dig(asked, "adapter", "rank")
    models = part.known("models").values()
    origin = ", ".join(text_of(dig(model, "reference")) for model in models)
    facts: dict[str, str | None] = {
        "made by": part.stage,
        "from": origin or None,
        "learning rate": number(dig(optim, "learning_rate") or None),
        "batch": number(dig(optim, "batch_size") or None),
        "adapter": f"rank {number(rank)}" if rank else None,
    }
    facts = {name: None if value == "–" else value for name, value in facts.items()}
    if "training" in part.manifest:
        training = part.manifest["training"]
        facts["steps"] = number(training["steps"])
        facts["tokens"] = number(training["tokens"])
        facts["time"] = duration_of(training["seconds"])
        facts["size"] = size_of(table_of(part.manifest["files"]))
    ranking = part.known("final", "ranking")
    if isinstance(bounds := dig(ranking, "accuracy_interval"), list) and len(bounds) == 2:
        low, high = map(percent, bounds)
        which = "held out" if dig(ranking, "held_out") is True else "trained on"
        pairs = f"{number(dig(ranking, 'n'))} pairs {which}"
        facts["ranks right"] = f"{percent(dig(ranking, 'accuracy'))} % ({low} to {high}) of {pairs}"
    if part.known("kind") == "dataset":
        facts |= told(part.known("final"), text_of(dig(asked, "write") or "rows"))
    return facts


def _calibration(part: Part) -> Table | None:
    buckets = part.known("final", "ranking", "calibration")
    if not isinstance(buckets, list):
        return None
    rows: list[list[Content]] = [
        [
            number(dig(bucket, "margin_up_to"), digits=3),
            number(dig(bucket, "n")),
            f"{percent(dig(bucket, 'accuracy'))} %",
        ]
        for bucket in buckets
    ]
    names = ("margin up to", "pairs", "right")
    headings = [Heading(name, is_number=True) for name in names]
    return Table(f"pairs of {part.name} by margin", headings, [Group("", rows)])


def _answers(part: Part, most: int) -> Fold | None:
    """What it drew: of a stage that samples the first, of one that trains the last that it kept."""
    return _sampled(part, most) if part.stage == "sample" else _rollouts(part, most)


def _sampled(part: Part, most: int) -> Fold | None:
    """The first prompts with all of their answers, the best first."""
    lines = zip(range(most), part.lines("samples.jsonl"), strict=False)
    cards = [_of_prompt(line) for _, line in lines]
    title = f"The first {counted(len(cards), 'prompt')}, with all answers"
    return Fold(title, cards) if cards else None


def _of_prompt(line: dict[str, Any]) -> Card:
    answers = line.get("answers")
    given = [one for one in answers if isinstance(one, dict)] if isinstance(answers, list) else []
    given.sort(key=lambda one: one["score"] if is_number(one.get("score")) else 0, reverse=True)
    shown = [_answer(f"score {number(one.get('score'), digits=3)}", one, "text") for one in given]
    if without := line.get("without"):
        shown.append(Answer("made of them", clip(f"nothing: {text_of(without)}", CHARACTERS)))
    return Card(_asked(line), shown)


def _asked(line: dict[str, Any]) -> Clipped:
    """The prompt of a line, a text or turns."""
    prompt = line.get("prompt")
    turns = prompt if isinstance(prompt, list) else [{"content": prompt}]
    return clip("\n\n".join(text_of(dig(turn, "content")) for turn in turns), CHARACTERS)


def _rollouts(part: Part, most: int) -> Fold | None:
    """The last answers drawn in training that were written down."""
    cards = []
    lines = list(part.lines("rollouts.jsonl"))[-most:]
    for _, group in groupby(lines, key=lambda line: (line.get("step"), line.get("prompt"))):
        to_one = list(group)
        cards.append(Card(_asked(to_one[0]), [_drawn(line) for line in to_one]))
    title = f"The last {counted(len(lines), 'answer')} drawn in training that were kept"
    return Fold(title, cards) if cards else None


def _drawn(line: dict[str, Any]) -> Answer:
    name = f"update {text_of(line.get('step'))}, score {number(line.get('score'), digits=3)}"
    return _answer(name, line, "answer")


def _answer(name: str, line: dict[str, Any], text: str) -> Answer:
    """An answer under a name; `text`: which field of its record holds it."""
    note = None if line.get("ended") else "cut off"
    return Answer(name, clip(text_of(line.get(text)), CHARACTERS), note)
