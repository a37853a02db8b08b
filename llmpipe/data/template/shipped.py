"""The templates that come with llmpipe: the *.jinja files of this folder."""

from __future__ import annotations

from pathlib import Path


def shipped(name: str) -> str:
    """The text of a shipped template; `recipe.sections.TEMPLATES` names them."""
    return Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8")
