"""What the text of `model:` or `path:` names: something on this machine, or something of the Hub.

The rule is one of spelling (`sections.is_local`), so that a recipe means the same wherever it is
read. What is neither, or was likely meant to be the other one, is refused without asking the Hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from llmpipe.errors import UserError, nearest
from llmpipe.recipe.names import ARTIFACT
from llmpipe.recipe.sections import ELSEWHERE, Recipe, is_local

Kind = Literal["model", "data set"]

EXAMPLES: dict[Kind, str] = {"model": "./folder", "data set": "./rows.jsonl"}

HUB = ("huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com")

# as huggingface_hub has it, which complains in a traceback
_HUB_ID = re.compile(r"(?:\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b", re.ASCII)

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

_SSH = re.compile(r"[\w.-]+@[\w.-]+:")

_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|[^/]*\\")


def is_here(text: str, kind: Kind, *, pinned: bool = False) -> bool:
    """Whether a text names something on this machine; else it is an id of the Hub.

    `pinned`: a revision stands beside it, as only the Hub has them. Raises UserError for a text
    that is neither, or likely meant otherwise, with what to write instead.
    """
    if not text.strip():
        raise UserError("names nothing", f"give a Hub id, or a path such as {EXAMPLES[kind]}")
    if (
        _SCHEME.match(text)
        or _SSH.match(text)
        or text.startswith(tuple(f"{host}/" for host in HUB))
    ):
        raise _address(text, kind)
    if text.startswith(ELSEWHERE):
        problem = f"{text}: is what an artifact holds of a path that it was made with"
        raise UserError(problem, "write where that lies now")
    lies_here = os.path.exists(os.path.expanduser(text))
    if _WINDOWS.match(text) and not lies_here:
        raise _windows(text)
    if is_local(text):
        return True
    if lies_here and not pinned:
        raise _without_dot(text, kind)
    name, at, revision = text.partition("@") if kind == "model" else (text, "", "")
    if at and not revision:
        raise UserError(f"{text}: no revision after the @", f"write {name}, or {name}@COMMIT")
    if not is_hub_id(name):
        raise _neither(text)
    return False


def is_hub_id(text: str) -> bool:
    """Whether the Hub could have something of this name: `NAME` or `OWNER/NAME`."""
    return _HUB_ID.fullmatch(text) is not None and not re.search(r"--|\.\.|\.git$", text)


def nearest_here(text: str) -> str | None:
    """The path of what lies here and is called nearly like that, if anything is."""
    folder, _, name = text.rstrip("/").rpartition("/")
    try:
        names = os.listdir(os.path.expanduser(folder or "."))
    except (OSError, ValueError):
        return None
    near = nearest(name, [other for other in names if not other.startswith(".")])
    if near is None:
        return None
    path = os.path.join(folder, near)
    return path if is_local(path) and "/" in path else f"./{path}"


def _address(text: str, kind: Kind) -> UserError:
    """An address: of the Hub, and then it holds the id, or of somewhere else."""
    scheme = _SCHEME.match(text)
    host, _, path = text[scheme.end() :].partition("/") if scheme else text.partition("/")
    problem = f"{text}: is an address, not a path or a Hub id"
    if scheme and scheme[1] == "file":
        return UserError(problem, f"write /{unquote(path)}")
    if scheme and scheme[1] == "hf":
        host, path = HUB[0], text[scheme.end() :]
    parts = [part for part in re.split(r"[?#]", unquote(path))[0].split("/") if part]
    if parts and parts[0] in ("models", "datasets"):
        del parts[0]
    if host not in HUB or not parts:
        return UserError(problem, f"fetch it first, and give its path, such as {EXAMPLES[kind]}")
    name = "/".join(parts[:2])
    if parts[2:3] in (["tree"], ["blob"], ["resolve"], ["commit"]) and parts[3:4] != ["main"]:
        revision = "".join(parts[3:4])
        if kind == "model":
            return UserError(problem, f"write {name}@{revision}")
        return UserError(problem, f"write {name} and, beneath it, revision: {revision}")
    return UserError(problem, f"write {name}")


def _windows(text: str) -> UserError:
    path = re.sub(r"^([A-Za-z]:|\.(?=\\))", "", text).replace("\\", "/")
    hint = "write a path with /, such as ./folder/file"
    for meant in (path, f".{path}" if path.startswith("/") else f"./{path}"):
        if os.path.exists(meant):
            hint = f"did you mean {meant}?"
    return UserError(f"{text}: is a path of Windows", hint)


def _without_dot(text: str, kind: Kind) -> UserError:
    """What would be asked of the Hub, though it lies here."""
    what = "folder" if os.path.isdir(text) else "file"
    hint = f"did you mean ./{text}?"
    if is_hub_id(text) and kind == "model":
        hint += f" The Hub's is {text}@main"
    elif is_hub_id(text):
        hint += " For the Hub's set revision: main"
    return UserError(f"{text}: is a {what} here, and a path starts with ./", hint)


def _neither(text: str) -> UserError:
    """What the Hub cannot have, and what does not begin like a path."""
    near = f"./{text}" if re.search(r"[*?\[]", text) else nearest_here(text)
    hint = f"did you mean {near}?" if near else "a path starts with ./, ../, / or ~"
    return UserError(f"{text}: is no Hub id (NAME or OWNER/NAME), and no path", hint)


# --- what an artifact holds of a path -------------------------------------------------------------


def paths_in(recipe: Recipe) -> dict[str, str]:
    """Every text of a recipe that says where something lies, by the path of its field."""
    texts = recipe.references()
    texts |= {f"{field}.path": source.path for field, source in recipe.rows().items()}
    values = recipe.model_dump(by_alias=True)
    return texts | {field: value_at(values, field) for field in recipe.files()}


def portable(text: str) -> str:
    """What an artifact holds of a path that was written in full, which tells of this machine.

    Of what lies below the current folder it is the way from there, and of all else the name alone:
    `.../rows.jsonl`. Content says which one it is.
    """
    if not os.path.isabs(text):
        return text
    below = os.path.relpath(text)
    if not below.startswith("..") and is_narrow(os.getcwd()):
        return "." if below == "." else f"./{below}"
    return ELSEWHERE + os.path.basename(text.rstrip("/"))


def portable_paths(recipe: Recipe) -> dict[str, str]:
    """What an artifact holds in place of a recipe's paths, by the path of the field."""
    models, run = recipe.references(), os.path.realpath(os.path.expanduser(recipe.run))
    return {
        field: _portable_reference(text, run) if field in models else portable(text)
        for field, text in paths_in(recipe).items()
    }


def _portable_reference(text: str, run: str) -> str:
    """`portable`, with `artifact:NAME` for one of the run."""
    parent, name = os.path.split(os.path.realpath(text))
    if os.path.isabs(text) and parent == run and os.path.exists(os.path.join(text, "recipe.yaml")):
        return f"{ARTIFACT}{name}"
    return portable(text)


def is_narrow(folder: str) -> bool:
    """Whether a folder is somebody's own, unlike / and /tmp."""
    return len(Path(folder).parts) > 2


def value_at(document: Any, field: str) -> Any:
    """The value at a dotted path."""
    for step in field.split("."):
        document = document[int(step)] if isinstance(document, list) else document[step]
    return document


def with_values(value: Any, changed: Mapping[str, Any], field: str = "") -> Any:
    """A document with the values at some dotted paths replaced."""
    if field in changed:
        return changed[field]
    prefix = f"{field}." if field else ""
    if isinstance(value, dict):
        return {key: with_values(inner, changed, f"{prefix}{key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [with_values(inner, changed, f"{prefix}{i}") for i, inner in enumerate(value)]
    return value
