"""`launch.processes: auto` takes what divides a step, and never changes what a step is."""

import pytest

from llmpipe.recipe.check import load
from llmpipe.run.machine import idle_gpus, micro_batch_size, process_count
from llmpipe.stages import schema
from tests import life
from tests.attempts import Case, attempts
from tests.training import test_preference

EIGHT = "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize(
    ("gpus", "batch", "micro", "count"),
    [
        (EIGHT, 32, "auto", 8),
        (EIGHT, 12, "auto", 6),
        (EIGHT, 12, 4, 3),
        (EIGHT, 7, "auto", 7),
        (EIGHT, 11, "auto", 1),
        (EIGHT, 4, 4, 1),
        (EIGHT, 1, "auto", 1),
        (EIGHT, 48, 16, 3),
        ("0,1,2", 32, "auto", 2),
        ("0", 5, "auto", 1),
        ("", 5, "auto", 1),
    ],
)
def test_auto_divides_the_batch(tmp_path, monkeypatch, gpus, batch, micro, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    changes = {"optim__batch_size": batch, "launch__micro_batch_size": micro}
    recipe = load(life.write(tmp_path / "run", launch__processes="auto", **changes), schema("sft"))
    assert process_count(recipe) == count
    assert count * micro_batch_size(recipe, count, True) <= batch
    there = len(gpus.split(",")) if gpus else 0
    note = idle_gpus(recipe)
    assert bool(note) == (count < there)
    if note:
        assert f"auto is {count} of {there} GPUs" in note and str(batch) in note


def test_an_objective_that_takes_a_step_whole_takes_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", EIGHT)
    launch = {"processes": "auto", "micro_batch_size": "auto"}
    path = test_preference.write(tmp_path / "run", "dpo", objective="aot", launch=launch)
    recipe = load(path, schema("dpo"))
    assert process_count(recipe) == 1 and "takes a step whole" in idle_gpus(recipe)


def test_a_count_that_is_named_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", EIGHT)
    path = life.write(tmp_path / "run", launch__processes=8, optim__batch_size=12)
    recipe = load(path, schema("sft"))
    assert process_count(recipe) == 8 and idle_gpus(recipe) is None


def test_a_count_that_does_not_fit_is_refused(tmp_path):
    cases = [
        Case("does not divide", ["sft", "r.yaml", "--set", "launch.processes=3"]),
        Case("more than cores", ["sft", "r.yaml", "--set", "launch.processes=1000"]),
        Case("without end", ["sft", "r.yaml", "--set", "launch.processes=1000000000"]),
        Case("threads", ["sft", "r.yaml", "--set", "launch.threads=1000000000"]),
        Case("tokenizers", ["sft", "r.yaml", "--set", "data.processes=1000000000"]),
    ]
    text = life.write(tmp_path / "run").read_bytes()
    ends = attempts([Case(it.name, it.arguments, {"r.yaml": text}) for it in cases], tmp_path / "a")
    assert [end.code for end in ends] == [2] * 5
    assert "multiple of launch.processes (3)" in ends[0].text
    assert "cores and no GPU" in ends[1].text
