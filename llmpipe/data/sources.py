"""A source of the recipe -> its files, and its rows one after another, each with the number a person would look for.

The number is the line for jsonl, csv (where the record begins) and txt (where the passage begins), counted from 1, and
the row for json, parquet and the Hub. Rows stream: no file is ever held whole. A row that cannot be read is a problem
of that row (`Bad`), not of the run; a file that cannot be opened, or a JSON list that breaks off, is a UserError.
JSON Lines are split at "\\n" alone, since a text may hold Unicode line separators.

A .txt file is one document, handed on in passages of about 32 kB cut at line ends.
"""

from __future__ import annotations

import codecs
import csv
import glob
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from llmpipe.errors import UserError
from llmpipe.recipe import Source, is_local, near

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
MAX_LINE = 64 << 20  # bytes of one row
PASSAGE = 32 << 10  # bytes of one passage of a .txt file
_NOT_SPACE = re.compile(r"[ \t\r\n,]*")
_ESCAPED = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, under errors="surrogateescape"
CHUNK_ROWS, CHUNK_BYTES = 256, 256 << 10


class Bad(NamedTuple):
    """A row that could not be read."""

    reason: str
    detail: str


@dataclass(frozen=True)
class File:
    """`name` is relative to the source and goes into records, `shown` is what the user would type."""

    name: str
    shown: str
    path: Path
    bytes: int
    sha256: str


class Chunk(NamedTuple):
    """Consecutive rows of one file: (number, JSON bytes | object | Bad), and how far into the file they reach."""

    file: int
    rows: list[tuple[int, bytes | dict | Bad]]
    position: int


# --- files -----------------------------------------------------------------------------------------------------------


def files_of(source: Source) -> list[File]:
    """The files of a local source in a fixed order, with their hashes. Raises UserError naming what is missing."""
    given = source.path
    path = Path(given).expanduser()
    if path.is_file():
        found, root = [path], path.parent
    elif path.is_dir():
        root = path
        inside = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        found = sorted(p for p in inside if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise UserError(f"{given}: no data files in this folder", f"looked for {', '.join(SUFFIXES)}")
    elif any(sign in given for sign in "*?["):
        found = sorted(p for text in glob.glob(str(path), recursive=True) if (p := Path(text)).is_file())
        if not found:
            raise UserError(f"{given}: no file matches")
        root = Path(os.path.commonpath([p.parent for p in found]))
    else:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        guess = near(path.name, siblings)
        where = "" if path.parent.is_dir() else f"; there is no folder {path.parent}"
        raise UserError(f"{given}: no such file{guess or where}", "paths are looked up from the current folder")
    files = []
    for p in found:
        name = p.relative_to(root).as_posix()
        shown = given if len(found) == 1 and path.is_file() else str(Path(os.path.relpath(p, root)))
        shown = shown if shown == given else os.path.join(given if path.is_dir() else str(root), shown)
        if p.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"{shown}: {p.suffix or 'no suffix'} is not a known kind of file", f"known are {', '.join(SUFFIXES)}"
            )
        try:
            with p.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
        except OSError as error:
            raise UserError(f"{shown}: cannot be read: {error.strerror}") from None
        if not size:
            raise UserError(f"{shown}: the file is empty")
        files.append(File(name, shown, p, size, sha256))
    return files


# --- rows ------------------------------------------------------------------------------------------------------------


def chunks(files: list[File], limit: int | None = None) -> Iterator[Chunk]:
    """The rows of local files in order, in chunks of bounded size. Raises UserError for an unreadable file."""
    left = limit if limit is not None else -1
    for index, file in enumerate(files):
        rows: list = []
        size = 0
        position = [0]
        try:
            for number, payload, weight in _READERS[file.path.suffix.lower()](file, position):
                if left == 0:
                    break
                left -= 1
                rows.append((number, payload))
                size += weight
                if len(rows) >= CHUNK_ROWS or size >= CHUNK_BYTES:
                    yield Chunk(index, rows, position[0])
                    rows, size = [], 0
        except OSError as error:
            raise UserError(f"{file.shown}: cannot be read: {error.strerror or error}") from None
        if rows:
            yield Chunk(index, rows, position[0])
        if left == 0:
            return


Row = tuple[int, bytes | dict | Bad, int]  # number, payload, size


def _lines(file: File, position: list[int]) -> Iterator[tuple[int, bytes]]:
    """Lines of a UTF-8 file without their end; one over MAX_LINE comes cut."""
    with file.path.open("rb") as stream:
        start = stream.read(4)
        if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{file.shown}: is UTF-16", "save it as UTF-8")
        stream.seek(3 if start.startswith(codecs.BOM_UTF8) else 0)
        number = 0
        while line := stream.readline(MAX_LINE):
            number += 1
            position[0] += len(line)
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                yield number, line
                while (rest := stream.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                    position[0] += len(rest)
                continue
            yield number, line.rstrip(b"\r\n")


def _jsonl(file: File, position: list[int]) -> Iterator[Row]:
    for number, line in _lines(file, position):
        if len(line) >= MAX_LINE:
            yield number, Bad("line too long", f"more than {MAX_LINE >> 20} MB"), 0
        elif line.strip():
            yield number, line, len(line)


def parse(line: bytes) -> dict[str, Any] | Bad:
    """One JSON text -> an object, or why not."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return Bad("not UTF-8", f"byte 0x{line[error.start]:02x} at position {error.start + 1}; save the file as UTF-8")
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        if "\x00" in text:
            return Bad("NUL character", f"at position {text.index(chr(0)) + 1}")
        cut_off = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        cut = " (the line is cut off)" if cut_off else ""
        return Bad("bad JSON", f"{error.msg} at position {error.pos + 1}{cut}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        return Bad("bad JSON", str(error)[:100])
    return row if isinstance(row, dict) else Bad("not an object", f"a row is {{...}}, not {text.strip()[:20]}")


def _json(file: File, position: list[int]) -> Iterator[Row]:
    """A list of rows, or JSON Lines under another suffix; read with a window that slides over the file."""
    with file.path.open("rb") as stream:
        head = stream.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{file.shown}: is UTF-16", "save it as UTF-8")
    if head[:1] == b"{" and b"\n" in head and not isinstance(parse(head.split(b"\n", 1)[0]), Bad):
        yield from _jsonl(file, position)
        return
    if head[:1] != b"[":
        raise UserError(
            f"{file.shown}: is neither a list of rows nor one row per line",
            "a .json file holds [{...}, {...}] or one {...} per line",
        )
    decoder = json.JSONDecoder()
    number, line = 0, 1  # rows so far, and the line that the window begins on
    with file.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        window, ended, step = stream.read(1 << 18), False, 1 << 18
        at = window.index("[") + 1
        while True:
            at = _NOT_SPACE.match(window, at).end()
            if window[at : at + 1] == "]":
                return
            try:
                if at == len(window):
                    raise json.JSONDecodeError("the file is cut off", window, at)
                row, end = decoder.raw_decode(window, at)
                if end == len(window) and not ended:  # a number may go on in the next block
                    raise json.JSONDecodeError("", window, at)
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
            position[0] += len(text)
            if _ESCAPED.search(text):
                yield number, Bad("not UTF-8", "save the file as UTF-8"), len(text)
            elif not isinstance(row, dict):
                yield number, Bad("not an object", f"a row is {{...}}, not {text[:20]}"), len(text)
            else:
                yield number, row, len(text)


def _csv(file: File, position: list[int]) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE)
    tab = file.path.suffix.lower() == ".tsv"

    def text() -> Iterator[str]:
        for _, line in _lines(file, position):
            yield line.decode(errors="surrogateescape") + "\n"

    reader = csv.reader(text(), delimiter="\t" if tab else ",", strict=True)
    number, header = 1, None
    while True:
        number, before = reader.line_num + 1, position[0]
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield number, Bad("wrong number of fields", f"{error}; a quote that is never closed?"), 0
            continue
        if fields is None:
            return
        if not fields:  # a blank line
            continue
        size = position[0] - before
        if header is None:
            header = [name.strip() for name in fields]
            continue
        if len(fields) != len(header):
            yield number, Bad("wrong number of fields", f"{len(fields)} instead of {len(header)}"), size
        elif _ESCAPED.search("".join(fields)):
            yield number, Bad("not UTF-8", "save the file as UTF-8"), size
        else:
            yield number, dict(zip(header, fields, strict=True)), size


def _parquet(file: File, position: list[int]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            total = max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=CHUNK_ROWS):
                weight = max(1, batch.nbytes // max(1, batch.num_rows))
                for row in batch.to_pylist():
                    number += 1
                    position[0] = file.bytes * number // total
                    yield number, row, weight
    except pyarrow.ArrowException as error:
        raise UserError(f"{file.shown}:{number + 1}: not a readable parquet file: {error}") from None


def _txt(file: File, position: list[int]) -> Iterator[Row]:
    held: list[bytes] = []
    first, size = 1, 0
    for number, line in _lines(file, position):
        held.append(line + b"\n")
        size += len(line) + 1
        if size >= PASSAGE:
            yield first, _passage(held), size
            held, first, size = [], number + 1, 0
    if b"".join(held).strip():
        yield first, _passage(held), size


def _passage(lines: list[bytes]) -> dict | Bad:
    try:
        return {"text": b"".join(lines).decode().strip("\n")}
    except UnicodeDecodeError as error:
        return Bad("not UTF-8", f"byte 0x{error.object[error.start]:02x}; save the file as UTF-8")


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".txt": _txt}


# --- the Hub ---------------------------------------------------------------------------------------------------------


def hub_revision(source: Source) -> str:
    """The commit that a Hub data set's revision means. Raises UserError at once where there is no network."""
    if is_local(source.path):
        raise ValueError(source.path)
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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{source.path}: not readable from the Hub: {reason}", hint) from None


def _reachable(endpoint: str, seconds: float = 1.5) -> bool:
    """Can a connection be opened? Name look-up has no time limit of its own, so this waits in a thread."""
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    url = urlsplit(proxy or endpoint)
    answer: list[bool] = []

    def connect() -> None:
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
            socket.create_connection((url.hostname, port), timeout=seconds).close()
            answer.append(True)
        except (OSError, ValueError):
            answer.append(False)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answer and answer[0])


def hub_chunks(source: Source, revision: str) -> Iterator[Chunk]:
    """The rows of a Hub data set, downloaded once and memory-mapped by `datasets`."""
    import datasets

    try:
        rows = datasets.load_dataset(source.path, source.subset, split=source.split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{source.path}: {reason}", "see subset, split and revision") from None
    end = len(rows) if source.limit is None else min(len(rows), source.limit)
    for start in range(0, end, CHUNK_ROWS):
        part = rows[start : min(start + CHUNK_ROWS, end)]
        names = list(part)
        made = [dict(zip(names, values, strict=True)) for values in zip(*part.values(), strict=True)]
        yield Chunk(0, list(enumerate(made, start + 1)), start + len(made))
