"""A source of the recipe -> its files, and its rows one after another, each with the number a person would look for.

The number is the line for jsonl, csv (where the record begins) and txt (where the passage begins), counted from 1, and
the row for json, parquet and the Hub. Rows stream: no file is ever held whole. A row that cannot be read is a problem
of that row (`Rejected`), not of the run; a file that cannot be opened, or a JSON list that breaks off, is a UserError.
JSON Lines are split at "\\n" alone, since a text may hold Unicode line separators.

A .txt file is one document, handed on in passages of about 32 kB cut at line ends.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import glob
import json
import os
import re
import socket
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

from llmpipe.data.formats import Rejected, detect
from llmpipe.errors import UserError, near
from llmpipe.files import sha256_file
from llmpipe.recipe.sections import Rows, is_local, science

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
MAX_LINE = 64 << 20  # bytes of one row
PASSAGE = 32 << 10  # bytes of one passage of a .txt file
CHUNK_ROWS, CHUNK_BYTES = 256, 256 << 10
_NOT_SPACE = re.compile(r"[ \t\r\n,]*")
_ESCAPED = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, under errors="surrogateescape"

Payload = bytes | dict | Rejected  # a JSON text, an object, or why it cannot be read
Row = tuple[int, Payload]
Reading = Iterator[tuple[int, Payload, int]]  # number, payload, bytes


@dataclass(frozen=True)
class File:
    """`name` is relative to the source and goes into records, `shown` is what the user would type."""

    name: str
    shown: str
    path: Path
    bytes: int
    sha256: str


class Chunk(NamedTuple):
    """Consecutive rows of one file, and how many bytes of it they are."""

    file: int
    rows: list[Row]
    bytes: int


# --- files -----------------------------------------------------------------------------------------------------------


def files_of(source: Rows) -> list[File]:
    """The files of a local source in a fixed order, with their hashes. Raises UserError naming what is missing."""
    given = source.path
    path = Path(given).expanduser()
    if path.is_file():
        found, root = [path], path.parent
    elif path.is_dir():
        found, root = (
            sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()),
            path,
        )
        found = [
            p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)
        ]
        if not found:
            raise UserError(
                f"{given}: no data files in this folder", f"looked for {', '.join(SUFFIXES)}"
            )
    elif found := sorted(
        p for name in glob.glob(str(path), recursive=True) if (p := Path(name)).is_file()
    ):
        root = Path(os.path.commonpath([p.parent for p in found]))
    else:
        there = path.parent.is_dir()
        guess = (
            near(path.name, os.listdir(path.parent))
            if there
            else f"; there is no folder {path.parent}"
        )
        raise UserError(
            f"{given}: no such file{guess}", "paths are looked up from the current folder"
        )
    return [_file(p, p.relative_to(root).as_posix(), given if p == path else str(p)) for p in found]


def _file(path: Path, name: str, shown: str) -> File:
    if path.suffix.lower() not in SUFFIXES:
        kind = path.suffix or "no suffix"
        raise UserError(
            f"{shown}: {kind} is not a known kind of file", f"known are {', '.join(SUFFIXES)}"
        )
    try:
        with path.open("rb") as stream:
            head = stream.read(2)
        file = File(name, shown, path, path.stat().st_size, sha256_file(path))
    except OSError as error:
        raise UserError(f"{shown}: cannot be read: {error.strerror}") from None
    if not head:
        raise UserError(f"{shown}: the file is empty")
    if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{shown}: is UTF-16", "save it as UTF-8")
    return file


def identity_of(
    source: Rows, files: Iterable[tuple[str, str]], revision: str | None
) -> dict[str, Any]:
    """What makes two sources the same data: the section's fields and the content that they name.

    `files` are (name, sha256) of a local source in their order, `revision` is a Hub data set's commit.
    Content decides: of a local path nothing counts but the files' suffixes, which say how to read them.
    """
    identity = science(source)
    if is_local(source.path):
        del identity["path"]
    identity["files"] = [[Path(name).suffix.lower(), sha256] for name, sha256 in files]
    identity["commit"] = revision
    return identity


# --- rows ------------------------------------------------------------------------------------------------------------


class Origin:
    """A source of the recipe and which bytes it means: its files, or a Hub commit.

    `name` is for records and does not tell where the source lies on this machine; `shown` is what a user calls its
    files. `pinned`: commits that are known already, by `hub_key`; `stream`: leave no copy of a Hub data set here.
    Raises UserError for what cannot be found.
    """

    def __init__(self, source: Rows, pinned: dict[str, str], stream: bool = False):
        path, self.stream = Path(source.path), stream
        self.source, self.name = (
            source,
            path.name if path.expanduser().is_absolute() else source.path,
        )
        local = is_local(source.path)
        self.files = files_of(source) if local else []
        self.revision = None if local else pinned.get(hub_key(source)) or hub_revision(source)
        self.shown = [file.shown for file in self.files] or [source.path]

    def identity(self) -> dict[str, Any]:
        """See `identity_of`."""
        files = [(file.name, file.sha256) for file in self.files]
        return identity_of(self.source, files, self.revision)

    def open(self) -> None:
        """Set `chunks`, all the rows; `sample`, the first of them; and `format`, `columns` ({your name: the format's})
        and `unused` columns, which these decide. Raises UserError."""
        source, chunks = self.source, _chunks(self)
        first = next(chunks, None)
        if first is None:
            raise UserError(f"{source.path}: has no rows")
        self.chunks, self.sample, errors = chain([first], chunks), [], []
        for number, payload in first.rows[:20]:
            try:
                self.sample.append(parse(payload))
            except Rejected as error:
                errors.append(f"{self.shown[first.file]}:{number}: {error}")
        if not self.sample:
            raise UserError(errors[0], "none of the first rows can be read")
        found = list(dict.fromkeys(name for row in self.sample for name in row))
        layout = detect(found, source.format, source.columns, source.path)
        self.format, self.columns, self.unused = layout.format, layout.columns, layout.unused


def _chunks(origin: Origin) -> Iterator[Chunk]:
    """The rows of a source in order, in chunks of bounded size. Raises UserError for an unreadable file."""
    rows: list[Row] = []
    before = size = 0
    readings = map(_read, origin.files) if origin.files else [_hub(origin)]
    every = ((index, row) for index, reading in enumerate(readings) for row in reading)
    for index, (number, payload, weight) in islice(every, origin.source.limit):
        if rows and (index != before or len(rows) >= CHUNK_ROWS or size >= CHUNK_BYTES):
            yield Chunk(before, rows, size)
            rows, size = [], 0
        rows.append((number, payload))
        size += weight
        before = index
    if rows:
        yield Chunk(before, rows, size)


def _read(file: File) -> Reading:
    try:
        yield from _READERS[file.path.suffix.lower()](file)
    except OSError as error:
        raise UserError(f"{file.shown}: cannot be read: {error.strerror or error}") from None


def parse(payload: Payload) -> dict[str, Any]:
    """What a row holds. Raises Rejected."""
    if isinstance(payload, Rejected):
        raise payload
    if isinstance(payload, dict):
        return payload
    try:
        text = payload.decode()
        row = json.loads(text)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{payload[error.start]:02x} at position {error.start + 1}"
        raise Rejected("not UTF-8", f"{byte}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        if "\x00" in text:
            raise Rejected("NUL character", f"at position {text.index(chr(0)) + 1}") from None
        cut_off = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        cut = " (the line is cut off)" if cut_off else ""
        raise Rejected("bad JSON", f"{error.msg} at position {error.pos + 1}{cut}") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits, nesting without end
        raise Rejected("bad JSON", str(error)[:100]) from None
    if not isinstance(row, dict):
        raise Rejected("not an object", f"a row is {{...}}, not {text.strip()[:20]}")
    return row


def _jsonl(file: File) -> Reading:
    with file.path.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE), b""), 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_LINE)
                yield number, Rejected("line too long", f"more than {MAX_LINE >> 20} MB"), MAX_LINE
            elif line.strip():
                yield number, line, len(line)


def _json(file: File) -> Reading:
    """A list of rows, read with a window that slides over the file; or JSON Lines under another suffix."""
    with _text(file) as stream:
        window = stream.read(1 << 18).lstrip()
        if window.startswith("{"):
            yield from _jsonl(file)
            return
        if not window.startswith("["):
            hint = "a .json file holds [{...}, {...}] or one {...} per line"
            raise UserError(f"{file.shown}: is neither a list of rows nor one row per line", hint)
        decoder = json.JSONDecoder()
        number, line = 0, 1  # rows so far, and the line that the window begins on
        at, ended, step = 1, False, 1 << 18
        while window[(at := _NOT_SPACE.match(window, at).end()) : at + 1] != "]":
            try:
                if at == len(window):
                    raise json.JSONDecodeError("the file is cut off", window, at)
                _, end = decoder.raw_decode(window, at)
            except (ValueError, RecursionError) as error:
                if ended or len(window) - at > MAX_LINE:
                    line += window.count("\n", 0, getattr(error, "pos", at))
                    where = f"{file.shown}:{number + 1}: row {number + 1} (line {line})"
                    problem = (
                        f"{where} is not valid JSON: {getattr(error, 'msg', str(error)[:100])}"
                    )
                    hint = (
                        "a JSON list cannot be read past a mistake; one row per line (.jsonl) can"
                    )
                    raise UserError(problem, hint) from None
                line += window.count("\n", 0, at)
                more = stream.read(step)
                window, at, ended, step = window[at:] + more, 0, not more, min(step * 2, MAX_LINE)
                continue
            number += 1
            text, at, step = window[at:end], end, 1 << 18
            yield number, _utf8(text, text.encode(errors="ignore")), len(text)


def _csv(file: File) -> Reading:
    csv.field_size_limit(MAX_LINE)
    delimiter = "\t" if file.path.suffix.lower() == ".tsv" else ","
    with _text(file) as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        header = None
        while True:
            number = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield (
                    number,
                    Rejected("wrong number of fields", f"{error}; a quote that is never closed?"),
                    0,
                )
                continue
            text = ",".join(fields)
            if header is None:
                header = [name.strip() for name in fields]
            elif not fields:  # a blank line
                continue
            elif len(fields) != len(header):
                yield (
                    number,
                    Rejected("wrong number of fields", f"{len(fields)} instead of {len(header)}"),
                    len(text),
                )
            else:
                yield number, _utf8(text, dict(zip(header, fields, strict=True))), len(text)


def _parquet(file: File) -> Reading:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            rows = (
                row
                for batch in table.iter_batches(batch_size=CHUNK_ROWS)
                for row in batch.to_pylist()
            )
            for number, row in enumerate(rows, 1):
                yield number, row, file.bytes // table.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{file.shown}:{number + 1}: not a readable parquet file: {error}"
        ) from None


def _txt(file: File) -> Reading:
    number = 1
    with _text(file, newline=None) as stream:
        while lines := stream.readlines(PASSAGE):
            text = "".join(lines)
            if text.strip():
                yield number, _utf8(text, {"text": text.strip("\n")}), len(text)
            number += len(lines)


def _text(file: File, newline: str | None = "") -> IO[str]:
    return file.path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _utf8(text: str, payload: bytes | dict) -> Payload:
    return Rejected("not UTF-8", "save the file as UTF-8") if _ESCAPED.search(text) else payload


_READERS = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}


# --- the Hub ---------------------------------------------------------------------------------------------------------


def hub_key(source: Rows) -> str:
    """What a Hub data set's commit is kept under."""
    return f"{source.path}@{source.revision or ''}"


def hub_revision(source: Rows) -> str:
    """The commit that a Hub data set's revision means. Raises UserError at once where there is no network."""
    there = Path(source.path).exists()
    hint = (
        f"did you mean ./{source.path}?"
        if there
        else "local paths start with ./ or end in a known suffix"
    )
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise UserError(f"{source.path}: is a Hub data set, and HF_HUB_OFFLINE is set", hint)
    if not _reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
        raise UserError(f"{source.path}: is a Hub data set, and the Hub cannot be reached", hint)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return (
            huggingface_hub.HfApi()
            .dataset_info(source.path, revision=source.revision, timeout=30)
            .sha
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{source.path}: not readable from the Hub: {_reason(error)}", hint
        ) from None


def _reachable(endpoint: str, seconds: float = 1.5) -> bool:
    """Can a connection be opened? Name look-up has no time limit of its own, so this waits in a thread."""
    url = urlsplit(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or endpoint)
    opened = threading.Event()

    def connect() -> None:
        port = url.port or (443 if url.scheme == "https" else 80)
        with contextlib.suppress(OSError), socket.create_connection((url.hostname, port), seconds):
            opened.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return opened.is_set()


def _hub(origin: Origin) -> Reading:
    """The rows of a Hub data set, downloaded once and memory-mapped by `datasets`, or streamed."""
    import datasets

    source = origin.source
    try:
        wanted = {"split": source.split, "revision": origin.revision, "streaming": origin.stream}
        rows = datasets.load_dataset(source.path, source.subset, **wanted)
        yield from ((number, row, 0) for number, row in enumerate(rows, 1))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{source.path}: {_reason(error)}", "see subset, split and revision"
        ) from None


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
