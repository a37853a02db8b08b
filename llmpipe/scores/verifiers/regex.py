r"""`regex`: the first place in the answer that the pattern fits.

Without a group that is all that is asked. With groups, what the first of them that took part in the
match holds has to be the reference, but for white space around it: of `A: (\w+)|B: (\w+)` the one
on the side that fits. `^` and `$` are the ends of the answer unless the pattern begins with (?m).
"""

from __future__ import annotations

import re

from llmpipe.scores.check import Check


def is_right(answer: str, reference: str, pattern: str) -> bool:
    match = re.search(pattern, answer)
    if match is None or not match.re.groups:
        return match is not None
    held = next((group for group in match.groups() if group is not None), None)
    return held is not None and held.strip() == reference.strip()


def compares(pattern: str) -> bool:
    return bool(re.compile(pattern).groups)


def refuses(reference: str, pattern: str) -> str | None:
    """Where no group, taken alone, can hold the reference."""
    groups = _groups(pattern)
    if not groups or any(_may_hold(group, reference.strip()) for group in groups):
        return None
    return f"is nothing that the group of the pattern {pattern} can hold"


def check_pattern(pattern: str | None) -> None:
    """Raises ValueError for one that is no pattern, or that without a group fits any answer."""
    if pattern is None:
        return
    try:
        fits = re.compile(pattern).search
    except re.error as error:
        raise ValueError(f"pattern: {error}") from None
    if not compares(pattern) and all(map(fits, ("", "\n", "x: 1", " -\t~"))):
        raise ValueError(f"pattern: '{pattern}' fits any answer, so all would be right")


_FLAGS = re.compile(r"\(\?[aimsu]+\)")
_CONTEXT = re.compile(r"\\[1-9B]|\(\?(?!:|>|P<)")
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\((?P<name>\?:|\?>|\?P<\w+>)?|\)", re.DOTALL)

SPACES = ("", " ", "\n")  # that may stand around what a group holds


def _may_hold(group: str, reference: str) -> bool:
    """Whether the source of a group, taken alone, fits a reference."""
    fits = re.compile(group).fullmatch
    return any(fits(before + reference + behind) for before in SPACES for behind in SPACES)


def _groups(pattern: str) -> list[str]:
    """The sources of a pattern's groups, but for groups in groups, each behind the global flags.

    None where their source alone does not tell what they hold: with flags for a part, references to
    groups, conditions, and looks around.
    """
    flags = _FLAGS.match(pattern)
    start = flags.end() if flags else 0
    if _CONTEXT.search(pattern, start):
        return []
    groups: list[str] = []
    begins: list[int | None] = []  # of the brackets that are open; None where they capture nothing
    for token in _TOKEN.finditer(pattern, start):
        if token[0][0] == "(":
            captures = not token["name"] or token["name"].startswith("?P")
            begins.append(token.end() if captures else None)
        elif token[0] == ")":
            begin = begins.pop()
            if begin is not None and not any(begins):
                groups.append(pattern[:start] + pattern[begin : token.start()])
    return groups


CHECK = Check(is_right, compares, refuses)
