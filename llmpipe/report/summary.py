"""The first screen: what this run is, what came of it, and what to know before believing it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmpipe.report.curves import drawable
from llmpipe.report.evaluation import Evaluated
from llmpipe.report.notices import Notice, notices
from llmpipe.report.parts import Part, Run, dig
from llmpipe.report.scoreboard import sentences
from llmpipe.report.terminal import duration_of
from llmpipe.report.text import in_words, text_of

TIME = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\dZ")


@dataclass(frozen=True)
class Summary:
    what: str
    """What this run is, in a sentence or two."""
    finished: str
    """How much of it is done, when and where."""
    is_finished: bool
    findings: list[str]
    """What each model is against the one that it was made from."""
    notices: list[Notice]


def summary(run: Run, evaluations: list[Evaluated]) -> Summary:
    done = [part for part in run.parts if part.status == "finished"]
    return Summary(
        what=_what(run),
        finished=_finished(run, done),
        is_finished=len(done) == len(run.parts),
        findings=[line for one in evaluations if one.board for line in sentences(one.board)],
        notices=notices(run, evaluations),
    )


def _what(run: Run) -> str:
    stages = in_words(list(dict.fromkeys(part.stage for part in run.trained)))
    starts = in_words(_starts(run))
    measured = "measured" if run.evaluations else ""
    if not run.trained:
        return "An evaluation." if len(run.evaluations) == 1 else "Evaluations."
    origin = f"{starts}, taught by {stages}" if starts else f"A model made by {stages}"
    return f"{origin}{' and ' + measured if measured else ''}."


def _starts(run: Run) -> list[str]:
    """The models from elsewhere that were trained, as they were named."""
    names = {part.name for part in run.parts}
    references = [
        text_of(model["reference"])
        for part in run.trained
        for field, model in part.known("models").items()
        if field == "model" and text_of(model.get("artifact")) not in names
    ]
    return list(dict.fromkeys(reference.partition("@")[0] for reference in references))


def _finished(run: Run, done: list[Part]) -> str:
    count = len(run.parts)
    every = "both" if count == 2 else f"all {count}"
    if count == 1:
        state = "Its one artifact is finished" if done else "Its one artifact is not finished"
    else:
        state = (
            f"{every if len(done) == count else f'{len(done)} of {count}'} artifacts are finished"
        )
    seconds = sum(value for part in done if drawable(value := part.known("seconds")))
    times = [match for part in done if (match := TIME.fullmatch(text_of(part.known("finished"))))]
    last = max((f"{match[1]} {match[2]} UTC" for match in times), default="")
    said = [state[0].upper() + state[1:]]
    said += [f"{duration_of(seconds)} of work"] if seconds else []
    said += [f"the last at {last}"] if last else []
    said += [f"on {device}"] if (device := _device(done)) else []
    return f"{', '.join(said)}."


def _device(done: list[Part]) -> str:
    devices = (dig(part.manifest, "hardware", "device_name") for part in done)
    return in_words(list(dict.fromkeys(text_of(name) for name in devices if name)))
