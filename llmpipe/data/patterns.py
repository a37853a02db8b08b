"""Whether a pattern of a tokenizer comes to an end on any text: its shape is read, nothing matched.

Oniguruma, which matches them, tries one way after the other. A repetition of something that can
itself match in several ways, `(a+)+` or `(a|a)*`, has as many of them as 2 to the power of the
length of a text; references to what was matched before are as bad. No tokenizer needs either: what
they repeat without end is a character, or a group of a fixed shape, `(\\d{3})+`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LONGEST = 10_000
"""Characters of a pattern."""

DEEPEST = 50
"""Groups in one another."""

MOST_REPEATED = 1_000
"""How often a group is written out by counted repetitions of repetitions."""

MOST_LOOPS = 12
"""Repetitions without end that follow one another in one way to match."""

_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?[\w ]*\}|x\{[0-9a-fA-F]+\}|x[0-9a-fA-F]{1,2}|u[0-9a-fA-F]{4}|.)", re.S
)

_REFERENCE = re.compile(r"\\(?:[1-9]|k|g|K)")

_GROUP = re.compile(r"\((?:\?(?:[imxsa-]*:|[=!>]|<[=!]|[imxsa-]+\)|<\w+>|P<\w+>))?")

_REPEATED = re.compile(r"(?:[?*+]|\{(\d*)(,?)(\d*)\})([?+]?)")


@dataclass
class _Group:
    """What is known of a group so far."""

    varies: bool = False
    """Whether it matches the same text in several ways, or texts of several lengths."""
    loops: int = 0
    """Repetitions without end in it, in a row."""
    copies: int = 1
    """How often its longest part is written out."""


def check_pattern(pattern: str) -> None:
    """Raises ValueError, in a line, for a pattern that may not come to an end, or is none."""
    if len(pattern) > LONGEST:
        raise ValueError(f"{len(pattern):,} characters, {LONGEST:,} are the most")
    groups = [_Group()]
    at = 0
    while at < len(pattern):
        if pattern[at] == "(":
            match = _GROUP.match(pattern, at)
            if match is None or (pattern.startswith(("(?", "(*"), at) and match.end() == at + 1):
                raise ValueError("a group of a kind that is not known")
            at = match.end()
            if not match[0].endswith(")"):
                groups.append(_Group())
            if len(groups) > DEEPEST:
                raise ValueError(f"groups nested deeper than {DEEPEST}")
            continue
        if pattern[at] == "|":
            groups[-1].varies = True
            at += 1
            continue
        if pattern[at] == ")":
            if len(groups) == 1:
                raise ValueError("a group ends that never began")
            part, at = groups.pop(), at + 1
        else:
            part, at = _Group(), _atom(pattern, at)
        at = _repeat(pattern, at, part)
        groups[-1].varies |= part.varies
        groups[-1].loops += part.loops
        groups[-1].copies = max(groups[-1].copies, part.copies)
        if groups[-1].loops > MOST_LOOPS * max(1, pattern.count("|")):
            raise ValueError(f"more than {MOST_LOOPS} repetitions without end in a row")
    if len(groups) > 1:
        raise ValueError("a group has no end")


def _atom(pattern: str, at: int) -> int:
    """Where a character, or a class of them, ends."""
    if pattern[at] == "[":
        return _class(pattern, at)
    if pattern[at] != "\\":
        return at + 1
    if _REFERENCE.match(pattern, at):
        raise ValueError("a reference to what was matched before")
    escape = _ESCAPE.match(pattern, at)
    if escape is None:
        raise ValueError("it ends in a backslash")
    return escape.end()


def _class(pattern: str, at: int) -> int:
    """Where a class of characters ends, with those within it."""
    depth = 0
    first = at
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 2
            continue
        if pattern[at] == "[" and not pattern.startswith("[:", at):
            depth += 1
            first = at + 2 if pattern.startswith("[^", at) else at + 1
        elif pattern[at] == "]" and at != first:
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    raise ValueError("a class of characters has no end")


def _repeat(pattern: str, at: int, part: _Group) -> int:
    """Behind the repetitions of a part, which has them then."""
    while match := _REPEATED.match(pattern, at):
        least, comma, most = match[1], match[2], match[3]
        if match[0].startswith("{") and not (least or most):
            return at  # no repetition, but what is written
        counted = match[0].startswith("{") and (most or not comma)
        if counted:
            part.copies *= max(1, int((most or least)[:9]))
        elif match[0].startswith("{"):
            part.copies *= max(1, int(least[:9]))
        if part.copies > MOST_REPEATED:
            raise ValueError(f"counted repetitions of more than {MOST_REPEATED:,}")
        endless = not counted and not match[0].startswith("?")
        if part.varies and (endless or part.copies > 8):
            raise ValueError("a repetition of what can be matched in several ways")
        part.varies |= endless or match[0].startswith("?") or bool(comma)
        part.loops += endless
        at = match.end()
    return at
