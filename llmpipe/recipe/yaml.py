"""The language of recipes: YAML, stricter, with the line of every value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from llmpipe.errors import UserError
from llmpipe.recipe.sections import Recipe

Loc = tuple[str | int, ...]

Where = dict[Loc, str]  # path of a value -> "file:line"

_NULL = re.compile(r"~|null|Null|NULL|")

_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")

_INT = re.compile(r"[-+]?[0-9][0-9_]*")

_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")

_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_DEPTH = 30  # deeper nesting is no recipe


def _scalar(text: str) -> Any:
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text) and len(text) < 100:
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "").lower())
    return text


def _plain(node: yaml.Node, name: str, loc: Loc, where: Where, problems: list[str]) -> Any:
    where[loc] = at = f"{name}:{node.start_mark.line + 1}"
    if len(loc) > _DEPTH:
        raise UserError(f"{at}: nested too deeply")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, name, (*loc, i), where, problems) for i, item in enumerate(node.value)]
    out: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key_at = f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{key_at}: a key must be a plain word")
            continue
        key = key_node.value
        if key in out:
            problems.append(
                f"{key_at}: {_dotted((*loc, key))}: given twice; the first is on line "
                f"{where[(*loc, key)].rpartition(':')[2]}"
            )
            continue
        out[key] = _plain(value_node, name, (*loc, key), where, problems)
        where[(*loc, key)] = key_at
    return out


def parse(text: str, name: str) -> tuple[Any, Where]:
    """YAML text -> plain values and the line of each. Raises UserError naming `name:line`."""
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            what = {
                yaml.AnchorToken: "anchors (&name) are not used in recipes; write the value out",
                yaml.AliasToken: "aliases (*name) are not used in recipes; write the value out, or quote it",
                yaml.TagToken: "tags (!name) are not used in recipes; quote the value if it starts with '!'",
            }.get(type(token))
            if what:
                raise UserError(f"{name}:{token.start_mark.line + 1}: {what}")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f" ({error.context})" if error.context else ""
        raise UserError(
            f"{name}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}{context}"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        line = text[: getattr(error, "position", 0)].count("\n") + 1
        raise UserError(
            f"{name}:{line}: not valid YAML: {getattr(error, 'reason', error)}"
        ) from None
    except RecursionError:
        raise UserError(f"{name}:1: nested too deeply") from None
    if node is None:
        raise UserError(
            f"{name}:1: the file is empty", "`llmpipe init DIR` writes a recipe to start from"
        )
    where: Where = {}
    problems: list[str] = []
    values = _plain(node, name, (), where, problems)
    if problems:
        raise UserError("\n".join(problems))
    return values, where


def read(path: Path) -> tuple[Any, Where]:
    """Read a recipe file; the values and the line of each."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such recipe", "`llmpipe init DIR` writes one to start from"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"{path}:1: cannot be read: {reason}") from None
    return parse(text, str(path))


def apply_sets(values: dict, where: Where, sets: list[str]) -> None:
    """Apply `--set key.sub=value` in place; the value is YAML, a number in the path indexes a list."""
    for item in sets:
        key, equals, text = item.partition("=")
        at = f"--set {item}"
        if not equals or not key:
            raise UserError(f"{at}: expected key.sub=value")
        value, _ = parse(text, at) if text.strip() else (None, {})
        loc: list[str | int] = [int(part) if part.isdigit() else part for part in key.split(".")]
        target: Any = values
        for depth, part in enumerate(loc[:-1]):
            if isinstance(target, list) and isinstance(part, int) and part < len(target):
                target = target[part]
            elif isinstance(target, dict) and isinstance(part, str):
                if target.get(part) is None:
                    target[part] = {}
                target = target[part]
            else:
                raise UserError(
                    f"{at}: there is no {'.'.join(map(str, loc[: depth + 1]))} in the recipe"
                )
        last = loc[-1]
        if isinstance(target, list) and isinstance(last, int) and last < len(target):
            target[last] = value
        elif isinstance(target, dict) and isinstance(last, str):
            target[last] = value
        else:
            raise UserError(f"{at}: there is no {key} in the recipe")
        for known in [k for k in where if k[: len(loc)] == tuple(loc)]:
            del where[known]
        where[tuple(loc)] = at


def _dotted(loc: Loc) -> str:
    return ".".join(str(part) if str(part).isprintable() else repr(part) for part in loc)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every default written out."""
    return yaml.safe_dump(
        recipe.model_dump(by_alias=True), sort_keys=False, allow_unicode=True, width=100
    )
