"""No source and no holdout comes to nothing unsaid: what was listed is learned, or evaluated on."""

from __future__ import annotations

from collections.abc import Sequence

from llmpipe.data.intake import Intake
from llmpipe.errors import UserError
from llmpipe.recipe.sections import Prepared


def refuse_empty_sources(data: Prepared, intakes: Sequence[Intake]) -> None:
    """Raise UserError naming the first source of which no row could be used, whatever share of all
    rows that is. A stream's sources to train on are not read yet.
    """
    begin = len(data.train) if data.preparation.stream else 0
    for number, intake in enumerate(intakes[begin:], begin):
        if not intake.counts["kept"]:
            purpose = "train" if number < len(data.train) else "evaluate"
            raise none_usable(data, intake, purpose)


def none_usable(data: Prepared, intake: Intake, purpose: str) -> UserError:
    """Of a source whose every row was rejected, with the first of them."""
    shown, read = intake.origin.source.path, intake.counts["read"]
    reasons = ", ".join(f"{rows:,} {why}" for why, rows in intake.rejected.most_common())
    problem = f"{shown}: no row is left to {purpose} on: of {read:,} none can be used: {reasons}"
    hint = f"mend its rows, {longer(data, intake.longest)}or take the source out of the recipe"
    return UserError(f"{problem}\n{intake.first_rejected}", hint)


def longer(data: Prepared, longest: int) -> str:
    """What to do about rows that are too long, the longest with so many tokens; 0: about none."""
    return f"raise {data.length_field} to {longest} for the longest, " if longest else ""


def refuse_untrained_sources(
    data: Prepared, intakes: Sequence[Intake], trained: Sequence[int]
) -> None:
    """Raise UserError naming the first source whose rows are all left out by its weight, or held
    out. `trained`: how many rows of each source to train on are trained on at least once.
    """
    for source, intake, rows in zip(data.train, intakes, trained, strict=False):
        if rows:
            continue
        problem = f"{source.path}: none of its {intake.counts['kept']:,} rows is left to train on"
        if source.weight < 1:
            why, hint = f": weight {source.weight:g} leaves them out", "raise its weight"
        else:
            why, hint = ": all are held out", "lower data.eval.holdout"
        raise UserError(f"{problem}{why}", f"{hint}, or take the source out of the recipe")


def none_held_out(share: float, rows: int) -> UserError:
    """Of a holdout that keeps no row of so many."""
    why = f"all {rows:,} rows are equal, and equal rows stay together"
    if rows == 1:
        why = "there is one row alone, and it is trained on"
    return UserError(
        f"data.eval.holdout: {share:g} holds no row out: {why}",
        "give more rows, name rows to evaluate on in data.eval.sources, or leave the holdout out",
    )
