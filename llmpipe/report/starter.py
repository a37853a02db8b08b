"""`llmpipe init DIR`: a recipe to start from, commented, and a few rows to try it on."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from llmpipe.errors import RESOURCES, UserError
from llmpipe.files.writing import write_whole


def write_starter(folder: Path) -> list[Path]:
    """Copy the starter files into `folder`.

    Raises UserError when one of them exists; nothing is overwritten.
    """
    sources = sorted((Path(__file__).parent / "starter").iterdir())
    targets = [folder / source.name for source in sources]
    if taken := [target for target in targets if os.path.exists(target)]:
        raise UserError(f"{taken[0]}: is there already", "give another folder; nothing was written")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source, target in zip(sources, targets, strict=True):
            write_whole(target, source.read_bytes())
    except OSError as error:
        for target in targets:  # the next try would find them there
            with suppress(OSError):
                target.unlink(missing_ok=True)
        problem = f"{folder}: cannot be written: {error.strerror}"
        raise UserError(problem, "name another folder", RESOURCES) from None
    return targets
