"""JSON that is read with bounds, since it may be anybody's, and written whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmpipe.faults import reading
from llmpipe.files.paths import NO_FILE
from llmpipe.files.writing import write_whole

LARGEST = 64 << 20
"""Bytes of a JSON file that is read."""

DEEPEST = 100
"""Lists and objects in one another that are read; what llmpipe writes has a tenth of it."""

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a character, as JSON can spell it; no file and no terminal takes one."""


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one, also after a power cut.

    Dataclasses in `value` become objects; half a surrogate pair, as a file of rows may hold,
    becomes a question mark.
    """
    write_whole(path, _as_json(value).encode())


def _as_json(value: Any) -> str:
    text = json.dumps(value, indent=1, ensure_ascii=False, default=asdict) + "\n"
    return text.encode(errors="replace").decode()


def read_text(path: Path, most: int = LARGEST) -> str:
    """The text of a plain file, as it stands. Raises OSError, or ValueError for what is no file, no
    UTF-8, or larger than `most` bytes.

    A pipe or a device, which may never end, is not read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, encoding="utf-8", newline="") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a plain file")
        if status.st_size > most:
            raise ValueError(f"{status.st_size:,} bytes, of which {most:,} are read at most")
        return file.read()


def parse_json(text: str, *, twice: bool = True) -> Any:
    """What a JSON text says. Raises ValueError, in a line, for what is none, and for what nobody
    could work with: nesting deeper than DEEPEST, numbers without end, halves of characters.

    Unless `twice`, a key that an object has twice is refused: readers differ in which one counts.
    """
    try:
        value = json.loads(text, object_pairs_hook=None if twice else _once)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST}") from None
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):
        raise ValueError(f"nested deeper than {DEEPEST}")
    if SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' stands twice")
    return values


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than DEEPEST."""
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for holder in level:
            inner = holder.values() if isinstance(holder, dict) else holder
            if isinstance(holder, dict | list):
                below += [item for item in inner if isinstance(item, dict | list)]
        if not below:
            return False
        level = below
    return True


def read_json(path: Path) -> Any:
    """Parsed JSON, or None when the file is absent or not whole."""
    _, value = _parsed(path)
    return value


def read_written(path: Path) -> Any:
    """What `write_json` wrote, or None where the file is absent or one byte of it is another."""
    text, value = _parsed(path)
    return value if text == _as_json(value) else None


def _parsed(path: Path) -> tuple[str, Any]:
    """The text of a JSON file, and what it says; nothing, and None, where there is none."""
    try:
        text = read_text(path)
        return text, parse_json(text)
    except ValueError:
        return "", None
    except OSError as error:
        if error.errno in NO_FILE:
            return "", None
        raise


def json_object(line: bytes) -> dict[str, Any] | None:
    """What a line of a .jsonl file says; None where it is no object."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def json_lines(path: Path) -> list[Any]:
    """What the lines of a .jsonl file say. Raises UserError (3) where one says nothing."""
    with reading(path, "lines of JSON", ValueError):
        text = path.read_text(encoding="utf-8").removesuffix("\n")
        return [json.loads(line) for line in text.split("\n")] if text else []


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON; dataclasses in it become objects."""
    separators = (",", ":")
    text = json.dumps(
        value, sort_keys=True, ensure_ascii=False, separators=separators, default=asdict
    )
    return hashlib.sha256(text.encode()).hexdigest()


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """{path: value} of a nested document; the keys of a path stand with spaces between them."""
    if not isinstance(value, dict):
        return {path: value}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        leaves |= flat(inner, f"{path} {key}".strip())
    return leaves
