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
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

from llmpipe.data.formats import Rejected
from llmpipe.errors import UserError
from llmpipe.recipe import Rows, near
from llmpipe.rundir import sha256_file

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
MAX_LINE = 64 << 20  # bytes of one row
PASSAGE = 32 << 10  # bytes of one passage of a .txt file
CHUNK_ROWS, CHUNK_BYTES = 256, 256 << 10
_NOT_SPACE = re.compile(r"[ \t\r\n,]*")
_ESCAPED = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, under errors="surrogateescape"

Row = tuple[int, bytes | dict | Rejected]  # number, and a JSON text, an object, or why it cannot be read
Reading = Iterator[tuple[int, bytes | dict | Rejected, int]]  # number, payload, bytes


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
        found, root = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()), path
        found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not found:
            raise UserError(f"{given}: no data files in this folder", f"looked for {', '.join(SUFFIXES)}")
    elif found := sorted(p for name in glob.glob(str(path), recursive=True) if (p := Path(name)).is_file()):
        root = Path(os.path.commonpath([p.parent for p in found]))
    else:
        there = path.parent.is_dir()
        guess = near(path.name, os.listdir(path.parent)) if there else f"; there is no folder {path.parent}"
        raise UserError(f"{given}: no such file{guess}", "paths are looked up from the current folder")
    return [_file(p, p.relative_to(root).as_posix(), given if p == path else str(p)) for p in found]


def _file(path: Path, name: str, shown: str) -> File:
    if path.suffix.lower() not in SUFFIXES:
        kind = path.suffix or "no suffix"
        raise UserError(f"{shown}: {kind} is not a known kind of file", f"known are {', '.join(SUFFIXES)}")
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


# --- rows ------------------------------------------------------------------------------------------------------------


def chunks(files: list[File], limit: int | None = None) -> Iterator[Chunk]:
    """The rows of local files in order, in chunks of bounded size. Raises UserError for an unreadable file."""
    rows: list[Row] = []
    before = size = 0
    every = ((index, reading) for index, file in enumerate(files) for reading in _read(file))
    for index, (number, payload, weight) in islice(every, limit):
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


def parse(payload: bytes | dict | Rejected) -> dict[str, Any]:
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
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise Rejected("bad JSON", str(error)[:100]) from None
    if not isinstance(row, dict):
        raise Rejected("not an object", f"a row is {{...}}, not {text.strip()[:20]}")
    return row


def _jsonl(file: File) -> Reading:
    with file.path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE):
            number += 1
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
                    raise UserError(
                        f"{file.shown}:{number + 1}: row {number + 1} (line {line}) is not valid JSON: "
                        f"{getattr(error, 'msg', str(error)[:100])}",
                        "a JSON list cannot be read past a mistake; one row per line (.jsonl) can",
                    ) from None
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
                yield number, Rejected("wrong number of fields", f"{error}; a quote that is never closed?"), 0
                continue
            text = ",".join(fields)
            if header is None:
                header = [name.strip() for name in fields]
            elif not fields:  # a blank line
                continue
            elif len(fields) != len(header):
                detail = f"{len(fields)} instead of {len(header)}"
                yield number, Rejected("wrong number of fields", detail), len(text)
            else:
                row = dict(zip(header, fields, strict=True))
                yield number, _utf8(text, row), len(text)


def _parquet(file: File) -> Reading:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            for batch in table.iter_batches(batch_size=CHUNK_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row, file.bytes // table.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise UserError(f"{file.shown}:{number + 1}: not a readable parquet file: {error}") from None


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


def _utf8(text: str, payload: bytes | dict) -> bytes | dict | Rejected:
    return Rejected("not UTF-8", "save the file as UTF-8") if _ESCAPED.search(text) else payload


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".txt": _txt}


# --- the Hub ---------------------------------------------------------------------------------------------------------


def hub_key(source: Rows) -> str:
    """What a Hub data set's commit is kept under."""
    return f"{source.path}@{source.revision or ''}"


def hub_revision(source: Rows) -> str:
    """The commit that a Hub data set's revision means. Raises UserError at once where there is no network."""
    hint = "local paths start with ./ or end in a known suffix"
    if Path(source.path).exists():
        hint = f"did you mean ./{source.path}?"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise UserError(f"{source.path}: is a Hub data set, and HF_HUB_OFFLINE is set", hint)
    if not _reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
        raise UserError(f"{source.path}: is a Hub data set, and the Hub cannot be reached", hint)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return huggingface_hub.HfApi().dataset_info(source.path, revision=source.revision, timeout=30).sha
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{source.path}: not readable from the Hub: {reason}", hint) from None


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


def hub_chunks(source: Rows, revision: str) -> Iterator[Chunk]:
    """The rows of a Hub data set, downloaded once and memory-mapped by `datasets`."""
    import datasets

    try:
        rows = datasets.load_dataset(source.path, source.subset, split=source.split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{source.path}: {reason}", "see subset, split and revision") from None
    rows = rows.select(range(min(len(rows), source.limit or len(rows))))
    for start in range(0, len(rows), CHUNK_ROWS):
        part = rows.select(range(start, min(start + CHUNK_ROWS, len(rows)))).to_list()
        yield Chunk(0, list(enumerate(part, start + 1)), 0)
