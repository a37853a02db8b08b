"""samples.jsonl of an evaluation: what is scored is kept line by line and never scored again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llmpipe.errors import INTEGRITY, Say, UserError
from llmpipe.files.json import digest
from llmpipe.files.writing import cut_back, to_write, write_whole
from llmpipe.record import Record

if TYPE_CHECKING:
    from llmpipe.parallel.world import World

Score = float | list[float]  # a value, or [numerator, denominator] of a ratio of sums

SETTINGS = "settings.json"

Key = tuple[str, str, int | str]  # task, model, item


@dataclass(frozen=True)
class Scored:
    """What a task says of one item."""

    shown: dict[str, Any]
    """What a person reads of it: the prompt, the answers, the reference."""
    scores: Mapping[str, Score]
    """By metric."""
    corpus: Sequence[str] | None = None
    """Metrics over all answers at once, which no item has alone."""


class Reported(NamedTuple):
    """A library's own number."""

    value: float
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class Line:
    """What one model got for one item of one task, or a library's numbers for the whole task."""

    task: str
    model: str
    item: int | str
    """Its number; the harness names items."""
    at: str | None = None
    """File and row that the item came from."""
    shown: dict[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Score] | None = None
    corpus: Sequence[str] | None = None
    reported: dict[str, Reported] | None = None
    """Of a line without scores: the library's numbers, by metric."""

    @property
    def key(self) -> Key:
        return self.task, self.model, self.item

    @property
    def order(self) -> tuple[int, str]:
        """Sorts the items of a task: by number, the harness's by name."""
        return (self.item, "") if isinstance(self.item, int) else (0, self.item)

    def has(self, metric: str) -> bool:
        """Whether the line counts for a metric."""
        return metric in (self.scores or ()) or metric in (self.corpus or ())

    @classmethod
    def parse(cls, text: str | bytes) -> Line:
        values = json.loads(text)
        if "reported" in values:
            numbers = {name: Reported(*number) for name, number in values["reported"].items()}
            values["reported"] = numbers
        names = ("task", "model", "item", "at", "scores", "corpus", "reported")
        fields = {name: values.pop(name) for name in names if name in values}
        return cls(**fields, shown=values)

    def text(self) -> str:
        """The line as it stands in the file."""
        place = {"task": self.task, "model": self.model, "item": self.item, "at": self.at}
        counts = {"scores": self.scores, "corpus": self.corpus, "reported": self.reported}
        values = _given(place) | self.shown | _given(counts)
        return json.dumps(values, ensure_ascii=False) + "\n"


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


class Settings(Record):
    """settings.json: what an evaluation's numbers depend on beside the recipe.

    In their last digits, and by the batch in what is drawn.
    """

    batch_size: int
    precision: str
    device: str
    scores: int = 1
    """What scores mean: see `llmpipe.scores.VERSION`."""
    adapters: Literal["merged"] | None = None
    """Whether there are some, and they were merged to be measured."""

    def known(self) -> dict[str, Any]:
        """Those that an evaluation has; older ones know no other."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


class Book:
    """samples.jsonl: a line per item and model, appended batch by batch.

    What is behind the last whole batch, as a kill leaves it, is dropped. Beside it lies, until the
    artifact is finished, what the file should hold: a size and a sha256 for every batch. All
    processes have the lines, and the first one alone the file.
    """

    def __init__(self, path: Path, settings: Settings, evaluation: str, say: Say, world: World):
        """`evaluation`: its identity. Collective.

        Raises UserError (3) where the file was begun with other settings, or is not what was
        written.
        """
        self.path = path
        self.world = world
        self.lines: dict[Key, Line] = {}
        self._sums = path.with_name(f".{path.name}.sums")
        self._bytes = 0
        self._sha256 = sha256()
        with world.as_one():
            if world.is_first:
                self._open(settings, evaluation, say)
        self.lines = world.gather(self.lines)[0]

    def _open(self, settings: Settings, evaluation: str, say: Say) -> None:
        path = self.path
        _refuse_other_settings(path, settings)
        begin = digest([evaluation, settings.known()])
        if path.exists() and not self._sums.exists():
            say(f"{path.name}: what an older llmpipe scored has no sums: it is scored again")
            path.unlink()
        if path.exists():
            self._read(begin)
        else:
            write_whole(self._sums, f"{begin}\n".encode())
        settings.to_file(path.with_name(SETTINGS))

    def _read(self, begin: str) -> None:
        """Go on with the lines that are there."""
        text = self._sums.read_text(encoding="utf-8", errors="replace")
        first, *written = text.split("\n")
        if first != begin:
            raise self._refusal("belongs to another evaluation, or to other settings")
        data = self.path.read_bytes()
        whole = 0
        for size, known in sorted(_known(written).items()):
            if size > len(data):
                break
            self._sha256.update(data[self._bytes : size])
            self._bytes = size
            whole = size if self._sha256.hexdigest() in known else whole
        if self._bytes != whole:
            raise self._refusal(f"is not what was scored, from byte {whole:,} on")
        for raw in data[:whole].split(b"\n")[:-1]:
            line = Line.parse(raw)
            self.lines[line.key] = line
        cut_back(self.path, self._bytes)

    def _refusal(self, why: str) -> UserError:
        hint = f"remove {self.path} and run the same command again: it is scored anew"
        return UserError(f"{self.path}: {why}", hint, INTEGRITY)

    def add(self, lines: list[Line]) -> None:
        """Keep what each process has scored. Collective."""
        every = [line for of_one in self.world.gather(lines) for line in of_one]
        if every and self.world.is_first:
            self._append(every)
        self.lines |= {line.key: line for line in every}

    def _append(self, lines: list[Line]) -> None:
        data = "".join(line.text() for line in lines).encode()
        with to_write(self.path, "ab") as file:
            file.write(data)
        self._bytes += len(data)
        self._sha256.update(data)
        self._note(self._bytes, self._sha256.hexdigest())

    def _note(self, size: int, known: str) -> None:
        """Keep what the file holds from now on."""
        with to_write(self._sums, "a") as file:
            file.write(f"{size} {known}\n")

    def of(self, task: str) -> list[Line]:
        return [line for line in self.lines.values() if line.task == task]

    def holds(self, task: str, model: str, items: Iterable[int | str]) -> bool:
        """Whether every one of some items is scored."""
        return all((task, model, item) in self.lines for item in items)

    def close(self, tasks: list[str], models: list[str]) -> None:
        """Write the lines in a fixed order, each item of a model once; in the first process."""

        def order(line: Line) -> tuple[int, int, tuple[int, str]]:
            return tasks.index(line.task), models.index(line.model), line.order

        text = "".join(line.text() for line in sorted(self.lines.values(), key=order))
        data = text.encode()
        self._note(len(data), sha256(data).hexdigest())
        write_whole(self.path, data)


def _known(written: list[str]) -> dict[int, set[str]]:
    """Every sha256 that a file of so many bytes has had; a line that a kill cut off says none."""
    known: dict[int, set[str]] = {}
    for line in written:
        size, _, sha = line.partition(" ")
        if size.isdigit() and len(sha) == 64:
            known.setdefault(int(size), set()).add(sha)
    return known


def _refuse_other_settings(samples: Path, settings: Settings) -> None:
    """One evaluation is scored with one setting; the lines of another one are not gone on from."""
    path = samples.with_name(SETTINGS)
    begun = Settings.from_file(path) if samples.exists() else None
    if begun and begun != settings:
        now = settings.model_dump()
        changed = ", ".join(
            f"{name} {value or 'apart'} there, {now[name] or 'apart'} now"
            for name, value in begun.model_dump().items()
            if value != now[name]
        )
        problem = f"{samples}: was begun with other settings: {changed}"
        raise UserError(problem, "--fresh starts anew", INTEGRITY)
