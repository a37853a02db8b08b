"""What a task of `eval` is: a section of the recipe that reads items, and measures models on them.

Each task is one file of `tasks/`: its fields, its `Item`, how a row becomes one (`item_of`) and how
a batch of them is scored (`score_batch`). Recipes are checked with these classes, so importing one
imports no torch: all that a task sees of a model is a `Candidate`.
"""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from llmpipe.data.examples import Messages, Tools
from llmpipe.data.formats import Completion, Document, Example
from llmpipe.errors import Say, UserError
from llmpipe.evaluation.book import Book, Line, Scored
from llmpipe.recipe.sections import Name, Rows, Section
from llmpipe.record import Record
from llmpipe.run.progress import Progress, duration

if TYPE_CHECKING:
    from llmpipe.evaluation.candidate import Candidate

Template = Literal["auto", "none"]

Answer = str | Messages


class Ask(Record):
    """What an item asks: text, which no template touches, or a conversation."""

    text: str | None = None
    messages: Messages | None = None

    @classmethod
    def of(cls, prompt: str | Messages, *, bare: bool) -> Ask:
        """A prompt as bare text, or as a conversation, whichever of the two it came as."""
        if isinstance(prompt, str):
            return cls(text=prompt) if bare else cls(messages=[{"role": "user", "content": prompt}])
        if bare:
            return cls(text="\n\n".join(turn["content"] for turn in prompt))
        return cls(messages=prompt)

    @property
    def prompt(self) -> str | Messages:
        return self.text or self.messages or ""


class Place(NamedTuple):
    """Where an item stands, and where it came from."""

    id: int
    at: str
    asks: int


class Item(Record):
    """An item of a task, a line of its prepared file; each task adds what it needs."""

    id: int
    """Its number."""
    at: str
    """File and row that it came from."""
    asks: int
    """Hash of what it asks, as the rows of training have it."""

    def values(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)

    @property
    def size(self) -> int:
        """About how long it is, in characters: items of a size are batched together."""
        return sum(len(str(value)) for value in self.values().values())


def tools_of(row: Example) -> dict[str, Tools]:
    """The field `tools` of an item, where its row has some."""
    if isinstance(row, Document | Completion) or not row.tools:
        return {}
    return {"tools": row.tools}


class Marked(NamedTuple):
    """A sequence, and which of its tokens are scored."""

    ids: list[int]
    marks: list[bool]

    @classmethod
    def after(cls, ids: list[int], start: int) -> Marked:
        """A sequence of which every token from `start` on is scored."""
        return cls(ids, [i >= start for i in range(len(ids))])


def nothing_scored(at: str, label: str) -> UserError:
    """For an item of which no token is scored."""
    hint = "take the row out: the score of nothing is 0, or no number at all"
    return UserError(f"{at}: {label}: no token of it is scored", hint)


def check_scored(sequence: Marked, at: str, label: str) -> None:
    """Raises UserError (2) where no token of an item is scored."""
    if not any(sequence.marks):
        raise nothing_scored(at, label)


class Task(Section):
    for_reward_models: ClassVar[bool] = False
    """Whether reward models take part."""

    name: Name | None = None
    """What the results call it; the kind of task unless set."""

    if TYPE_CHECKING:
        task: str  # declared by each task: its only value is the kind of task

    @property
    def label(self) -> str:
        """What the results call it."""
        return self.name or self.task

    @property
    def packages(self) -> set[str]:
        """Modules that are not llmpipe's own dependencies."""
        return set()

    def files(self) -> dict[str, str]:
        """Every file or folder beside the rows whose content decides the numbers, by its field."""
        return {}

    @abstractmethod
    def metrics(self, kind: str | None) -> set[str] | None:
        """The numbers that it gives of a kind of artifact, or of any where `kind` is not known.

        None where another library says which.
        """

    @abstractmethod
    def measure(self, model: Candidate, items: list[Any], book: Book, seed: int, say: Say) -> None:
        """Score what `book` lacks of this task for one model. `items`: this task's own, if any."""


class OnItems(Task):
    shapes: ClassVar[tuple[type, ...]]
    """The shapes of examples that it can use, and so the formats of rows (`Format.shape`)."""
    item_type: ClassVar[type[Item]]
    """What `item_of` makes of a row."""

    data: Annotated[list[Rows], Field(min_length=1)]
    """The items: sources of rows as in `data.train` of a training recipe. A row that cannot be used
    stops the stage."""

    @abstractmethod
    def item_of(self, row: Example, others: dict[str, Any], place: Place) -> Item:
        """A row, with its columns that its format does not use, as an item. Raises Rejected."""

    @abstractmethod
    def score_batch(self, model: Candidate, batch: list[Any], seed: int) -> list[Scored]:
        """Score a batch of this task's items."""

    def write(self, items: Iterable[Item], path: Path) -> None:
        lines = [json.dumps(item.values(), ensure_ascii=False) + "\n" for item in items]
        path.write_text("".join(lines), encoding="utf-8")

    def read(self, path: Path) -> list[Item]:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [self.item_type.model_validate(json.loads(line)) for line in lines if line]

    def measure(self, model: Candidate, items: list[Any], book: Book, seed: int, say: Say) -> None:
        """Score in batches that depend neither on what is scored already nor on how many processes
        share them. So an evaluation ends with the same numbers, killed or not, anywhere.
        """
        missing = [
            batch
            for batch in _batches(items, model.batch_size)
            if not book.holds(self.label, model.label, [item.id for item in batch])
        ]
        total = sum(len(batch) for batch in missing)
        done = 0
        begun = time.monotonic()
        progress = Progress(say)
        world = book.world
        for start in range(0, len(missing), world.size):
            together = missing[start : start + world.size]  # like long: they are sorted
            lines: list[Line] = []
            with world.as_one():
                if world.rank < len(together):
                    lines = self._scored(model, together[world.rank], seed)
            book.add(lines)
            done += sum(map(len, together))
            rate = done / (time.monotonic() - begun)
            eta = duration((total - done) / rate)
            progress.note(
                f"{model.label} on {self.label}: {done}/{total}  {rate:.1f} items/s  ETA {eta}"
            )
        progress.close()
        if total:
            taken = duration(time.monotonic() - begun)
            say(f"{model.label} on {self.label}: {total:,} items in {taken}")

    def _scored(self, model: Candidate, batch: list[Any], seed: int) -> list[Line]:
        """A line for each item of a batch."""
        scored = self.score_batch(model, batch, seed)
        return [
            Line(self.label, model.label, item.id, item.at, one.shown, one.scores, one.corpus)
            for item, one in zip(batch, scored, strict=True)
        ]


def _batches(items: list[Item], size: int) -> list[list[Item]]:
    """Items of about a length together, the longest first."""
    order = sorted(items, key=lambda item: -item.size)
    return [order[i : i + size] for i in range(0, len(order), size)]
