"""What a pipeline says when it has ended: what came of it, in a few lines, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llmpipe.errors import UserError
from llmpipe.recipe.names import ARTIFACT
from llmpipe.report.measures import PERCENT
from llmpipe.report.scoreboard import Column, Score, Scoreboard, Verdict, scoreboard
from llmpipe.report.terminal import LABEL, labelled, ranked_by
from llmpipe.report.text import counted, in_words
from llmpipe.run.artifact import Artifact
from llmpipe.run.results import Results

UNCLEAR: Verdict = "no difference shown"
LABELS: dict[Verdict, tuple[str, str]] = {
    "better": ("gains", "over"),
    "worse": ("losses", "under"),
    UNCLEAR: ("not shown", "against"),
}


def closing(run: Path, made: list[Artifact]) -> list[str]:
    """The end of a pipeline whose artifacts are `made`, in their order, in lines of 80 columns."""
    lines = [f"{run}: {counted(len(made), 'stage')}, all finished"]
    board = _board(made)
    if board:
        lines += [line for column in board.columns for line in _column(column)]
        lines += _differences(board)
    for each in made:
        if ranked := ranked_by(each.manifest()):
            lines += labelled(each.path.name, f"ranks {ranked}")
    lines.append(f"  {'look':<{LABEL}} llmpipe report {run}")  # commands are not cut
    if chosen := _talker(made, board):
        lines.append(f"  {'try':<{LABEL}} llmpipe chat {chosen.path}")
    return lines


def _board(made: list[Artifact]) -> Scoreboard | None:
    """Of the last evaluation; None where there is none, or its results cannot be read."""
    results = [each.path / "results.json" for each in made]
    measured = [path for path in results if path.exists()]
    try:
        return scoreboard(Results.from_file(measured[-1])) if measured else None
    except UserError:
        return None  # `show` and `verify` say what is wrong with it


def _column(column: Column) -> Iterator[str]:
    numbers = ", ".join(f"{model} {score.value}" for model, score in column.scores.items())
    said = f"{column.measure.title}, of {column.items}: {numbers}"
    yield from labelled(column.task, said.replace(f" {PERCENT}", PERCENT))  # no unit is cut off


def _differences(board: Scoreboard) -> Iterator[str]:
    """Which models are better or worse than the one they were made from, and which may be either.

    A metric of which nothing says which way is better has no line here.
    """
    for verdict, (label, between) in LABELS.items():
        compared = list(_compared(board, verdict, between))
        end = "" if verdict == UNCLEAR else "; real at 95%"
        if compared:
            yield from labelled(label, "; ".join(compared) + end)


def _compared(board: Scoreboard, verdict: Verdict, between: str) -> Iterator[str]:
    """`sft over base and dpo over sft`, of each column; with its task where there are several."""
    columns = [c for c in board.columns if any(s.difference for s in c.scores.values())]
    for column in columns:
        pairs = [
            f"{model} {between} {score.difference.other}"
            for model, score in column.scores.items()
            if score.difference and score.difference.verdict == verdict
        ]
        if pairs:
            yield (f"{column.task}: " if len(columns) > 1 else "") + in_words(pairs)


def _talker(made: list[Artifact], board: Scoreboard | None) -> Artifact | None:
    """Whom to talk with: the best at what is right or wrong, or else the last that was made and is
    not worse at that than what it was made from."""
    models = [each for each in made if each.manifest().kind in ("model", "adapter")]
    labels = _labels(made)
    columns = [c for c in (board.columns if board else []) if c.measure.higher_is_better]
    scores = {
        each: [column.scores[label] for column in columns if label in column.scores]
        for each, label in ((each, labels.get(each.name, "")) for each in models)
    }
    best = [each for each in models if any(score.is_best for score in scores[each])]
    sound = [each for each in models if not any(_is_worse(score) for score in scores[each])]
    return next(iter([*best, *reversed(sound), *reversed(models)]), None)


def _labels(made: list[Artifact]) -> dict[str, str]:
    """What an evaluation calls the artifacts of its run, by their names."""
    return {
        str(model["reference"]).removeprefix(ARTIFACT): field.removeprefix("models.")
        for evaluation in made
        for field, model in evaluation.manifest().models.items()
        if field.startswith("models.")
    }


def _is_worse(score: Score) -> bool:
    return score.difference is not None and score.difference.verdict == "worse"
