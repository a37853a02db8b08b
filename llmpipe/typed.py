"""Records that JSON holds, each field checked by its annotation. Without pydantic: `llmpipe show`
reads them, and opens fast.

What a file says of an artifact comes with the artifact and is as untrusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def record(kind: type[T], document: Any, at: str = "") -> T:
    """A dataclass of the fields that it knows of a document; what it does not know is passed over.

    `at`: what leads to the document, for messages. Raises ValueError naming the first field that is
    missing, or is not of its type.
    """
    if not isinstance(document, Mapping):
        raise ValueError(f"{at or 'it'}: {_shown(document)} is no object")
    values = {}
    for name, annotation, needed in _fields(kind):
        path = f"{at}.{name}" if at else name
        if name in document:
            values[name] = _value(annotation, document[name], path)
        elif needed:
            raise ValueError(f"{path}: is missing")
    return kind(**values)


@cache
def _fields(kind: type[DataclassInstance]) -> list[tuple[str, Any, bool]]:
    """Name, annotation, and whether it has no default, of every field."""
    hints = get_type_hints(kind)
    return [
        (entry.name, hints[entry.name], entry.default is entry.default_factory is MISSING)
        for entry in fields(kind)
    ]


def _value(annotation: Any, value: Any, at: str) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value
    if is_dataclass(annotation):
        assert isinstance(annotation, type)
        return record(annotation, value, at)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        *others, last = (kind for kind in arguments if kind is not NoneType)
        for kind in others:
            with suppress(ValueError):
                return _value(kind, value, at)
        return _value(last, value, at)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{at}: {_shown(value)} is not one of {', '.join(map(str, arguments))}")
    if origin is list and isinstance(value, list):
        return [_value(arguments[0], item, f"{at}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _value(arguments[1], item, f"{at}.{key}") for key, item in value.items()}
    if annotation is float and type(value) in (int, float):
        return value
    if type(value) is not annotation:
        words = WORDS.get(annotation, "an object" if origin is dict else "a list")
        raise ValueError(f"{at}: {_shown(value)} is not {words}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
