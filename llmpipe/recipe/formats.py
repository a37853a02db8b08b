"""The formats of rows by their names in a recipe: those of the files in `data/formats`.

The folder is listed, and nothing of it imported: a recipe is checked without reading a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmpipe.files.paths import modules_in

FOLDER = Path(__file__).parent.parent / "data" / "formats"

FORMAT_NAMES = [module.replace("_", "-") for module in modules_in(FOLDER)]

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[("auto", *FORMAT_NAMES)]
