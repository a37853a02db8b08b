"""A source of the recipe -> its files, and its rows one after another, in chunks.

Each row has the number that a person would look for: the line where files have lines, counted from
1, and the row elsewhere (see `readers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from llmpipe.data.folders import files_of, hashed, named_files, select, unread
from llmpipe.data.formats import Conversation, Document, Rejected, is_of_texts
from llmpipe.data.layout import Layout, Rule, formats_of, layout_of
from llmpipe.data.readers import File, Reading, Row, hub, parse, read
from llmpipe.data.readers.compressed import suffix_of
from llmpipe.data.readers.hub import hub_key, hub_revision
from llmpipe.data.readers.row import state_of
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.paths import expanded
from llmpipe.recipe.sections import Rows, is_local, science

__all__ = [
    "Chunk",
    "File",
    "Origin",
    "Row",
    "check_first_rows",
    "files_of",
    "first_rows",
    "hub_key",
    "hub_revision",
    "identity_of",
    "named_files",
    "parse",
    "refuse_turns",
]

CHUNK_ROWS = 256
CHUNK_BYTES = 256 << 10
WHOLE = 16 << 20
BY_LINES = (".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet")
AGAIN = "run the same command again"
SAMPLE = 20  # rows that decide the format


class Chunk(NamedTuple):
    """Consecutive rows of one file, and how many bytes of it they are."""

    file: int
    rows: list[Row]
    bytes: int


def identity_of(
    source: Rows, files: Iterable[tuple[str, str]], revision: str | None
) -> dict[str, Any]:
    """What makes two sources the same data: the section's fields and the content that they name.

    `files` are (name, sha256) of a local source in their order, `revision` is a Hub data set's
    commit. Content decides: of a local path nothing counts but the files' suffixes, which say how
    to read them.
    """
    identity = science(source)
    if source.is_here:
        del identity["path"]
    identity["split"] = source.split or "train"
    identity["files"] = [[suffix_of(name), sha256] for name, sha256 in files]
    identity["commit"] = revision
    return identity


# --- rows ---


class Origin:
    """A source of the recipe and which bytes it means: its files, or a Hub commit.

    `pinned`: what a plan knows already, commits by `hub_key` and hashes of files; `stream`: leave
    no copy of a Hub data set on this machine; `glance`: the files are not hashed. Raises UserError
    for what cannot be found, and (3) for a file that the plan knows otherwise.
    """

    name: str
    """For records: does not tell where the source lies on this machine."""
    files: list[File]
    """Of a local source."""
    notes: list[str]
    """What is to be said of files beside them that are not read."""
    revision: str | None
    """The commit of a Hub data set."""
    shown: list[str]
    """What a user calls the files, or the one data set."""

    chunks: Iterator[Chunk]
    """All the rows, once the source is open."""
    sample: list[dict[str, Any]]
    """The first rows that can be parsed, once it is open."""
    layout: Layout
    """How rows are read, once it is open."""

    def __init__(
        self, source: Rows, pinned: dict[str, str], stream: bool = False, glance: bool = False
    ):
        self.source = source
        self.stream = stream
        path = Path(source.path)
        self.name = path.name if expanded(source.path).is_absolute() else source.path
        if is_local(source.path):
            selection = select(source)
            self.files = [unread(file) if glance else hashed(file) for file in selection.files]
            self.notes = selection.notes
            self.revision = None
            if not glance:
                self._refuse_changed(pinned)
        else:
            self.files = []
            self.notes = []
            self.revision = pinned.get(hub_key(source)) or hub_revision(source)
        self.shown = [file.shown for file in self.files] or [source.path]

    def _refuse_changed(self, pinned: dict[str, str]) -> None:
        """Raises UserError (3) where the files are not those that a plan was made with."""
        planned: dict[str, list[str]] = {}
        for key, content in pinned.items():
            field, colon, _ = key.partition(":")
            if colon:
                planned.setdefault(field, []).append(content)
        # a file may be called otherwise now
        if not planned or [file.sha256 for file in self.files] in planned.values():
            return
        known = {content for contents in planned.values() for content in contents}
        others = [file.shown for file in self.files if file.sha256 not in known]
        problem = f"{', '.join(others) or self.source.path}: was changed since the command began"
        raise UserError(problem, AGAIN, INTEGRITY)

    def refuse_written(self, number: int) -> None:
        """Raises UserError (3) where a file was written to since it was hashed."""
        file = self.files[number] if self.files else None
        if file and file.state and state_of(file.path) != file.state:
            problem = f"{file.shown}: was changed while its rows were read"
            raise UserError(problem, AGAIN, INTEGRITY)

    def identity(self) -> dict[str, Any]:
        """See `identity_of`."""
        files = [(file.name, file.sha256) for file in self.files]
        return identity_of(self.source, files, self.revision)

    def open(self, shapes: tuple[type, ...]) -> None:
        """Begin to read: set `chunks`, `sample` and `layout`. Raises UserError.

        `shapes` of examples are taken; whether the first rows have one of them is to be seen.
        """
        source = self.source
        chunks = _chunks(self)
        first = next(chunks, None)
        if first is None:
            raise UserError(f"{source.path}: has no rows")
        self.chunks = chain([first], chunks)
        self.sample = self.parsed(first)
        rule = Rule(source.format, tuple(source.columns.items()), shapes)
        self.layout = layout_of(self.sample, rule, source.path)

    def parsed(self, chunk: Chunk) -> list[dict[str, Any]]:
        """The first rows of a chunk, less those that cannot be read."""
        rows: list[dict[str, Any]] = []
        errors: list[str] = []
        for number, payload in chunk.rows[:SAMPLE]:
            try:
                rows.append(parse(payload))
            except Rejected as error:
                errors.append(f"{self.shown[chunk.file]}:{number}: {error}")
        if not rows:
            raise UserError(errors[0], "none of the first rows can be read")
        return rows


def check_first_rows(source: Rows, shapes: tuple[type, ...], has_template: bool = True) -> None:
    """Raises UserError where the first rows of a local source are of none of these shapes, or are
    conversations where the model `has_template` for none.

    A large file that has to be read whole for its first row is left alone.
    """
    origin = Origin(source, {}, glance=True)
    first = origin.files[0]
    if first.bytes > WHOLE and not first.name.lower().endswith(BY_LINES):
        return
    origin.open(shapes)
    layout = origin.layout
    if layout.shape not in shapes:
        problem = f"{source.path}: format {layout.format} does not fit this stage"
        raise UserError(problem, f"it takes {', '.join(formats_of(shapes))}")
    if not has_template:
        refuse_turns(origin)


def refuse_turns(origin: Origin) -> None:
    """Raise UserError for an open source of conversations, as its first rows are: the model's
    tokenizer has no chat template.
    """
    if _has_turns(origin):
        problem = "the rows are conversations, and the model's tokenizer has no chat template"
        raise UserError(f"{origin.source.path}: {problem}", "set data.template: chatml")


def _has_turns(origin: Origin) -> bool:
    """Whether one of the first rows is a conversation, or has one for a prompt."""
    for row in origin.sample:
        with suppress(Rejected):
            example = origin.layout.convert(row).example
            if not isinstance(example, Document) and not is_of_texts(example):
                return True
    return origin.layout.shape is Conversation


def first_rows(source: Rows) -> list[dict[str, Any]]:
    """The first rows of a source that can be parsed, whatever their columns. Raises UserError."""
    origin = Origin(source, {}, glance=True)
    first = next(_chunks(origin), None)
    return origin.parsed(first) if first else []


def _readings(origin: Origin) -> Iterator[Reading]:
    """The rows of each file, or of the one Hub data set."""
    if origin.files:
        return map(read, origin.files)
    return iter([hub.read(origin.source, origin.revision, origin.stream)])


def _chunks(origin: Origin) -> Iterator[Chunk]:
    """The rows of a source in order, in chunks of bounded size. Raises UserError, also where a file
    is not the one any more that was hashed.
    """
    readings = enumerate(_readings(origin))
    every = ((file, row, size) for file, reading in readings for row, size in reading)
    rows: list[Row] = []
    total = 0
    file_of_rows = 0
    for file, row, size in islice(every, origin.source.limit):
        full = len(rows) >= CHUNK_ROWS or total >= CHUNK_BYTES
        if rows and (full or file != file_of_rows):
            origin.refuse_written(file_of_rows)
            yield Chunk(file_of_rows, rows, total)
            rows = []
            total = 0
        rows.append(row)
        total += size
        file_of_rows = file
    if rows:
        origin.refuse_written(file_of_rows)
        yield Chunk(file_of_rows, rows, total)
