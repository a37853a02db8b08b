"""The pages that are made: every field of every recipe, and what is supported.

    python docs/make/pages.py

`make docs` does it, and a test sees that the pages are as they would be made.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["LLMPIPE_DOCSTRINGS"] = "1"  # before the sections are imported

import yaml

from llmpipe.stages import STAGES, schema

HERE = Path(__file__).parent
DOCS = HERE.parent
SUPPORT = HERE / "support.yaml"
NOTE = "<!-- made by docs/make/pages.py, as `make docs` does: change {source} instead -->"

NO_LIMIT = 10**6  # bounds from here on keep nobody from anything

Node = dict[str, Any]


# --- fields ---------------------------------------------------------------------------------------


def fields_page(stage: str) -> str:
    """Every field of a stage's recipe, a heading for each section."""
    document = schema(stage).model_json_schema()
    sections = document.get("$defs", {})
    story = f"{STAGES[stage][0].upper()}{STAGES[stage][1:]}"
    lines = [
        NOTE.format(source="the docstring under a field"),
        f"# {stage}",
        "",
        f"{story}. What it is: [the road](../road/{_page(stage)}.md).",
        f"A field without a default is required. As JSON Schema: `llmpipe schema {stage}`.",
        "",
        *_tables(document, sections),
    ]
    return "\n".join(lines) + "\n"


def _page(stage: str) -> str:
    return "lora" if stage == "qlora" else stage


def _tables(document: Node, sections: dict[str, Node]) -> Iterator[str]:
    """A table of the recipe's own fields, then one for each section, as they first come."""
    ordered: list[tuple[str, Node]] = []
    places: dict[str, str] = {}
    todo: list[tuple[str, Node]] = [("", document)]
    while todo:
        path, section = todo.pop(0)
        ordered.append((path, section))
        below = []
        for name, field in section.get("properties", {}).items():
            for section_name in _named(field):
                shape = sections[section_name]
                if shape.get("properties") and section_name not in places:
                    places[section_name] = _below(path, name, field, section_name)
                    below.append((places[section_name], shape))
        todo = below + todo
    for path, section in ordered:
        yield from _table(path, section, sections, places)


def _below(path: str, name: str, field: Node, section: str) -> str:
    """What the fields of a section are called: `data.train[]`, `tasks[] (Generate)`."""
    inside = f"{path}.{name}" if path else name
    if "items" in field or any("items" in one for one in field.get("anyOf", [])):
        inside += "[]"
    elif isinstance(field.get("additionalProperties"), dict):
        inside += ".NAME"
    several = len(_named(field)) > 1
    return f"{inside} ({section})" if several else inside


def _named(node: Any) -> list[str]:
    """The sections that a field's type names, in their order."""
    if isinstance(node, dict):
        reference = [node["$ref"].rpartition("/")[2]] if "$ref" in node else []
        inner = [
            name for key, value in node.items() if key != "discriminator" for name in _named(value)
        ]
        return list(dict.fromkeys(reference + inner))
    if isinstance(node, list):
        return list(dict.fromkeys(name for value in node for name in _named(value)))
    return []


def _table(
    path: str, section: Node, sections: dict[str, Node], places: dict[str, str]
) -> Iterator[str]:
    if path:
        yield from (f"## `{path}`", "")
    yield from ("| field | type | default | meaning |", "| --- | --- | --- | --- |")
    required = section.get("required", [])
    for name, field in section.get("properties", {}).items():
        kind = _type(field, sections)
        if (inner := [it for it in _named(field) if it in places]) and len(inner) == 1:
            kind = kind.replace("section", f"[section](#{_anchor(places[inner[0]])})")
        default = "" if name in required else _default(field)
        meaning = " ".join(str(field.get("description", "")).split()).replace("|", "\\|")
        yield f"| `{name}` | {kind} | {default} | {meaning} |"
    yield ""


def _anchor(heading: str) -> str:
    """What a heading is called in a link."""
    return re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-")


def _type(node: Node, sections: dict[str, Node]) -> str:
    """A type in a few words."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return "section" if sections[name].get("properties") else _type(sections[name], sections)
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    for several in ("anyOf", "oneOf"):
        if several in node:
            kinds = (_type(one, sections) for one in node[several])
            return " or ".join(dict.fromkeys(kinds))
    if "allOf" in node:
        return _type(node["allOf"][0], sections)
    kind = node.get("type", "any")
    if kind == "array":
        return f"list of {_type(node.get('items', {}), sections)}"
    words = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}
    return words.get(kind, {"object": "mapping", "null": "none"}.get(kind, kind)) + _range(node)


def _range(node: Node) -> str:
    """The bounds of a number."""
    signs = {
        "minimum": "≥",
        "exclusiveMinimum": ">",
        "maximum": "≤",
        "exclusiveMaximum": "<",
    }
    said = ((sign, node[key]) for key, sign in signs.items() if key in node)
    bounds = [f"{sign} {bound:,g}" for sign, bound in said if bound < NO_LIMIT]
    return f" {', '.join(bounds)}" if bounds else ""


def _default(field: Node) -> str:
    if "default" not in field:
        return "its defaults"
    value = field["default"]
    if value is None or isinstance(value, str):
        return f"`{value}`" if value else "none"
    return f"`{json.dumps(value, ensure_ascii=False)}`"


# --- what is supported ----------------------------------------------------------------------------


def support() -> Node:
    """The one table of what is tested, experimental and refused."""
    table: Node = yaml.safe_load(SUPPORT.read_text(encoding="utf-8"))
    return table


def support_page() -> str:
    table = support()
    names = list(STAGES)
    lines = [
        NOTE.format(source="docs/make/support.yaml"),
        "# What is supported",
        "",
        table["words"].strip(),
        "",
        "| | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    marks = table["marks"]
    for feature in table["features"]:
        cells = [marks[_status(feature, name)] for name in names]
        lines.append(f"| {feature['name']} | " + " | ".join(cells) + " |")
    for status, title in (("experimental", "Experimental"), ("refused", "Refused, and why")):
        lines += ["", f"## {title}", ""]
        for feature in table["features"]:
            of_stages = [name for name in names if _status(feature, name) == status]
            if of_stages:
                why = feature[f"why_{status}"].strip()
                lines.append(f"- **{feature['name']}** ({', '.join(of_stages)}): {why}")
    return "\n".join([*lines, "", table["models"].strip()]) + "\n"


def _status(feature: Node, stage: str) -> str:
    """tested, experimental, refused, or none, where a stage has no such thing."""
    for status in ("tested", "experimental", "refused"):
        if stage in str(feature.get(status, "")).split():
            return status
    return "none"


def pages() -> dict[str, str]:
    """Every made page, by its place in docs/."""
    made = {f"fields/{stage}.md": fields_page(stage) for stage in STAGES}
    if SUPPORT.exists():
        made["support.md"] = support_page()
    return made


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
