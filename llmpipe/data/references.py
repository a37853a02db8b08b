"""The right answers of a row that asks something: its own answer, or its column `answer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmpipe.data.fields import Rejected
from llmpipe.scores.references import Comparison, Missing, Unfit, from_column, references_of, unread

COLUMN = "answer"


def right_answers(
    reference: str | None,
    others: dict[str, Any],
    comparisons: Sequence[Comparison],
    *,
    all_read: bool = True,
) -> list[str]:
    """What an answer is compared with: any of these texts is right.

    `reference` is the answer that the row has as its format has it, `others` are its columns that
    the format does not use; the column `answer` counts where there is no other. `all_read`: a
    reference that nothing reads is refused. Raises Rejected for what no answer can equal.
    """
    if not comparisons:
        return []
    try:
        value = reference or from_column(others.get(COLUMN))
        if all_read and unread(value, comparisons):
            raise Unfit(
                f"{str(value)[:40]!r} is compared with nothing: the pattern has no group to hold it"
            )
        return references_of(value, comparisons)
    except Missing as problem:
        remedy = f"give the row a column `{COLUMN}`, or an answer as sft has it"
        raise Rejected("no reference", f"{problem}: {remedy}") from None
    except Unfit as problem:
        raise Rejected("bad reference", str(problem)) from None
