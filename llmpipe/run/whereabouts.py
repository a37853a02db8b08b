"""What lies in this user's cache: where the models are of which artifacts hold no more than name
and content, and GGUF files as they were made readable.

An adapter is of no use without its base, and an artifact holds no path in full. As models of the
Hub are looked for in its cache, others are in notes of this user: a file each, named by the model's
identity. A note is a hint; what lies at the place is hashed as everything is.

    $XDG_CACHE_HOME/llmpipe/places/DIGEST      a note
    $XDG_CACHE_HOME/llmpipe/models/gguf-HASH   the weights of a GGUF file, by its content

All of it may be deleted while no command runs: it is made again.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from llmpipe.files.json import digest
from llmpipe.files.paths import expanded

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


def cache() -> Path:
    """The folder that llmpipe has in this user's cache; it need not be there, nor be one that can
    be made."""
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "llmpipe"


def _note_of(identity: Identity) -> Path:
    return cache() / "places" / digest(identity)
