"""What mkdocs is told of links: to a file of the repository outside docs/ a page of the site has
none, and names it instead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    folder = (DOCS / page.file.src_path).parent

    def named(match: re.Match[str]) -> str:
        target = (folder / match[2].partition("#")[0]).resolve()
        outside = DOCS not in target.parents
        return f"`{target.relative_to(DOCS.parent)}`" if outside else match[0]

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)\s]+)\)", named, markdown)
