"""One source of rows as `prepare` takes it in: whether it fits the stage, and what is counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, Self

from llmpipe.data.formats import (
    Completion,
    Conversation,
    Document,
    Layout,
    MultipleChoice,
    Preference,
    Prompt,
    Rejected,
)
from llmpipe.data.kinds import Kind
from llmpipe.data.prepared import FileRows, SourceRows
from llmpipe.data.sources import Chunk, Origin
from llmpipe.data.tokenize import COUNTS, Batch, RejectedRow
from llmpipe.errors import Say, UserError

# What a shape is for that not every stage takes.
PURPOSE: dict[type, str] = {
    Preference: "reward and dpo",
    Prompt: "ppo",
    MultipleChoice: "eval",
    Document: "pretrain and sft",
}
EITHER = (Completion, Preference, Prompt)  # of texts or of messages


class RejectedLine(NamedTuple):
    """A rejected row as rejected.jsonl has it."""

    file: str
    row: int
    reason: str
    detail: str

    def in_words(self) -> str:
        return f"{self.row}: {Rejected(self.reason, self.detail)}"


def rejected_lines(origin: Origin, file: int, rejected: list[RejectedRow]) -> list[RejectedLine]:
    """Rejected rows of the source's file with this number."""
    name = origin.files[file].name if origin.files else origin.name
    return [RejectedLine(name, *row) for row in rejected]


class Intake:
    """An open source and what is counted of it."""

    def __init__(self, origin: Origin, kind: Kind):
        self.origin = origin
        self.unused = [name for name in origin.layout.unused if name not in kind.also_reads]
        """Columns that nobody reads."""
        self.bytes = sum(file.bytes for file in origin.files)
        """Still to be read."""
        self.counts: Counter[str] = Counter()
        """By the names of COUNTS."""
        self.rejected: Counter[str] = Counter()
        """Rows by the reason they were rejected for."""
        self.noted: Counter[str] = Counter()
        """Kept rows by a sentence on what was done with them."""
        self._rows_of_file = [0] * len(origin.files)

    def leave_to_training(self) -> None:
        """Read none of the rows here."""
        self.origin.chunks = chain()
        self.bytes = 0

    def count(self, chunk: Chunk, batch: Batch) -> None:
        """Add a chunk of the source and what it became."""
        self.counts.update(batch.counts)
        self.rejected.update(row.reason for row in batch.rejected)
        self.noted.update(batch.noted)
        if self._rows_of_file:
            self._rows_of_file[chunk.file] += batch.counts["read"]

    def record(self) -> SourceRows:
        """What the manifest says of the source."""
        origin = self.origin
        files = [
            FileRows(name=file.name, sha256=file.sha256, rows=rows)
            for file, rows in zip(origin.files, self._rows_of_file, strict=True)
        ]
        return SourceRows(
            path=origin.name,
            format=origin.layout.format,
            columns=origin.layout.columns,
            unused_columns=self.unused,
            files=files,
            revision=origin.revision,
            weight=getattr(origin.source, "weight", 1.0),  # rows to evaluate on have none
            rejected=dict(self.rejected),
            noted=dict(sorted(self.noted.items())),
            **{name: self.counts[name] for name in COUNTS},
        )


@dataclass(frozen=True)
class Totals:
    """What is counted of all sources together."""

    read: int
    kept: int
    truncated: int
    split: int
    pieces: int
    rejected: Counter[str]

    @classmethod
    def of(cls, intakes: list[Intake]) -> Self:
        counts: Counter[str] = Counter()
        rejected: Counter[str] = Counter()
        for intake in intakes:
            counts.update(intake.counts)
            rejected.update(intake.rejected)
        return cls(**{name: counts[name] for name in COUNTS}, rejected=rejected)


def open_source(origin: Origin, kind: Kind, has_template: bool, say: Say) -> Intake:
    """Open a source. Raises UserError for rows that do not fit the stage or have no template."""
    origin.open()
    shown = origin.source.path
    layout = origin.layout
    _check_format(shown, layout, kind)
    either = layout.shape in EITHER
    turns = _has_turns(origin)
    if kind.asks and either and has_template and not turns:
        say(f"data: {shown}: prompts and answers are plain text, which no chat template touches")
    if not has_template and (layout.shape is Conversation or (either and turns)):
        problem = "the rows are conversations, and the model's tokenizer has no chat template"
        raise UserError(f"{shown}: {problem}", "set data.template: chatml")
    intake = Intake(origin, kind)
    say(f"data: {shown}: format {layout.format} {_in_words(layout.columns, intake.unused)}")
    return intake


def _in_words(columns: dict[str, str], unused: list[str]) -> str:
    """Which columns are read as what, and which are not."""
    read = [yours if yours == name else f"{yours} as {name}" for yours, name in columns.items()]
    rest = f"; not used: {', '.join(unused)}" if unused else ""
    return f"({', '.join(read)}){rest}"


def _check_format(shown: str, layout: Layout, kind: Kind) -> None:
    if layout.shape in kind.shapes:
        return
    problem = f"{shown}: format {layout.format}"
    if kind.lacks:
        hint = f"map yours with columns, such as {kind.mapping}"
        raise UserError(f"{problem} has no {kind.lacks}", hint)
    raise UserError(f"{problem} is for {PURPOSE[layout.shape]}, not for this stage")


def _has_turns(origin: Origin) -> bool:
    """Whether rows of a format that may be either are conversations."""
    if {"system", "tools"} & set(origin.layout.columns.values()):
        return True
    values = (row.get(name) for row in origin.sample for name in origin.layout.columns)
    return any(isinstance(value, list | dict) for value in values)
