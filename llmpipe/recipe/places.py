"""What the text of `model:` or `path:` names: something on this machine, or something of the Hub.

The rule is one of spelling (`sections.is_local`), so that a recipe means the same wherever it is
read. What is neither, or was likely meant to be the other one, is refused without asking the Hub.
"""

from __future__ import annotations

import os
import re
from typing import Literal
from urllib.parse import unquote

from llmpipe.errors import UserError, nearest
from llmpipe.recipe.names import ARTIFACT
from llmpipe.recipe.sections import is_local

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
    if text.startswith(ARTIFACT):
        name = text.removeprefix(ARTIFACT)
        problem = f"{text}: rows are read from files and from the Hub, not from an artifact"
        return UserError(problem, f"a file of one has a path, such as ./runs/RUN/{name}/FILE")
    near = f"./{text}" if re.search(r"[*?\[]", text) else nearest_here(text)
    hint = f"did you mean {near}?" if near else "a path starts with ./, ../, / or ~"
    return UserError(f"{text}: is no Hub id (NAME or OWNER/NAME), and no path", hint)
