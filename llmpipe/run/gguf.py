"""What the header of a GGUF file says, held against the file, before any library reads it.

    "GGUF"  version  count of tensors  count of metadata
    metadata: name, type, value       names and texts: length, UTF-8
    tensors: name, dimensions, type, offset
    the tensors, each at a multiple of general.alignment

Little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A length that the file
cannot hold is refused before anything of that size is made.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from mmap import ACCESS_READ, mmap
from pathlib import Path
from struct import calcsize, unpack_from
from typing import Any

from llmpipe.errors import UserError

MAGIC = b"GGUF"

VERSIONS = (2, 3)

TEXT, ARRAY = 8, 9

NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Types of metadata that are numbers, as `struct` has them."""

BLOCKS = {
    0: (1, 4),
    1: (1, 2),
    24: (1, 1),
    25: (1, 2),
    26: (1, 4),
    27: (1, 8),
    28: (1, 8),
    30: (1, 2),
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    9: (32, 40),
    10: (256, 84),
    11: (256, 110),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
    15: (256, 292),
    16: (256, 66),
    17: (256, 74),
    18: (256, 98),
    19: (256, 50),
    20: (32, 18),
    21: (256, 110),
    22: (256, 82),
    23: (256, 136),
    29: (256, 56),
    34: (256, 54),
    35: (256, 66),
    39: (32, 17),
    40: (64, 36),
    41: (128, 18),
}
"""Numbers in a block of each type of tensor, and its bytes, by ggml's `type_traits`."""

MOST_DIMENSIONS = 4

SIZES = re.compile(r"\w+\.(block_count|expert_count|expert_used_count|nextn_predict_layers)")
"""Names of metadata by which modules are built."""

MOST_PARTS = 32_768

CONTEXT = 8192
"""Tokens that llama.cpp has memory for, of a model that takes more: it is all taken ahead."""

TOKENS, TOKEN_TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"

CONTROL = 3
"""Of `TOKEN_TYPES`: a token that is no text."""


@dataclass
class Header:
    metadata: dict[str, Any] = field(default_factory=dict)
    """Numbers and texts by name; of an array, its length."""
    numbers: int = 0
    """That the tensors hold."""
    tensors: int = 0

    @property
    def has_template(self) -> bool:
        """Whether it has a chat template."""
        return bool(str(self.metadata.get("tokenizer.chat_template", "")).strip())

    @property
    def longest(self) -> int:
        """Tokens that the model takes; 0 where it is not said."""
        return self._of_model("context_length")

    @property
    def context(self) -> int:
        """Tokens that are taken, as far as there is memory for them."""
        return min(self.longest or CONTEXT, CONTEXT)

    @property
    def layers(self) -> int:
        """1 where it is not said."""
        return self._of_model("block_count") or 1

    def _of_model(self, name: str) -> int:
        value = self.metadata.get(f"{self.metadata['general.architecture']}.{name}")
        return value if type(value) is int and value > 0 else 0

    def refuse_unread(self, path: Path) -> None:
        """Raise UserError (2) for a kind of model that transformers does not read of a GGUF file,
        and for a file without a vocabulary."""
        kind, known = str(self.metadata["general.architecture"]), architectures()
        if known and _plain(kind) not in set(map(_plain, known)) and "t5" not in kind:
            problem = f"{path}: transformers reads no GGUF of the kind {kind}"
            raise UserError(problem, "take the model as safetensors")
        if not self.metadata.get(TOKENS):
            raise UserError(f"{path}: has no vocabulary", "take the model as safetensors")


READERS = (
    ("ggml", "GGUF_CONFIG_MAPPING"),
    ("gguf.gguf_config_mapping", "GGUF_CONFIG_ARCHS"),
)
"""Where `transformers.integrations` names the kinds of models that it reads of GGUF files."""


@cache
def architectures() -> frozenset[str]:
    """Kinds of models that transformers reads of GGUF files, by its source: importing it takes
    seconds. Empty where it is not installed as it was."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    home = Path(spec.submodule_search_locations[0], "integrations")
    return frozenset(name for reader in READERS for name in _keys(home, *reader))


def _keys(home: Path, module: str, name: str) -> Iterator[str]:
    """The keys of a dictionary that a module begins with."""
    path = home.joinpath(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            assert isinstance(node.value, ast.Dict)
            yield from (ast.literal_eval(key) for key in node.value.keys if key)


def _plain(kind: str) -> str:
    """qwen2_moe is written qwen2moe in a file."""
    return kind.lower().replace("_", "").replace("-", "")


class _Reader:
    """Values in the order of a file, none of which is longer than what is left of it."""

    def __init__(self, data: mmap):
        self.data = data
        self.size = len(data)
        self.at = 0

    def skip(self, count: int) -> int:
        """Go on by so many bytes; where they begin."""
        if count > self.size - self.at:
            raise ValueError(f"{count:,} bytes where {self.size - self.at:,} are left")
        self.at += count
        return self.at - count

    def number(self, kind: str) -> Any:
        return unpack_from(f"<{kind}", self.data, self.skip(calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        length = self.number("Q")
        at = self.skip(length)
        return self.data[at : at + length].decode()

    def skip_texts(self, count: int) -> None:
        at, size, data = self.at, self.size, self.data
        for _ in range(count):
            if at + 8 > size:
                raise ValueError(f"{count:,} texts, and the file ends before")
            at += 8 + unpack_from("<Q", data, at)[0]
        self.at = at
        self.skip(0)


def check_gguf(path: Path) -> Header:
    """The header of a GGUF file, which is a plain one.

    Raises UserError (2) where it says what the file does not hold.
    """
    with _reading(path) as reader:
        return _header(reader)


def arrays_of(path: Path, *names: str) -> list[list[Any]]:
    """The arrays of these names, whole, of a file whose header was checked.

    Raises UserError (2) where it has none of a name.
    """
    arrays: dict[str, list[Any]] = {}
    with _reading(path) as reader:
        _, values = _counts(reader)
        for _ in range(values):
            name, kind = reader.text(), reader.number("I")
            if name in names and kind == ARRAY:
                arrays[name] = _array(reader)
            else:
                _value(reader, kind, name)
        if missing := [name for name in names if name not in arrays]:
            raise ValueError(f"{missing[0]} is missing")
    return [arrays[name] for name in names]


def _array(reader: _Reader) -> list[Any]:
    kind, count = reader.number("I"), reader.number("Q")
    if kind == TEXT:
        return [reader.text() for _ in range(count)]
    return [reader.number(NUMBERS[kind]) for _ in range(count)]


@contextmanager
def _reading(path: Path) -> Iterator[_Reader]:
    """A file from its beginning. Raises UserError (2) for what is wrong with it."""
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            yield _Reader(data)
    except (OSError, ValueError) as error:
        problem = f"{path}: cannot be read as GGUF: {error}"
        raise UserError(problem, "fetch it again, or restore it from a copy") from None


def _counts(reader: _Reader) -> tuple[int, int]:
    """How many tensors and metadata a file says that it has."""
    if reader.data[:4] != MAGIC:
        raise ValueError("it does not begin with GGUF")
    reader.skip(4)
    version = reader.number("I")
    if version not in VERSIONS:
        raise ValueError(f"version {version}, and versions 2 and 3 are known")
    tensors, values = reader.number("Q"), reader.number("Q")
    # each takes so many bytes at least
    if tensors * 24 + values * 13 > reader.size:
        raise ValueError(f"{tensors:,} tensors and {values:,} metadata in {reader.size:,} bytes")
    return tensors, values


def _header(reader: _Reader) -> Header:
    tensors, values = _counts(reader)
    header = Header(tensors=tensors)
    for _ in range(values):
        name = reader.text()
        if name in header.metadata:
            raise ValueError(f"{name[:60]} stands twice")
        header.metadata[name] = _value(reader, reader.number("I"), name)
    _check_metadata(header)
    places = [_tensor(reader, header) for _ in range(tensors)]
    alignment = header.metadata.get("general.alignment", 32)
    begin = -(-reader.at // alignment) * alignment
    end = 0
    for offset, size, name in sorted(places):
        if offset < end or offset % alignment:
            raise ValueError(f"{name[:60]} lies within another tensor")
        end = offset + size
    if begin + end > reader.size:
        raise ValueError(f"its tensors end at {begin + end:,}, and the file at {reader.size:,}")
    return header


def _value(reader: _Reader, kind: int, name: str) -> Any:
    if kind in NUMBERS:
        return reader.number(NUMBERS[kind])
    if kind == TEXT:
        return reader.text()
    if kind != ARRAY:
        raise ValueError(f"{name[:60]}: there is no type {kind} of metadata")
    kind, count = reader.number("I"), reader.number("Q")
    if kind in NUMBERS:
        reader.skip(count * calcsize(f"<{NUMBERS[kind]}"))
    elif kind == TEXT and count * 8 <= reader.size:
        reader.skip_texts(count)
    else:
        raise ValueError(f"{name[:60]}: an array of {count:,} of type {kind}")
    return count


def _check_metadata(header: Header) -> None:
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not re.fullmatch(r"[\w-]{1,60}", architecture):
        raise ValueError("general.architecture is missing")
    alignment = header.metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment not in (1 << bit for bit in range(3, 17)):
        raise ValueError(f"general.alignment: {str(alignment)[:20]}")
    for name, value in header.metadata.items():
        is_number = type(value) is int and not isinstance(value, bool)
        if SIZES.fullmatch(name) and not (is_number and 0 <= value <= MOST_PARTS):
            raise ValueError(f"{name[:60]}: {str(value)[:20]}")
        if name.endswith(".block_count") and value > header.tensors:
            raise ValueError(f"{name}: {value:,}, and there are {header.tensors:,} tensors")


def _tensor(reader: _Reader, header: Header) -> tuple[int, int, str]:
    """Where a tensor begins, how many bytes it has, and its name."""
    name = reader.text()
    dimensions = reader.number("I")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise ValueError(f"{name[:60]}: {dimensions:,} dimensions")
    shape = [reader.number("Q") for _ in range(dimensions)]
    kind, offset = reader.number("I"), reader.number("Q")
    if kind not in BLOCKS:
        raise ValueError(f"{name[:60]}: there is no type {kind} of tensors")
    numbers, size = BLOCKS[kind]
    count = math.prod(shape)
    if not count or shape[0] % numbers or count // numbers * size > reader.size:
        raise ValueError(f"{name[:60]}: a shape of {str(shape)[:60]} in {reader.size:,} bytes")
    header.numbers += count
    return offset, count // numbers * size, name
