"""Texts as Markdown shows them, whatever they hold: names of files come from anywhere."""

from __future__ import annotations

import re


def plain(text: object) -> str:
    """A text in one line, of which nothing is taken for a mark or for HTML."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", _line(text))


def code(text: object) -> str:
    """A text in one line, as it stands."""
    line = _line(text)
    fence = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}" if line else ""


def block(text: str, language: str = "") -> str:
    """A text of several lines, as it stands."""
    fence = "`" * max(3, _longest_run(text) + 1)
    shown = text.replace("\r", "␍").replace("\0", "␀").rstrip("\n")
    return f"{fence}{language}\n{shown}\n{fence}"


def table(headings: list[str], rows: list[list[str]], numbers: frozenset[int] = frozenset()) -> str:
    """A table of cells that are Markdown; columns in `numbers` are set to the right.

    A bar in a cell is escaped, in code as well: it would begin another cell (GFM 0.29, 4.10).
    """
    rules = ["---:" if i in numbers else "---" for i in range(len(headings))]
    lines = [_row(headings), _row(rules), *(_row(row) for row in rows)]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    escaped = [re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _line(text: object) -> str:
    return " ".join(re.sub(r"[\x00-\x1f\x7f\u2028\u2029]", " ", str(text)).split())


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
