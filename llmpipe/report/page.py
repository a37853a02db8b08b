"""`llmpipe report`: one run, or two beside each other, as a single HTML file.

It asks no network and runs no JavaScript. What lies in a run is not trusted: the template escapes
all text, and control characters are replaced. The file stays under 2 MB: curves are thinned, long
lists and texts are cut, and the page says how much is left out.

Each section is gathered by the module of its name; `page.html.j2` shows their records.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpipe import __version__
from llmpipe.errors import RESOURCES, UserError
from llmpipe.files.writing import write_whole
from llmpipe.report import answers, flow, lineage, origin, summary, training
from llmpipe.report.compare import comparison
from llmpipe.report.evaluation import Evaluated, evaluated
from llmpipe.report.exported import Exported, exported
from llmpipe.report.parts import Run, is_one, parts_of

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_BYTES = 2_000_000  # of the file

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]")


@dataclass(frozen=True)
class RunPage:
    """A run in its sections."""

    name: str
    prefix: str
    summary: summary.Summary
    evaluation: list[Evaluated]
    exports: list[Exported]
    answers: answers.Answers
    training: list[training.Trained]
    data: list[flow.Flow]
    lineage: lineage.Lineage
    recipes: list[origin.Origin]

    @property
    def contents(self) -> dict[str, str]:
        """Titles of the sections that have something to show, by their ids; training has its own
        in the contents."""
        titles = {
            "data": ("Data, in and out", self.data),
            "numbers": ("All numbers", self.evaluation),
            "exports": ("For other engines", self.exports),
            "answers": ("All answers", self.answers.folds),
            "lineage": ("Lineage", True),
            "recipes": ("Recipes, versions, machine", True),
        }
        return {name: title for name, (title, content) in titles.items() if content}


def run_page(run: Run) -> RunPage:
    evaluations = [evaluated(part) for part in run.evaluations]
    return RunPage(
        name=run.name,
        prefix=run.prefix,
        summary=summary.summary(run, evaluations),
        evaluation=evaluations,
        exports=exported(run),
        answers=answers.answers(run),
        training=[training.trained(part, run.scale) for part in run.trained],
        data=flow.flows(run),
        lineage=lineage.lineage(run),
        recipes=[origin.origin(part) for part in run.parts],
    )


@cache
def templates() -> Environment:
    """The templates of this folder, which escape whatever they are given."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=without_control,
    )


def without_control(value: Any) -> Any:
    """A text with its control characters, which HTML has no way to write, made visible."""
    return CONTROL.sub("\ufffd", value) if type(value) is str else value


def page(runs: list[Run]) -> str:
    """The whole document: the comparison of two runs, then each run in its sections."""
    return (
        templates()
        .get_template("page.html.j2")
        .render(
            title=" and ".join(run.name for run in runs),
            style=Path(__file__).with_name("page.css").read_text(encoding="utf-8"),
            comparison=comparison(*runs) if len(runs) == 2 else None,
            runs=[run_page(run) for run in runs],
            version=__version__,
            date=time.strftime("%Y-%m-%d %H:%M"),
        )
    )


def write_report(paths: list[Path], out: Path | None = None) -> Path:
    """Write the page of one run or artifact, or of two beside each other; return where it lies.

    Raises UserError.
    """
    names = [path.resolve().name for path in paths]
    if len(paths) == 2:
        runs = [
            Run(f"{letter}: {name}", f"{letter.lower()}-", parts_of(path))
            for letter, name, path in zip("AB", names, paths, strict=True)
        ]
    else:
        runs = [Run(names[0], "", parts_of(paths[0]))]
    out = out or _place(paths[0], names)
    for scale in (1, 2, 4, 8, 16):
        text = page([replace(run, scale=scale) for run in runs]).encode()
        if len(text) <= MOST_BYTES:
            break
    try:
        write_whole(out, text)
    except OSError as error:
        problem = f"{out}: cannot be written: {error.strerror}"
        raise UserError(problem, "name another file", RESOURCES) from error
    return out


def _place(path: Path, names: list[str]) -> Path:
    """Where the page goes unless that is said: into the run, never into an artifact, which would be
    altered by it."""
    other = f"-vs-{names[1]}" if len(names) == 2 else ""
    if is_one(path):
        return path.parent / f"report-{names[0]}{other}.html"
    return path / f"report{other}.html"
