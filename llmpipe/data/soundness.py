"""Whether a tokenizer.json may be loaded: read as data, before any library builds it.

It comes with the model and is as untrusted as the model. What it is made of may let a text grow
without end (a replacement of one character by a thousand, three times over), or hold a pattern that
takes as long as the text is long to the power of something; and what Rust computes, no timer of
ours can stop. So the parts that replace, prepend, pad or match are held against limits that no
tokenizer of a real family comes near.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmpipe.data.patterns import check_pattern
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import read_text

LARGEST = 256 << 20
"""Bytes; 262,144 pieces take 34 MB."""

MOST_PARTS = 100

GROWTH = 64
"""By which a text may grow at most as it is normalized, one replacement after the other."""

MOST_ADDED = 100
"""Characters that are put before a text, or in the place of some."""

MOST_MAPPED = 255
"""Bytes in the place of a character in sentencepiece's map; Unicode's longest has 33."""

GAPS = 1 << 16
"""Numbers of tokens that nobody has, beside as many as there are tokens."""

MOST_PADDED = 1 << 20
"""Tokens that a text may be padded to."""

PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def check_tokenizer(path: Path) -> None:
    """Refuse a tokenizer.json that is none, or that would not come to an end.

    Nothing where there is no such file. Raises UserError (3).
    """
    try:
        _check(json.loads(read_text(path, LARGEST)))
    except FileNotFoundError:
        return
    except RecursionError:
        raise _refusal(path, "it is nested too deep") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _refusal(path, reason) from None


def _refusal(path: Path, reason: str) -> UserError:
    problem = f"{path}: the tokenizer of the model cannot be used: {reason}"
    return UserError(problem, "take the files of the model's own maker", INTEGRITY)


def _check(document: Any) -> None:
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")
    _check_numbers(document)
    _check_padding(document.get("padding"))
    parts = [(name, part) for name in PARTS for part in _parts(document.get(name), name)]
    if len(parts) > MOST_PARTS:
        raise ValueError(f"{len(parts):,} parts, of which it may have {MOST_PARTS}")
    growth = 1.0
    for name, part in parts:
        _check_part(name, part)
        if name == "normalizer" and part.get("type") == "Replace":
            growth *= _growth(part)
    if growth > GROWTH:
        problem = f"a text may grow by {growth:,.0f} as it is normalized"
        raise ValueError(f"normalizer: {problem}, and {GROWTH} is the most")


def _parts(value: Any, name: str) -> Iterator[dict[str, Any]]:
    """What a part is made of, in the order in which a text goes through it."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if part is None:
            continue
        if not isinstance(part, dict):
            raise ValueError(f"{name}: {str(part)[:40]!r} is no part of a tokenizer")
        yield part
        for key in ("normalizers", "pretokenizers", "processors", "decoders"):
            inner = part.get(key, [])
            if not isinstance(inner, list) or len(inner) > MOST_PARTS:
                raise ValueError(f"{name}: {key} is no list of up to {MOST_PARTS} parts")
            waiting += reversed(inner)


def _check_part(name: str, part: dict[str, Any]) -> None:
    for key in ("content", "prepend", "prefix", "suffix", "replacement"):
        if isinstance(part.get(key), str) and len(part[key]) > MOST_ADDED:
            length = len(part[key])
            raise ValueError(f"{name}: {key} of {length:,} characters, {MOST_ADDED} are the most")
    for key in ("single", "pair"):
        if isinstance(part.get(key), list) and len(part[key]) > MOST_PARTS:
            raise ValueError(f"{name}: {key} has more than {MOST_PARTS} parts")
    match part.get("pattern"):
        case {"Regex": pattern}:
            if not isinstance(pattern, str):
                raise ValueError(f"{name}: a pattern is a text")
            try:
                check_pattern(pattern)
            except ValueError as error:
                raise ValueError(f"{name}: the pattern {pattern[:40]!r}: {error}") from None
    if part.get("type") == "Precompiled":
        _check_map(part.get("precompiled_charsmap"))


def _growth(part: dict[str, Any]) -> float:
    """By how much a text may grow where all of it is replaced."""
    content = len(part["content"]) if isinstance(part.get("content"), str) else 0
    match part.get("pattern"):
        case {"String": str(text)} if text:
            return max(1.0, content / len(text))
    return 1.0 + content  # a pattern may match between any two characters


def _check_map(value: Any) -> None:
    """sentencepiece's map of characters: the bytes of a trie, 4 bytes that say how many, and the
    texts that characters become, each ended by a NUL."""
    try:
        data = base64.b64decode(value or b"", validate=True)
        (length,) = struct.unpack_from("<I", data)
    except (TypeError, binascii.Error, struct.error):
        raise ValueError("normalizer: its map of characters is none") from None
    if length % 4 or length > len(data) - 4:
        raise ValueError("normalizer: its map of characters is cut")
    longest = max(map(len, data[4 + length :].split(b"\0")))
    if longest > MOST_MAPPED:
        raise ValueError(f"normalizer: a character becomes {longest:,} bytes")


def _check_padding(padding: Any) -> None:
    if padding is None:
        return
    strategy = padding.get("strategy") if isinstance(padding, dict) else padding
    match strategy:
        case "BatchLongest":
            lengths = [padding.get("pad_to_multiple_of")]
        case {"Fixed": length}:
            lengths = [length, padding.get("pad_to_multiple_of")]
        case _:
            raise ValueError(f"padding: {str(padding)[:40]!r} is none")
    for length in lengths:
        if length is not None and not (type(length) is int and 0 < length <= MOST_PADDED):
            raise ValueError(f"padding: to {str(length)[:20]} tokens")


def _check_numbers(document: dict[str, Any]) -> None:
    """The numbers of tokens: each has a row of the embeddings, up to the highest."""
    model, added = document.get("model"), document.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(added, list):
        raise ValueError("its model or its added tokens are none")
    if model.get("dropout"):
        raise ValueError("model.dropout: it would draw its tokens at random")
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict | list) or not vocabulary:
        raise ValueError("model.vocab: it has no tokens")
    most = 2 * (len(vocabulary) + len(added)) + GAPS
    numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    for token in added:
        if not (isinstance(token, dict) and isinstance(text := token.get("content"), str) and text):
            raise ValueError(f"added_tokens: {str(token)[:40]!r} is no token")
        numbers.append(token.get("id"))
    if not all(type(number) is int for number in numbers):
        raise ValueError("model.vocab: the number of a token is no number")
    if numbers and not (min(numbers) >= 0 and max(numbers) < most):
        odd = max(numbers) if min(numbers) >= 0 else min(numbers)
        problem = f"a token has the number {odd if abs(odd) < 1 << 64 else 'without end'}"
        raise ValueError(f"{problem}, and there are {len(vocabulary) + len(added):,} tokens")
