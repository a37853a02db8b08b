"""What answers are compared with: one right answer, or a list of which any is right."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from llmpipe.scores.overlap import no_rouge
from llmpipe.scores.verifiers import VERIFIERS


class Comparison(NamedTuple):
    """One kind of score as a recipe asks for it."""

    kind: str
    pattern: str | None = None

    @property
    def compares(self) -> bool:
        """Whether it needs a reference."""
        check = VERIFIERS.get(self.kind)
        return check is None or check.compares(self.pattern or "")

    @property
    def could_compare(self) -> bool:
        """Whether it would with another pattern."""
        check = VERIFIERS.get(self.kind)
        return check is None or check.compares("()")

    @property
    def reads_numbers(self) -> bool:
        """Whether a number of JSON serves as a reference."""
        check = VERIFIERS.get(self.kind)
        return check is not None and check.reads_numbers

    def refuses(self, reference: str) -> str | None:
        """Why no answer can equal a reference."""
        if check := VERIFIERS.get(self.kind):
            return check.refuses(reference, self.pattern or "")
        return no_rouge(reference) if self.kind == "rouge" else None


class Unfit(Exception):
    """A reference that nothing can equal; it says why."""


class Missing(Exception):
    """No reference where one is needed."""


def references_of(value: Any, comparisons: Sequence[Comparison]) -> list[str]:
    """The references of a row as texts, of which any is right. Raises Unfit.

    `value` as it stands in the row: a text, a number, a list of them, or None or white space where
    there is none, which raises Missing where one is needed. Of a list one has to serve each
    comparison.
    """
    comparing = [comparison for comparison in comparisons if comparison.compares]
    if value is None or (isinstance(value, str) and not value.strip()):
        if comparing:
            raise Missing("there is no answer to compare with")
        return []
    if not comparing:
        return [one for one in _listed(value) if isinstance(one, str)]
    texts = [_text(one, comparing) for one in _listed(value)]
    if not texts:
        raise Unfit("the list of right answers is empty")
    for comparison in comparing:
        problems = [comparison.refuses(text) for text in texts]
        if all(problems):
            raise Unfit(f"{_shortened(texts[0])} {problems[0]}: {comparison.kind} gives 0 for ever")
    return texts


def unread(value: Any, comparisons: Sequence[Comparison]) -> bool:
    """Whether a row has a reference that nothing reads, though something might: a pattern could
    have a group."""
    nothing_reads = not any(comparison.compares for comparison in comparisons)
    return bool(value) and nothing_reads and any(one.could_compare for one in comparisons)


def from_column(value: Any) -> Any:
    """The column `answer` of a row: a text that is a list in JSON, as in a CSV, is that list.

    Raises Unfit for a list that Python wrote.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        listed = json.loads(value)
    except (ValueError, RecursionError):
        listed = None
    if _are_texts(listed):
        return listed
    try:
        written = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        written = None
    if _are_texts(written):
        raise Unfit(f"{_shortened(value)} is a list as Python writes it: write it as JSON")
    return value


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any, comparing: list[Comparison]) -> str:
    """One reference as a text. Raises Unfit."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, str):
        raise Unfit("a right answer is empty: it would equal nothing, and stand in everything")
    by_text = next((one.kind for one in comparing if not one.reads_numbers), None)
    if isinstance(value, bool):
        raise Unfit(f"{json.dumps(value)} is no text: quote it, spelled as an answer would")
    if isinstance(value, float) and not math.isfinite(value):
        raise Unfit(f"{value} is no finite number")
    if isinstance(value, float) and by_text:
        raise Unfit(f"{value} is a number, and {by_text} compares texts: quote it")
    if isinstance(value, int | float):
        return str(value)
    kind = "null" if value is None else "an object" if isinstance(value, dict) else "a list"
    raise Unfit(f"a right answer is {kind}, and answers are texts")


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
