"""The language of recipes: YAML, stricter, with the line of every value.

There are no anchors, tags or duplicate keys, and scalars are read as YAML 1.2 does, so `1e-5` is a
number and `no` is a string.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from llmpipe.errors import UserError
from llmpipe.recipe.sections import Recipe

Loc = tuple[str | int, ...]
"""The path of a value: keys, and places in lists."""

Where = dict[Loc, str]
"""Path of a value -> "file:line"."""

_NULL = re.compile(r"~|null|Null|NULL|")

_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")

_INT = re.compile(r"[-+]?[0-9][0-9_]*")

_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")

_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_DIGITS = 100  # a longer integer is read as a float

_DEPTH = 30  # deeper nesting is no recipe

_REFUSED: dict[type[yaml.Token], str] = {
    yaml.AnchorToken: "anchors (&name) are not used in recipes; write the value out",
    yaml.AliasToken: "aliases (*name) are not used in recipes; write the value out, or quote it",
    yaml.TagToken: "tags (!name) are not used in recipes; quote the value if it starts with '!'",
}


def read(path: Path) -> tuple[Any, Where]:
    """Read a recipe file; the values and the line of each."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        hint = "`llmpipe init DIR` writes one to start from"
        raise UserError(f"{path}: no such recipe", hint) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}:1: cannot be read: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}:1: cannot be read: {error.strerror}") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> tuple[Any, Where]:
    """YAML text -> plain values and the line of each. Raises UserError naming `name:line`."""
    try:
        _refuse_tokens(text, name)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        context = f" ({error.context})" if error.context else ""
        raise UserError(f"{name}:{line}: not valid YAML: {error.problem}{context}") from None
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML does not allow
        line = text[: getattr(error, "position", 0)].count("\n") + 1
        reason = getattr(error, "reason", error)
        raise UserError(f"{name}:{line}: not valid YAML: {reason}") from None
    except RecursionError:
        raise UserError(f"{name}:1: nested too deeply") from None
    if node is None:
        hint = "`llmpipe init DIR` writes a recipe to start from"
        raise UserError(f"{name}:1: the file is empty", hint)
    reader = _Reader(name)
    values = reader.plain(node, ())
    if reader.problems:
        raise UserError("\n".join(reader.problems))
    return values, reader.where


def _refuse_tokens(text: str, name: str) -> None:
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if reason := _REFUSED.get(type(token)):
            raise UserError(f"{name}:{token.start_mark.line + 1}: {reason}")


class _Reader:
    """Plain values of YAML nodes, and where each of them stands."""

    def __init__(self, name: str):
        self.name = name
        self.where: Where = {}
        self.problems: list[str] = []

    def plain(self, node: yaml.Node, loc: Loc) -> Any:
        self.where[loc] = self.line_of(node)
        if len(loc) > _DEPTH:
            raise UserError(f"{self.where[loc]}: nested too deeply")
        if isinstance(node, yaml.ScalarNode):
            quoted = node.style is not None
            return node.value if quoted else _scalar(node.value)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, (*loc, i)) for i, item in enumerate(node.value)]
        return self.mapping(node, loc)

    def mapping(self, node: yaml.Node, loc: Loc) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = self.line_of(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(f"{line}: a key must be a plain word")
                continue
            key = key_node.value
            path = (*loc, key)
            if key in values:
                first = self.where[path].rpartition(":")[2]
                problem = f"{dotted(path)}: given twice; the first is on line {first}"
                self.problems.append(f"{line}: {problem}")
                continue
            values[key] = self.plain(value_node, path)
            self.where[path] = line
        return values

    def line_of(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"


def _scalar(text: str) -> Any:
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text) and len(text) < _DIGITS:
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "").lower())
    return text


def apply_sets(
    values: dict[str, Any], where: Where, sets: list[str], place: Callable[[str], str] = str
) -> None:
    """Apply each `--set key.sub=value` in place; the value is YAML.

    `place`: where a key that was given stands in the file; its hint ends before the value.
    """
    for item in sets:
        source = f"--set {item}"
        key, equals, text = item.partition("=")
        if not equals or not all(key.split(".")):
            hint = "a path of keys, =, and a value: --set optim.learning_rate=1e-5"
            raise UserError(f"{source}: expected key.sub=value", hint)
        try:
            key = place(key)
        except UserError as error:
            raise UserError(f"{source}: {error.message}", f"{error.hint}{text}") from None
        value = parse(text, source)[0] if text.strip() else None
        # a number in the path is a place in a list
        loc: Loc = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
        _put(values, loc, value, source)
        for old in [known for known in where if known[: len(loc)] == loc]:
            del where[old]
        for depth in range(1, len(loc)):  # sections that it made
            where.setdefault(loc[:depth], source)
        where[loc] = source


def _put(values: dict[str, Any], loc: Loc, value: Any, source: str) -> None:
    """Set the value at a path; mappings on the way are made, places in a list are not."""
    target: Any = values
    for depth, part in enumerate(loc, 1):
        last = depth == len(loc)
        listed = isinstance(target, list) and isinstance(part, int) and part < len(target)
        keyed = isinstance(target, dict) and isinstance(part, str)
        if not listed and not keyed:
            path = ".".join(map(str, loc[:depth]))
            raise UserError(
                f"{source}: there is no {path} in the recipe", _known(target, loc[:depth])
            )
        if last:
            target[part] = value
        elif keyed and target.get(part) is None:
            target[part] = {}
        target = target[part]


def _known(target: Any, loc: Loc) -> str:
    """What there is in place of the last part of a path."""
    above = dotted(loc[:-1])
    if isinstance(target, list):
        count = len(target)
        return (
            f"{above} is a list: {above}.0 to {above}.{count - 1}" if count else f"{above} is empty"
        )
    if isinstance(target, dict):
        return f"{above or 'a recipe'} has keys, and no places: {', '.join(map(str, target))}"
    return f"{above} is {target!r}, and holds no keys"


def dotted(loc: Loc) -> str:
    """A path as a person writes it: `data.train.0.path`."""
    return ".".join(str(part) if str(part).isprintable() else repr(part) for part in loc)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every default written out."""
    values = recipe.model_dump(by_alias=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
