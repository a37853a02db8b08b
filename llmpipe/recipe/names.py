"""How artifacts are called, and what may name one: in recipes, and in what artifacts say of others.

Without pydantic, since `llmpipe show` reads manifests.
"""

from __future__ import annotations

import re

ARTIFACT = "artifact:"

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
"""A folder in a run: no dot first, no separator."""

_REFERENCE = re.compile(rf"{ARTIFACT}{NAME}(@[0-9]{{1,18}})?")

_NAME = re.compile(NAME)


def is_name(text: str) -> bool:
    """Whether an artifact may be called so."""
    return _NAME.fullmatch(text) is not None


def is_reference(text: str) -> bool:
    """Whether a text is no artifact's, or names one as it may be called."""
    return not text.startswith(ARTIFACT) or _REFERENCE.fullmatch(text) is not None
