"""What the header of a safetensors file says, held against the file: no tensor is read.

    8 bytes, little-endian       length of the header
    JSON, {name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {}}
    the tensors, without gaps

(https://huggingface.co/docs/safetensors.)
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import parse_json
from llmpipe.files.paths import unreachable

LARGEST_HEADER = 100_000_000
"""Bytes, as the library has it."""

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Of a number of each kind."""


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


def tensors_in(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. Raises UserError (3) where the file is not whole,
    or its header says what the file does not hold.
    """
    try:
        return _tensors(path)
    except (OSError, ValueError, struct.error) as error:
        problem = str(error)
        if isinstance(error, OSError):
            problem = unreachable(path) or f"cannot be read: {error.strerror}"
        hint = "fetch it again, or restore it from a copy"
        raise UserError(
            f"{path}: is no whole safetensors file: {problem}", hint, INTEGRITY
        ) from None


def _tensors(path: Path) -> dict[str, Tensor]:
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, LARGEST_HEADER):
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        header = parse_json(file.read(length).decode(), twice=False)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    header.pop("__metadata__", None)
    tensors, places = {}, []
    for name, entry in header.items():
        tensors[name], place = _tensor(name, entry)
        places.append((*place, name))
    begun = 0
    for begin, end, name in sorted(places):
        if begin != begun:
            raise ValueError(f"{name} begins at {begin:,}, and what is before it ends at {begun:,}")
        begun = end
    if begun != size - 8 - length:
        raise ValueError(f"its tensors are {begun:,} bytes, and the file has {size - 8 - length:,}")
    return tensors


def _tensor(name: str, entry: Any) -> tuple[Tensor, tuple[int, int]]:
    """A tensor, and the bytes [begin, end) that it has."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise ValueError(f"{name}: has no dtype, shape and data_offsets")
    if dtype not in BITS or not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"{name}: no tensor has dtype {dtype[:20]} and shape {str(shape)[:60]}")
    if begin < 0 or (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"{name}: {end - begin:,} bytes for a shape of {str(shape)[:60]}")
    return Tensor(dtype, tuple(shape)), (begin, end)
