"""One source of rows as `prepare` takes it in: whether it fits the stage, and what is counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, Self

from llmpipe.data.counts import in_rows
from llmpipe.data.formats import (
    Document,
    MultipleChoice,
    Preference,
    Prompt,
    Rejected,
)
from llmpipe.data.kinds import Kind
from llmpipe.data.layout import Layout, Names, awaited, listed_columns, never_came
from llmpipe.data.prepared import FileRows, SourceRows
from llmpipe.data.sources import Chunk, Origin, refuse_turns
from llmpipe.data.tokenize import COUNTS, Batch, RejectedRow
from llmpipe.errors import Say, UserError

# What a shape is for that not every stage takes.
PURPOSE: dict[type, str] = {
    Preference: "reward and dpo",
    Prompt: "ppo",
    MultipleChoice: "eval",
    Document: "pretrain and sft",
}
LISTED = 20  # things that nobody reads, in one line


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
    return [RejectedLine(name, row.row, row.reason, row.detail) for row in rejected]


class Seen(NamedTuple):
    """Where in a source something was seen first, and in how many rows."""

    file: int
    row: int
    rows: int


class Intake:
    """An open source and what is counted of it."""

    def __init__(self, origin: Origin, kind: Kind):
        self.origin = origin
        self.kind = kind
        self.columns = dict(origin.layout.columns)
        """{yours: the format's} of every column that is read."""
        self.others = [it for it in origin.layout.unused if self._called(it) not in kind.also_reads]
        """Columns of the first rows that no format reads."""
        self.unread: dict[str, Seen] = {}
        """What nobody reads of later rows: other columns; and of any row: keys within columns."""
        self.bytes = sum(file.text_bytes for file in origin.files)
        """Still to be read."""
        self.counts: Counter[str] = Counter()
        """By the names of COUNTS."""
        self.rejected: Counter[str] = Counter()
        """Rows by the reason they were rejected for."""
        self.first_rejected = ""
        """Its file, row and reason, once there is one."""
        self.longest = 0
        """Tokens of the longest row that was rejected for its length."""
        self.noted: Counter[str] = Counter()
        """Kept rows by a sentence on what was done with them."""
        self.kept: set[str] = set()
        """Columns that rewards are given, as the recipe calls them."""
        self._rows_of_file = [0] * len(origin.files)
        self._awaited = awaited(origin.layout)

    def leave_to_training(self) -> None:
        """Read none of the rows here."""
        self.origin.chunks = chain()
        self._awaited = set()
        self.bytes = 0

    def count(self, chunk: Chunk, batch: Batch) -> None:
        """Add a chunk of the source and what it became."""
        self.counts.update(batch.counts)
        self.rejected.update(row.reason for row in batch.rejected)
        self.longest = max([self.longest, *(row.tokens for row in batch.rejected)])
        if batch.rejected and not self.first_rejected:
            first = rejected_lines(self.origin, chunk.file, batch.rejected[:1])[0]
            self.first_rejected = f"{self.origin.shown[chunk.file]}:{first.in_words()}"
        self.noted.update(batch.noted)
        if self._rows_of_file:
            self._rows_of_file[chunk.file] += batch.counts["read"]
        for names, place in batch.columns.items():
            self._count_columns(names, Seen(chunk.file, *place))
        for what, place in batch.unread.items():
            self._count_unread(what, Seen(chunk.file, *place))

    def _count_columns(self, names: Names, seen: Seen) -> None:
        reading = self.origin.layout.reading(names)
        assert reading is not None  # a row with these columns was converted
        self.columns |= reading.columns
        self._awaited.difference_update(names)
        if self.kind.keeps_others:
            self.kept.update(reading.others.values())
            return
        for name, called in reading.others.items():
            if name not in self.origin.layout.unused and called not in self.kind.also_reads:
                self._count_unread(name, seen)

    def _count_unread(self, what: str, seen: Seen) -> None:
        first = self.unread.get(what)
        self.unread[what] = first._replace(rows=first.rows + seen.rows) if first else seen

    def _called(self, column: str) -> str:
        """What the recipe calls a column."""
        return self.origin.layout.rule.renaming.get(column, column)

    def finish(self, say: Say) -> None:
        """Say what was done with rows, once all are counted; what nobody would expect of them.

        Raises UserError for a column that the recipe maps and no row has.
        """
        shown = self.origin.source.path
        for sentence, rows in sorted(self.noted.items()):
            say(f"data: {shown}: {sentence}: {in_rows(rows)}")
        if self.unread:
            often = sorted(self.unread.items(), key=lambda item: -item[1].rows)
            each = [self._place(*item) for item in often[:LISTED]]
            more = f", and {len(often) - LISTED:,} more" if len(often) > LISTED else ""
            say(f"data: {shown}: not used: {', '.join(each)}{more}")
        if self._awaited:
            raise never_came(shown, self._awaited)

    def _place(self, what: str, seen: Seen) -> str:
        file = self.origin.shown[seen.file]
        return f"{what} ({in_rows(seen.rows)}, first {file}:{seen.row})"

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
            columns=self.columns,
            unused_columns=[] if self.kind.keeps_others else self.others,
            kept_columns=sorted(self.kept),
            unread={what: seen.rows for what, seen in sorted(self.unread.items())},
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
    longest: int
    """Tokens of the longest row that was rejected for its length."""

    @classmethod
    def of(cls, intakes: list[Intake]) -> Self:
        counts: Counter[str] = Counter()
        rejected: Counter[str] = Counter()
        for intake in intakes:
            counts.update(intake.counts)
            rejected.update(intake.rejected)
        longest = max(intake.longest for intake in intakes)
        return cls(**{name: counts[name] for name in COUNTS}, rejected=rejected, longest=longest)


def open_source(origin: Origin, kind: Kind, has_template: bool, say: Say) -> Intake:
    """Open a source. Raises UserError for rows that do not fit the stage or have no template."""
    shown = origin.source.path
    for note in origin.notes:
        say(f"data: {shown}: {note}")
    origin.open(kind.shapes)
    layout = origin.layout
    _check_format(shown, layout, kind)
    if not has_template:
        refuse_turns(origin)
    intake = Intake(origin, kind)
    say(f"data: {shown}: format {layout.format} {_in_words(intake)}")
    return intake


def _in_words(intake: Intake) -> str:
    """Which columns are read as what, and which are not."""
    renaming = intake.origin.layout.rule.renaming
    beside = {it: renaming.get(it, it) for it in intake.origin.layout.unused}
    columns = [*intake.columns.items()]
    columns += [item for item in beside.items() if item[1] in intake.kind.also_reads]
    read = [yours if yours == name else f"{yours} as {name}" for yours, name in columns]
    what = "for rewards to read" if intake.kind.keeps_others else "not used"
    rest = f"; {what}: {listed_columns(intake.others)}" if intake.others else ""
    return f"({listed_columns(read)}){rest}"


def _check_format(shown: str, layout: Layout, kind: Kind) -> None:
    if layout.shape in kind.shapes:
        return
    problem = f"{shown}: format {layout.format}"
    if kind.lacks:
        hint = f"map yours with columns, such as {kind.mapping}"
        raise UserError(f"{problem} has no {kind.lacks}", hint)
    raise UserError(f"{problem} is for {PURPOSE[layout.shape]}, not for this stage")
