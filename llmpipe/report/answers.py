"""The same prompts answered side by side: the recipes' own, and items of the evaluations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llmpipe.report.parts import Part, Run
from llmpipe.report.pieces import Answer, Card, Fold
from llmpipe.report.text import Clipped, clip, is_number, number, plain, text_of

FIRST = 3  # cards of each kind that are not folded away
ITEMS = 24  # of a list
CHARACTERS = 2000  # of a text


@dataclass(frozen=True)
class Answers:
    """What the models say."""

    prompts: list[Card]
    """Of the recipes, before and after each training."""
    prompts_note: str
    items: list[Card]
    """Of an evaluation in which the models part."""
    items_note: str
    folds: list[Fold]
    """All of both that is shown."""


def answers(run: Run) -> Answers:
    most = CHARACTERS // run.scale
    count = max(ITEMS // run.scale, 1)
    prompts = _prompts(run, most)
    sets = [items for part in run.evaluations for items in _item_sets(part, most)]
    shown = next((items for items in sets if items.are_answers and items.parting), None)
    folds = [items.fold(count) for items in sets]
    if len(prompts) > FIRST:
        title = f"{min(count, len(prompts)):,} of {len(prompts):,} prompts of the recipes"
        folds.insert(0, Fold(title, prompts[:count]))
    note = f"The first {FIRST} of {len(prompts):,}." if len(prompts) > FIRST else ""
    return Answers(
        prompts=prompts[:FIRST],
        prompts_note=f"Prompts of the recipes, answered before and after. {note}".strip(),
        items=[_without_marks(card) for card in shown.parting[:FIRST]] if shown else [],
        items_note=shown.note if shown else "",
        folds=folds,
    )


MARKS = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]")
ROLES = {"system", "user", "assistant", "model"}


def _without_marks(card: Card) -> Card:
    """A card whose prompt is without the marks of a chat template, which the folds keep."""
    parts = (part.strip() for part in MARKS.split(card.prompt.text))
    lines = [part for part in parts if part and part not in ROLES]
    words = [re.sub(r"^(?:system|user|assistant|model)\n", "", line).strip() for line in lines]
    text = "\n\n".join(word for word in words if word)
    return replace(card, prompt=replace(card.prompt, text=text)) if text else card


# --- prompts of the recipes -----------------------------------------------------------------------


def _prompts(run: Run, most: int) -> list[Card]:
    """A card for each prompt; what a child says before its training is what its parent said after,
    and is not shown twice."""
    said: dict[str, dict[str, tuple[str, Answer]]] = {}
    for part in run.parts:
        for line in part.lines("samples.jsonl"):
            if "when" not in line:
                continue
            text = text_of(line.get("answer"))
            by_name = said.setdefault(text_of(line.get("prompt")), {})
            is_before = line["when"] == "before"
            if is_before and any(text == other for other, _ in by_name.values()):
                continue
            name = f"before {part.name}" if is_before else part.name
            note = None if line.get("ended") else "cut off"
            by_name[name] = text, Answer(name, clip(text, most), note)
    return [
        Card(clip(prompt, most), [answer for _, answer in by_name.values()])
        for prompt, by_name in said.items()
    ]


# --- items of evaluations -------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemSet:
    """Items of one task, the models side by side."""

    part: str
    task: str
    parting: list[Card]
    """The first of those on which the models' scores differ."""
    alike: list[Card]
    differ: int
    """How many there are of the former."""
    total: int
    are_answers: bool
    """Whether the models wrote something, and were not only measured."""

    @property
    def note(self) -> str:
        first = min(FIRST, len(self.parting))
        return (
            f"Items of {self.task} ({self.part}): the first {first} of the {self.differ:,} "
            f"on which the models' scores differ, of {self.total:,}."
        )

    def fold(self, count: int) -> Fold:
        cards = [*self.parting, *self.alike][:count]
        title = (
            f"{self.task} ({self.part}): {len(cards):,} of {self.total:,} items; the scores differ "
            f"on {self.differ:,}, which stand first"
        )
        return Fold(title, cards)


def _item_sets(part: Part, most: int) -> Iterator[ItemSet]:
    tasks: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for line in part.lines("samples.jsonl"):
        if "prompt" in line:
            task, item, model = (text_of(line.get(name)) for name in ("task", "item", "model"))
            tasks.setdefault(task, {}).setdefault(item, {})[model] = line
    for task, items in tasks.items():
        parting = [lines for lines in items.values() if _scores_differ(lines)]
        alike = [lines for lines in items.values() if not _scores_differ(lines)]
        yield ItemSet(
            part.name,
            task,
            [_item_card(lines, most) for lines in parting[:ITEMS]],
            [_item_card(lines, most) for lines in alike[:ITEMS]],
            len(parting),
            len(items),
            any("answers" in line for lines in items.values() for line in lines.values()),
        )


def _scores_differ(lines: dict[str, dict[str, Any]]) -> bool:
    """Whether two models have another value of one score; a reward model has scores of its own."""
    values: dict[str, set[str]] = {}
    for line in lines.values():
        scores = line.get("scores")
        for name, value in (scores if isinstance(scores, dict) else {"": scores}).items():
            values.setdefault(name, set()).add(plain(value))
    return any(len(different) > 1 for different in values.values())


def _item_card(lines: dict[str, dict[str, Any]], most: int) -> Card:
    """An item, with a line of each model."""
    first = next(iter(lines.values()))
    expected = None
    if right := first.get("reference"):
        texts = right if isinstance(right, list) else [right]
        expected = clip(" | ".join(map(text_of, texts)), most)
    pair = [name for name in ("chosen", "rejected") if name in first]
    answers = [Answer(name, clip(text_of(first[name]), most)) for name in pair]
    answers += [_answer(model, line, most) for model, line in lines.items()]
    # what a model's own template adds, a system prompt say, the others were not asked
    asked = min((text_of(line.get("prompt")) for line in lines.values()), key=len)
    return Card(clip(asked, most), answers, expected)


def _answer(model: str, line: dict[str, Any], most: int) -> Answer:
    given = line.get("answers")
    scores = line.get("scores")
    note, is_right = plain(scores) if scores else None, None
    if isinstance(scores, dict):
        note = ", ".join(f"{name.replace('_', ' ')} {_score(v)}" for name, v in scores.items())
        told = [value for value in scores.values() if is_number(value)]
        if told and set(told) in ({0}, {1}):
            is_right = told[0] == 1
    text: Clipped
    if isinstance(given, list):
        text = clip("\n\n".join(map(text_of, given)), most)
    else:
        values = line.get("values")
        numbers = values if isinstance(values, dict) else {"": values}
        text = clip(", ".join(f"{k} {_score(v)}".strip() for k, v in numbers.items()), most)
    return Answer(model, text, note, is_right)


def _score(value: Any) -> str:
    """A score in a few characters: yes or no, or three digits."""
    if value in (0, 1):
        return "yes" if value else "no"
    if isinstance(value, list) and all(map(is_number, value)):
        return ", ".join(map(_score, value))
    return number(value, digits=3) if is_number(value) else plain(value)
