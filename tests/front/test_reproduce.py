"""`llmpipe reproduce`: published against obtained, and 4 outside."""

import pytest
import yaml

from llmpipe.front import make
from llmpipe.recipe.check import load_pipeline
from llmpipe.recipe.expected import Expected
from llmpipe.stages import schema
from tests import life

NUMBER = {"artifact": "sft", "metric": "eval_loss", "value": 6.5, "source": "a table"}


def pipeline(tmp_path, *numbers):
    """One short stage, and what was published of it."""
    stage = life.recipe(tmp_path / "run", optim__steps=1, samples={})
    del stage["run"]
    path = tmp_path / "recipes" / "short.yaml"
    path.parent.mkdir(exist_ok=True)
    values = {"run": str(tmp_path / "run"), "stages": [stage], "expected": list(numbers)}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_a_number_within_and_a_number_outside(llmpipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    within = NUMBER | {"tolerance": 1.0, "ran": "yesterday, one core"}
    path = pipeline(tmp_path, within)
    code, out, err = llmpipe("reproduce", "short")  # by its name
    assert code == 0, err
    assert "published: sft eval_loss: 6.5 +- 1 (a table); run to it yesterday, one core" in out
    assert "sft eval_loss: within\n  published 6.5 +- 1\n  obtained  6." in out
    assert "reproduced: 1 of 1 published numbers" in out

    pipeline(tmp_path, within, NUMBER | {"at_most": 0.1})
    code, out, err = llmpipe("reproduce", path)
    assert code == 4 and "skip: finished" in out
    assert "NOT RUN YET by those who wrote it" in out
    assert "sft eval_loss: OUTSIDE\n  published 6.5, at most 0.1\n" in out
    assert "1 of 2 published numbers was not obtained" in err


@pytest.mark.parametrize(("rank", "code"), [("0", 3), ("1", 0)])
@pytest.mark.parametrize("command", ["run", "reproduce"])
def test_the_first_of_a_launchers_processes_says_what_came_of_it(
    llmpipe, tmp_path, monkeypatch, command, rank, code
):
    """It publishes, and the others end before: to them a manifest would be missing."""
    monkeypatch.setattr(make, "make", lambda *_, **__: None)
    monkeypatch.setenv("RANK", rank)
    path = pipeline(tmp_path, NUMBER | {"tolerance": 1.0})
    assert llmpipe(command, path)[0] == code


def test_what_is_expected_wrongly_is_said_before_anything_runs(llmpipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = [NUMBER, NUMBER | {"artifact": "sftt", "tolerance": 1.0}, {"metrik": 1}]
    path = pipeline(tmp_path, *wrong)
    for command in ("run", "reproduce"):
        code, _, err = llmpipe(command, path)
        assert code == 2 and not (tmp_path / "run").exists()
        assert "expected.0: give one of tolerance, at_least and at_most" in err
        assert "expected.1.artifact: no stage makes sftt; did you mean 'sft'?" in err
        assert "expected.2.metrik: unknown key; did you mean 'metric'?" in err
    code, _, err = llmpipe("reproduce", "shrot")
    assert code == 2 and "did you mean 'short'?" in err
    path = pipeline(tmp_path)
    code, _, err = llmpipe("reproduce", path)
    assert code == 2 and "nothing to hold this run against" in err and "llmpipe run" in err


@pytest.mark.parametrize(
    ("bound", "obtained", "holds"),
    [
        ({"tolerance": 0.04}, 0.54, True),
        ({"tolerance": 0.04}, 0.5401, False),
        ({"at_least": 0.45}, 0.45, True),
        ({"at_least": 0.45}, float("nan"), False),
        ({"at_most": 0.45}, 0.46, False),
        ({"tolerance": 1.0}, float("nan"), False),
    ],
)
def test_bounds(bound, obtained, holds):
    number = Expected(artifact="e", metric="m", value=0.5, source="s", **bound)
    assert number.holds(obtained) is holds


@pytest.mark.parametrize("name", ["sums", "gsm8k", "gpt2-hellaswag"])
def test_shipped_numbers_name_what_is_measured(name):
    path = life.ROOT / "recipes" / f"{name}.yaml"
    asked = load_pipeline(path, schema)
    assert asked.expected and not asked.problems
    [evaluation] = [located.recipe for located in asked.stages if located.recipe.stage == "eval"]
    tasks = {task.label: task for task in evaluation.tasks}
    for number in asked.expected:
        task, _, metric = number.metric.partition(".")
        measured = tasks[task].metrics("reward-model" if number.model == "reward" else "model")
        assert measured is None or metric in measured
        assert number.model in evaluation.models and number.artifact == "eval"
