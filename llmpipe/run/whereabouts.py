"""Where on this machine the models lie of which artifacts hold no more than name and content.

An adapter is of no use without its base, and an artifact holds no path in full. As models of the
Hub are looked for in its cache, others are in notes of this user: a file each, named by the model's
identity. A note is a hint; what lies at the place is hashed as everything is.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from llmpipe.files import digest, expanded

if TYPE_CHECKING:
    from llmpipe.run.manifest import Identity


def note(identity: Identity, place: Path) -> None:
    """Remember where a model lies. Where nothing can be written, it is looked for elsewhere."""
    path = _note_of(identity)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(f"{os.path.abspath(place)}\n", encoding="utf-8")
        temporary.rename(path)


def noted(identity: Identity) -> str | None:
    """Where a model of this identity lay, if something lies there still."""
    try:
        place = _note_of(identity).read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return place if os.path.isabs(place) and os.path.exists(place) else None


def _note_of(identity: Identity) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(cache) / "llmpipe" / "places" / digest(identity)
