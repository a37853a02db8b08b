"""Checks of single values, and the one exception that all of them raise."""

from __future__ import annotations

import json
import math
from typing import Any

Values = dict[str, Any]  # a row's columns under the names of its format


class Rejected(Exception):
    """A row that cannot be used.

    `reason` is what the manifest counts by, `detail` says more about this row.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true/false",
    int: "a number",
    float: "a number",
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
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Rejected("broken Unicode", f"{name} holds half a surrogate pair") from None
    return value


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
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise Rejected("wrong type", f"{name} is {str(value)[:40]!r}, not a number")
    return number


def parsed_json(text: str, reason: str, at: str) -> Any:
    """The value of a JSON text within a row. Raises Rejected with this reason."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected(reason, f"{at}: not JSON: {error}") from None


def check_texts(value: Any, at: str) -> None:
    """Check every text within a JSON value, keys too, as a column's text is checked."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            text_of(item, at, may_be_empty=True)
        elif isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            stack += item
