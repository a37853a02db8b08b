"""What a stranger left in a run: `show`, `report` and `verify` show it, or name the file."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from llmpipe.errors import UserError
from llmpipe.files.json import write_json
from llmpipe.files.tables import table
from llmpipe.report.page import write_report
from llmpipe.report.terminal import show_run
from llmpipe.run.artifact import SCRATCH, fingerprint
from llmpipe.run.verify import verify_run
from tests import life
from tests.report.written import add_eval, add_sft, write_lines

ODD = [
    *(None, True, -1, 1e99, math.inf, math.nan, 10**400, "", "\ud800", "../../x", "9" * 5000),
    *([], {}, [1], {"a": [None]}, [[[]]]),
]
"""Values that a field of another type may be given."""

SHARE = 40 if os.environ.get("FAULTS") != "full" else 4
"""Of the mutations of a file one in so many is tried in `make faults`."""


def verified(run) -> str:
    lines = []
    try:
        verify_run(run, lines.append, lines.append)
    except UserError as error:
        lines.append(str(error))
    return "\n".join(lines)


COMMANDS = [show_run, lambda run: write_report([run]), verified]


def look(run) -> None:
    """What the three commands make of a run: nothing but a UserError is raised."""
    for command in COMMANDS:
        try:
            command(run)
        except UserError as error:
            assert "\n" not in error.message.strip() or str(run) in error.message


@pytest.fixture
def run(tmp_path):
    """A model, an evaluation of it, and a stage that was begun."""
    run = tmp_path / "run"
    add_eval(run, add_sft(run))
    begun = run / "dpo"
    (begun / "checkpoints" / "step-20").mkdir(parents=True)
    (begun / "recipe.yaml").write_text("stage: dpo\n")
    model = {"kind": "artifact", "reference": "artifact:sft", "identity": {}, "parents": []}
    asked = {"recipe": {"rollout": {"top_k": 3}}, "models": {}, "content": {}}
    write_json(begun / "plan.json", {"identity": "0", "asked": asked, "models": {"model": model}})
    write_json(begun / "outcome.json", {"code": 143, "message": "stopped", "hint": "go on"})
    rows = {"read": 3, "rejected_by_reason": {"empty": 1}}
    sources = [{"path": "x", "files": [], "format": "text", "read": 1, "kept": 1, "revision": "r"}]
    tokens = {"train": 5, "train_supervised": 2}
    write_json(begun / "prepared.json", {"rows": rows, "sources": sources, "tokens": tokens})
    write_lines(begun / "metrics.jsonl", [{"step": 1, "loss": 2.0, "eval_loss": 3.0}])
    turns = [{"role": "user", "content": "x"}]
    rollout = {"step": 1, "prompt": turns, "score": 0.5, "ended": True, "answer": "y"}
    write_lines(begun / "rollouts.jsonl", [rollout])
    write_lines(begun / "samples.jsonl", [{"when": "before", "prompt": "p", "answer": "a"}])
    write_lines(begun / "rejected.jsonl", [{"file": "f", "row": 1, "reason": "r"}])
    return run


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The way to everything in a document."""
    yield path
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in inner:
            yield from places(item, (*path, key))


def mutations(document: Any) -> list[tuple[tuple, Any]]:
    """(place, value) of everything that may be put in its place; `...` removes it."""
    return [(place, odd) for place in places(document) for odd in [..., *ODD] if place]


def mutated(document: Any, place: tuple, odd: Any) -> Any:
    document = copy.deepcopy(document)
    *way, last = place
    target = document
    for key in way:
        target = target[key]
    if odd is ...:
        del target[last]
    else:
        target[last] = odd
    return document


FILES = [
    *("sft/manifest.json", "eval/manifest.json", "eval/results.json", "eval/samples.jsonl"),
    *("dpo/plan.json", "dpo/outcome.json", "dpo/prepared.json"),
    *("dpo/metrics.jsonl", "dpo/rollouts.jsonl", "dpo/samples.jsonl", "dpo/rejected.jsonl"),
]


def put(path, document: Any) -> None:
    """Write a document, and what would be forged with it: its fingerprint, the table around it."""
    if path.name == "manifest.json":
        if "\\ud800" not in json.dumps(document):  # has no bytes, so no sum either
            document["fingerprint"] = fingerprint(document)
        path.write_text(json.dumps(document))
        return
    path.write_text(json.dumps(document) + "\n" * (path.suffix == ".jsonl"))
    manifest = path.with_name("manifest.json")
    if manifest.exists():
        document = json.loads(manifest.read_text())
        files = table(path.parent, SCRATCH | {"checkpoints"})
        put(manifest, document | {"files": {name: asdict(entry) for name, entry in files.items()}})


@pytest.mark.parametrize("share", [1000, life.by_the_dozen(SHARE)])
@pytest.mark.parametrize("name", FILES)
def test_every_field_of_another_type(run, name, share):
    """Each value of each file replaced by each odd one, or removed; the fingerprint recomputed."""
    path = run / name
    document = json.loads(path.read_text().splitlines()[0] if "jsonl" in name else path.read_text())
    tried = mutations(document)
    rng = random.Random(f"{name} {share}")
    for place, odd in rng.sample(tried, max(len(tried) // share, 1)):
        put(path, mutated(document, place, odd))
        try:
            look(run)
        except Exception as error:
            raise AssertionError(f"{name}: {place} = {str(odd)[:20]!r}") from error


def strange(run) -> dict:
    """{what a stranger left: how}"""
    home, begun = run / "sft", run / "dpo"
    folder = begun / "checkpoints"
    link = run.parent / "elsewhere"
    link.mkdir()
    return {
        "a copy of a checkpoint": (folder / "step-12.bak").mkdir,
        "a step of letters": (folder / "step-x").mkdir,
        "a step without a number": (folder / "step-").mkdir,
        "a digit that is no number": (folder / "step-\u00b2").mkdir,
        "a number without end": (folder / f"step-{'9' * 200}").mkdir,
        "a checkpoint that is a file": (folder / "step-3").touch,
        "a checkpoint that is a link": lambda: (folder / "step-7").symlink_to(link),
        "a folder beside": (run / "notes").mkdir,
        "a file beside": (run / "notes.txt").touch,
        "a copy without a manifest": lambda: (
            (run / "sft.bak").mkdir(),
            (run / "sft.bak" / "recipe.yaml").touch(),
        ),
        "a copy": lambda: shutil.copytree(home, run / "sft.copy"),
        "a recipe that is a folder": lambda: (run / "x" / "recipe.yaml").mkdir(parents=True),
        "a recipe that leads nowhere": lambda: (
            (run / "y").mkdir(),
            (run / "y" / "recipe.yaml").symlink_to("nowhere"),
        ),
        "a link to itself": lambda: (run / "loop").symlink_to(run / "loop"),
        "metrics that are a folder": lambda: replaced(begun / "metrics.jsonl").mkdir(),
        "metrics that are a pipe": lambda: os.mkfifo(replaced(begun / "metrics.jsonl")),
        "metrics that are no text": lambda: (begun / "metrics.jsonl").write_bytes(b"\xff\x00\n{"),
        "an outcome that is a folder": lambda: replaced(begun / "outcome.json").mkdir(),
        "a plan that is a link to itself": lambda: loop(begun / "plan.json"),
        "a manifest that is a folder": lambda: replaced(home / "manifest.json").mkdir(),
        "a manifest that is a pipe": lambda: os.mkfifo(replaced(home / "manifest.json")),
        "a manifest that is a link": lambda: loop(home / "manifest.json"),
        "results that are a folder": lambda: replaced(run / "eval" / "results.json").mkdir(),
        "results that are gone": lambda: replaced(run / "eval" / "results.json"),
        "deep results": lambda: (run / "eval" / "results.json").write_text("[" * 100_000),
    }


def replaced(path):
    path.unlink()
    return path


def loop(path) -> None:
    replaced(path).symlink_to(path)


def test_what_a_stranger_left(run, tmp_path):
    """Each thing alone, in a copy of the run; and whatever it is, it is in no way the run's end."""
    for number, what in enumerate(strange(run)):
        each = tmp_path / f"{number}" / "run"
        shutil.copytree(run, each)
        strange(each)[what]()
        try:
            look(each)
        except Exception as error:
            raise AssertionError(what) from error
    assert show_run(run) == show_run(run)


def test_what_is_no_checkpoint_is_no_step(run):
    folder = run / "dpo" / "checkpoints"
    for name in ("step-99.bak", "step-x", "step-\u00b2", "step-030"):
        (folder / name).mkdir()
    (folder / "step-50").touch()
    assert "not finished, checkpoint at step 20; last ended" in show_run(run)


def test_what_was_altered_is_shown(run):
    """A size, or what is small; a large file of the same size is left to `llmpipe verify`."""
    weights = run / "sft" / "model" / "x"
    weights.write_bytes(b"1" + weights.read_bytes()[1:])
    assert f"{run}/sft\n  status     finished 2026-" in show_run(run)
    assert f"{weights}: sha256 " in verified(run)
    weights.write_bytes(b"")
    (run / "eval" / "samples.jsonl").write_text("")
    (run / "eval" / "results.json").unlink()
    shown = " ".join(show_run(run).split())
    one = "altered: model/x: 0 bytes, recorded 1,500,000"
    assert f"{run}/sft status {one}; finished 2026-" in shown
    two = "altered: results.json: missing, and 1 more: llmpipe verify"
    assert f"{run}/eval status {two}; finished 2026-" in shown
    page = write_report([run]).read_text()
    assert "0 of 3 artifacts are finished" in page
    for name, problem in (("sft", one), ("eval", two)):
        assert f"<strong>Problem, {name}:</strong> {problem}</li>" in page
