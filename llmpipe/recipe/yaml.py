"""The language of recipes: YAML, stricter, with the line of every value.

There are no anchors, tags or duplicate keys, and scalars are read as YAML 1.2 does, so `1e-5` is a
number and `no` is a string.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from llmpipe.errors import UserError

Loc = tuple[str | int, ...]
"""The path of a value: keys, and places in lists."""

Where = dict[Loc, str]
"""Path of a value -> "file:line"."""

_NULL = re.compile(r"~|null|Null|NULL|")

_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")

_INT = re.compile(r"[-+]?[0-9][0-9_]*")

_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")

_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_HALF = re.compile("[\ud800-\udfff]")

_UNSEEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff]")

_PLACE = re.compile("[0-9]{1,9}")  # a number in a path is a place in a list

_DIGITS = 100  # a longer integer is read as a float

_DEPTH = 30  # deeper nesting is no recipe

_BYTES = 256 << 10  # of a larger file nobody would read every line

_LINE = 200  # characters of a `--set` that are shown

_VALUES = 10_000  # more keys, items and values than this are data, which a recipe names


def read(path: Path) -> tuple[Any, Where]:
    """Read a recipe file; the values and the line of each.

    Raises UserError for what is no file, larger than a recipe, or no YAML.
    """
    try:
        if not path.is_dir() and not stat.S_ISREG(path.stat().st_mode):  # it may have no end
            hint = "save it as a file of its own"
            raise UserError(f"{path}:1: cannot be read: is a pipe or a device, no file", hint)
        with path.open("rb") as file:
            beginning = file.read(_BYTES + 1)
    except FileNotFoundError:
        hint = "`llmpipe init DIR` writes one to start from"
        raise UserError(f"{path}: no such recipe", hint) from None
    except (OSError, ValueError) as error:  # a NUL is in no path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}:1: cannot be read: {reason}") from None
    if len(beginning) > _BYTES:
        raise UserError(f"{path}:1: is larger than a recipe may be, {_BYTES >> 10} kB", _NAME_DATA)
    try:
        text = beginning.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = beginning.count(b"\n", 0, error.start) + 1
        problem = f"{path}:{line}: cannot be read: not UTF-8 text"
        raise UserError(problem, "save the file as UTF-8") from None
    return parse(text, str(path))


_NAME_DATA = "name data by its path; a recipe holds none"


def parse(text: str, name: str) -> tuple[Any, Where]:
    """YAML text -> plain values and the line of each. Raises UserError naming `name:line`."""
    try:
        node = _Loader(text, name).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        context = f" ({error.context})" if error.context else ""
        raise UserError(f"{name}:{line}: not valid YAML: {error.problem}{context}") from None
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML does not allow
        line = text[: getattr(error, "position", 0)].count("\n") + 1
        reason = getattr(error, "reason", error)
        raise UserError(f"{name}:{line}: not valid YAML: {reason}") from None
    if node is None:
        hint = "`llmpipe init DIR` writes a recipe to start from"
        raise UserError(f"{name}:1: the file is empty", hint)
    reader = _Reader(name)
    values = reader.plain(node, ())
    if reader.problems:
        raise UserError("\n".join(reader.problems))
    return values, reader.where


class _Loader(yaml.SafeLoader):
    """YAML's own, less what recipes do not use, and not without end. Raises UserError."""

    def __init__(self, text: str, file: str):
        super().__init__(text)
        self.file = file
        self.depth = 0
        self.values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML has no types for it
        if problem := self._problem(event):
            raise UserError(f"{self.file}:{event.start_mark.line + 1}: {problem}")
        self.values += 1
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _problem(self, event: Any) -> str | None:
        """What is wrong with a node, by the event that it begins with."""
        if isinstance(event, yaml.AliasEvent):
            return "aliases (*name) are not used in recipes; write the value out, or quote it"
        if event.anchor is not None:
            return "anchors (&name) are not used in recipes; write the value out"
        if event.tag is not None:
            return "tags (!name) are not used in recipes; quote the value if it starts with '!'"
        if self.depth > _DEPTH:
            return f"nested too deeply: more than {_DEPTH} levels"
        if self.values >= _VALUES:
            return f"holds more than {_VALUES:,} values; {_NAME_DATA}"
        return None


class _Reader:
    """Plain values of YAML nodes, and where each of them stands."""

    def __init__(self, name: str):
        self.name = name
        self.where: Where = {}
        self.problems: list[str] = []

    def plain(self, node: yaml.Node, loc: Loc) -> Any:
        self.where[loc] = self.line_of(node)
        if isinstance(node, yaml.ScalarNode):
            text = self.text_of(node)
            quoted = node.style is not None
            return text if quoted else _scalar(text)
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
            key = self.text_of(key_node)
            path = (*loc, key)
            if key in values:
                first = self.where[path].rpartition(":")[2]
                problem = f"{dotted(path)}: given twice; the first is on line {first}"
                self.problems.append(f"{line}: {problem}")
                continue
            values[key] = self.plain(value_node, path)
            self.where[path] = line
        return values

    def text_of(self, node: yaml.ScalarNode) -> str:
        """What a scalar says. JSON escapes one character as two halves."""
        text: str = node.value
        if node.style == '"' and _HALF.search(text):
            try:
                text = text.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                self.problems.append(f"{self.line_of(node)}: half a surrogate pair")
        return text

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
        source = f"--set {item}" if len(item) < _LINE else f"--set {item[:_LINE]}..."
        key, equals, text = item.partition("=")
        if not equals or not all(key.split(".")):
            hint = "a path of keys, =, and a value: --set optim.learning_rate=1e-5"
            raise UserError(f"{source}: expected key.sub=value", hint)
        try:
            key = place(key)
        except UserError as error:
            raise UserError(f"{source}: {error.message}", f"{error.hint}{text}") from None
        value = parse(text, source)[0] if text.strip() else None
        loc: Loc = tuple(int(part) if _PLACE.fullmatch(part) else part for part in key.split("."))
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


def dump(values: dict[str, Any]) -> str:
    """A recipe as YAML, its fields in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """YAML's own, with quotes around texts that `parse` would not read as they are."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    is_safe = isinstance(_scalar(text), str) and not _UNSEEN.search(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_safe else '"')


_Dumper.add_representer(str, _text)
