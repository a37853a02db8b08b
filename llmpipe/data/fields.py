"""Checks of single values, and the one exception that all of them raise."""

from __future__ import annotations

import json
import math
from datetime import date, datetime
from typing import Any


class Values(dict[str, Any]):
    """A row's columns under the names of its format, and what is to be said of them."""

    def __init__(self, columns: dict[str, Any]):
        super().__init__(columns)
        self.unread: set[str] = set()
        """What they hold that nobody reads."""
        self.noted: set[str] = set()
        """Sentences on what was done with them that nobody would expect."""


class Rejected(Exception):
    """A row that cannot be used.

    `reason` is what the manifest counts by, `detail` says more about this row; `tokens`: of all of
    it, where more than these do not fit.
    """

    def __init__(self, reason: str, detail: str = "", tokens: int = 0):
        super().__init__(reason, detail, tokens)
        self.reason = reason
        self.detail = detail
        self.tokens = tokens

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true/false",
    int: "a number",
    float: "a number",
    bytes: "bytes",
    date: "a date",
    datetime: "a date and time, as `datasets` makes of a text",
}


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    return _KINDS.get(type(value), type(value).__name__)


def text_of(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    """A text that can be tokenized. Raises Rejected."""
    if not isinstance(value, str):
        raise Rejected("wrong type", f"{name} is {kind_of(value)}, not text")
    if not may_be_empty and not value.strip():
        raise Rejected("empty text", name)
    if "\x00" in value:
        raise Rejected("NUL character", name)
    if not is_text(value):
        raise Rejected("broken Unicode", f"{name} holds half a surrogate pair")
    return value


def is_text(text: str) -> bool:
    """Whether a string holds no half of a surrogate pair, which no file of UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def optional_text(values: Values, name: str) -> str:
    """A text that may be missing, then "". One that is only whitespace is missing, too."""
    value = values.get(name)
    if value is None:
        return ""
    text = text_of(value, name, may_be_empty=True)
    return text if text.strip() else ""


def optional_number(values: Values, name: str) -> float | None:
    """A finite number, also one that is written as text. Raises Rejected."""
    value = values.get(name)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise Rejected("wrong type", f"{name} is {str(value)[:40]!r}, not a number")
    return number


def strict_json(text: str) -> Any:
    """The value of a JSON text. Raises Rejected for a name twice in one object, of whose values one
    would be lost, a name that is no text, NaN and Infinity; ValueError and RecursionError for what
    is none."""
    return _DECODER.decode(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in columns if names.count(name) > 1)
        raise Rejected("two values", f"for '{twice}' in one object")
    if not all(map(str.isascii, columns)) and not is_text("".join(columns)):
        raise Rejected("broken Unicode", "a name in an object holds half a surrogate pair")
    return columns


def _no_constant(name: str) -> None:
    raise Rejected("bad JSON", f"{name} is no JSON; null is")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)


def parsed_json(text: str, reason: str, at: str) -> Any:
    """The value of a JSON text within a row. Raises Rejected, with this reason for what is none."""
    try:
        return strict_json(text)
    except (ValueError, RecursionError) as error:
        raise Rejected(reason, f"{at}: not JSON: {error}") from None


def plain(value: Any, at: str, values: Values) -> Any:
    """A JSON value less the keys that hold null, at every depth. Raises Rejected.

    Tables have a null wherever another row has a key, so a null says nothing: what is learned is
    the same from a table and from JSON, where a person may have written it. One in a list stays.
    """
    try:
        return _plain(value, at, values)
    except RecursionError:
        raise Rejected("wrong type", f"{at} is nested without end") from None


def _plain(value: Any, at: str, values: Values) -> Any:
    if isinstance(value, str):
        return text_of(value, at, may_be_empty=True)
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if item is not None}
        if len(kept) < len(value):
            values.noted.add("nulls in tools and tool calls are left out")
        for name in kept:
            text_of(name, at, may_be_empty=True)
            kept[name] = _plain(kept[name], at, values)
        return kept
    if isinstance(value, list):
        return [_plain(item, at, values) for item in value]
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    shown = f"{kind_of(value)}, {str(value)[:40]}"
    raise Rejected("wrong type", f"{at} holds what JSON has not: {shown}")
