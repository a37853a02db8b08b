"""Chunks of rows -> batches of pieces, in this process or in several.

The result does not depend on how many processes there are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa

from llmpipe.data.encode import Encoder, Encoding, hash_of
from llmpipe.data.formats import Document, Rejected, is_of_texts, question, taught_bytes
from llmpipe.data.kinds import Kind
from llmpipe.data.layout import Converted, Layout, Names
from llmpipe.data.pack import Piece
from llmpipe.data.sources import Chunk, Origin, Row, parse
from llmpipe.errors import INTEGRITY, RESOURCES, UserError, first_line
from llmpipe.faults import is_panic
from llmpipe.ties import Tie, call_tied

COUNTS = ("read", "kept", "truncated", "split", "pieces")  # rows, and for `pieces` examples

# Beside the columns of its kind, of each piece. Equal rows have equal hashes, and so have pairs
# with equal prompts; `asks` is the hash of what the row asks, `bytes` the size of what it teaches;
# `first` is true for the first piece of a row.
OF_ROW = {"hash": pa.uint64(), "asks": pa.uint64(), "bytes": pa.uint32(), "first": pa.bool_()}


@dataclass(frozen=True)
class Task:
    """What a process needs to tokenize rows. It is sent to worker processes."""

    kind: Kind
    encoding: Encoding
    seed: int

    @property
    def schema(self) -> pa.Schema:
        """Of a batch's pieces."""
        return pa.schema(self.kind.columns | OF_ROW)


class RejectedRow(NamedTuple):
    """A row that cannot be used: its number, and what `Rejected` says of it."""

    row: int
    reason: str
    detail: str
    tokens: int


class Place(NamedTuple):
    """Where something was seen first, and how often."""

    row: int
    rows: int


class Batch(NamedTuple):
    """What a chunk of rows became."""

    pieces: pa.RecordBatch
    """Of `Task.schema`, in the order of the rows."""
    counts: Counter[str]
    """COUNTS."""
    rejected: list[RejectedRow]
    noted: Counter[str]
    """Kept rows by a sentence on what was done with them; see `Encoder.noted`."""
    columns: dict[Names, Place]
    """Kept rows by their columns, less those that hold null."""
    unread: dict[str, Place]
    """Kept rows by what nobody reads in the columns that are read."""


class Tokenized(NamedTuple):
    """A chunk of the source with this number, and what it became."""

    source: int
    chunk: Chunk
    batch: Batch


def pieces_of(batch: pa.RecordBatch, kind: Kind) -> Iterator[Piece]:
    """The pieces of `Batch.pieces`: views, which keep all of it alive."""
    values = [batch[name].flatten().to_numpy() for name in kind.columns]
    offsets = [batch[name].offsets.to_numpy() for name in kind.columns]
    for i in range(len(batch)):
        yield tuple(
            column[ends[i] : ends[i + 1]] for column, ends in zip(values, offsets, strict=True)
        )


class Worker:
    """Tokenizes chunks of rows."""

    def __init__(self, task: Task):
        self.kind = task.kind
        self.schema = task.schema
        self.encoder = Encoder(task.encoding)
        self.key = task.seed.to_bytes(8, "little")

    def batch(self, rows: list[Row], layout: Layout, file: str) -> Batch:
        """Rows of one file -> pieces. A row's own mistakes end up in `rejected`."""
        names = self.schema.names
        pieces: list[list[Any]] = [[] for _ in names]
        rejected: list[RejectedRow] = []
        noted: Counter[str] = Counter()
        columns: dict[Names, Place] = {}
        unread: dict[str, Place] = {}
        counts = Counter(dict.fromkeys(COUNTS, 0))
        counts["read"] = len(rows)
        for number, payload in rows:
            self.encoder.noted.clear()
            self.encoder.at = f"{file}:{number}"
            try:
                converted = layout.convert(parse(payload))
                example = converted.example
                encoded = self.kind.encode(self.encoder, example, converted.others)
            except Rejected as error:
                rejected.append(RejectedRow(number, error.reason, error.detail, error.tokens))
                continue
            except BaseException as error:
                if not is_panic(error):
                    raise
                problem = f"row {number}: the tokenizer cannot read it: {first_line(error)}"
                raise UserError(problem, "its tokenizer.json is damaged", INTEGRITY) from None
            finally:
                self.encoder.check_time(number)
            known_by = b"".join(piece[0].tobytes() for piece in encoded.pieces)
            of_row = (
                hash_of(known_by, self.key),
                hash_of(question(example).encode()),
                taught_bytes(example),
            )
            for index, piece in enumerate(encoded.pieces):
                for column, value in zip(pieces, (*piece, *of_row, index == 0), strict=True):
                    column.append(value)
            noted.update(self.encoder.noted | self._notes(converted, layout))
            _count(columns, converted.names, number)
            for what in converted.values.unread:
                _count(unread, what, number)
            counts["kept"] += 1
            counts["truncated"] += encoded.truncated
            counts["split"] += len(encoded.pieces) > 1
            counts["pieces"] += len(encoded.pieces) - 1
        batch = pa.RecordBatch.from_pydict(dict(zip(names, pieces, strict=True)), self.schema)
        return Batch(batch, counts, rejected, noted, columns, unread)

    def _notes(self, converted: Converted, layout: Layout) -> set[str]:
        notes = converted.values.noted
        if converted.format != layout.format:
            notes.add(f"read as format {converted.format}, not {layout.format} as the first rows")
        if self.kind.chats and self.encoder.template:
            if is_of_texts(converted.example):
                notes.add("prompts and answers are plain text, which no chat template touches")
            elif isinstance(converted.example, Document):
                notes.add("texts are learned as they are, and no chat template touches them")
        return notes


def _count(places: dict[Any, Place], key: Any, row: int) -> None:
    first = places.get(key)
    places[key] = Place(first.row, first.rows + 1) if first else Place(row, 1)


def tokenized(
    origins: list[Origin], task: Task, processes: int, first: int = 0
) -> Generator[Tokenized, None, None]:
    """Every chunk of the sources in order, from chunk `first` on, with its pieces.

    Raises UserError (5) when a process dies.
    """
    every = ((index, chunk) for index, origin in enumerate(origins) for chunk in origin.chunks)
    chunks = islice(every, first, None)
    if processes > 1:
        yield from _side_by_side(origins, chunks, task, processes)
        return
    worker = Worker(task)
    for index, chunk in chunks:
        origin = origins[index]
        batch = worker.batch(chunk.rows, origin.layout, _file(origin, chunk))
        yield Tokenized(index, chunk, batch)


def _side_by_side(
    origins: list[Origin], chunks: Iterable[tuple[int, Chunk]], task: Task, processes: int
) -> Generator[Tokenized, None, None]:
    """`tokenized` in worker processes; a few chunks are under way at once."""
    # Never fork: torch, Arrow and tokenizers may hold threads by now.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, call_tied, (Tie(), _start_worker, task))
    under_way: deque[tuple[int, Chunk, Future[Batch]]] = deque()

    def oldest() -> Tokenized:
        index, chunk, future = under_way.popleft()
        return Tokenized(index, chunk, future.result())

    try:
        for index, chunk in chunks:
            origin = origins[index]
            future = pool.submit(_work, chunk.rows, origin.layout, _file(origin, chunk))
            under_way.append((index, chunk._replace(rows=[]), future))
            if len(under_way) > 3 * processes:
                yield oldest()
        while under_way:
            yield oldest()
    except BrokenProcessPool:
        problem = "a process that tokenizes died, most likely for lack of memory"
        hint = "set data.processes to a smaller number"
        raise UserError(problem, hint, RESOURCES) from None
    finally:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=not under_way, cancel_futures=True)
        if under_way:  # stopped early: by Ctrl-C, or by an error in the data
            for worker in workers:
                worker.kill()


_worker: Worker


def _start_worker(task: Task) -> None:
    """Pool initializer. Ctrl-C belongs to the parent."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker = Worker(task)


def _work(rows: list[Row], layout: Layout, file: str) -> Batch:
    return _worker.batch(rows, layout, file)


def _file(origin: Origin, chunk: Chunk) -> str:
    """The file that rows are of, without where it lies."""
    return os.path.basename(origin.shown[chunk.file])
