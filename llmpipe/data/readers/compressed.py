"""Files as they lie or compressed: what a suffix says, and the bytes as they were before."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import IO, Any

SAMPLE = 1 << 20  # bytes that an estimate of the whole is made from


def _with_arrow(source: Any) -> IO[bytes]:
    import pyarrow

    codec = "zstd" if str(getattr(source, "name", source)).lower().endswith(".zst") else "lz4"
    stream: IO[bytes] = pyarrow.CompressedInputStream(source, codec)
    return stream


# Each opens a path or a file that is open.
COMPRESSED: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _with_arrow,
    ".lz4": _with_arrow,
}

DAMAGED = (EOFError, zlib.error, lzma.LZMAError, OSError)
"""What reading of a compressed file raises that is cut off or broken."""


def suffix_of(name: str | PurePath) -> str:
    """What decides how a file is read, in small letters: `.jsonl`, or `.jsonl.gz`."""
    path = PurePath(str(name).lower())
    if path.suffix in COMPRESSED:
        return PurePath(path.stem).suffix + path.suffix
    return path.suffix


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSED


def open_bytes(path: Path) -> IO[bytes]:
    """A file to read, decompressed on the way."""
    if not is_compressed(path):
        return path.open("rb")
    opened = COMPRESSED[path.suffix.lower()](str(path))
    return io.BufferedReader(opened, 1 << 18)


def text_bytes(path: Path, size: int) -> int:
    """The size of a file once it is decompressed, judged by its beginning."""
    if not is_compressed(path):
        return size
    try:
        with path.open("rb") as raw, COMPRESSED[path.suffix.lower()](raw) as stream:
            text = len(stream.read(SAMPLE))
            taken = raw.tell()
    except DAMAGED:  # reading says so, with the row
        return size
    return text if text < SAMPLE else size * text // max(taken, 1)
