"""A mistake that a stage finds while it works is shown with the lines of the recipe it is about."""

import re
from pathlib import Path

import pytest

from llmpipe.errors import NUMERIC, UserError
from llmpipe.front.lines import lines_of, with_lines
from llmpipe.recipe.check import locate
from llmpipe.stages import schema
from tests import life

RECIPE = """\
stage: sft
run: runs/a
model: ./base
data:
  train:
    - path: ./rows.jsonl
    - path: ./folder
    - path: ./shards/*/part-?.jsonl
  max_length: 64
  template: ./chat.jinja
optim: {learning_rate: 1e-3}
"""


@pytest.fixture
def located(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return locate(tmp_path / "r.yaml", schema("sft"), ["optim.steps=3"])


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("raise data.max_length to 80", ["9: data.max_length: 64"]),
        ("data.max_length, or data.max_length.", ["9: data.max_length: 64"]),
        ("data.max_rejected allows 1%", ["4: data.max_rejected: 0.01 unless set"]),
        ("launch.micro_batch_size", ['1: launch.micro_batch_size: "auto" unless set']),
        ("./rows.jsonl:3: bad JSON", ['6: data.train.0.path: "./rows.jsonl"']),
        ("cannot read folder/x/y.jsonl:3: bad", ['7: data.train.1.path: "./folder"']),
        ("shards/a/part-1.jsonl: empty", ['8: data.train.2.path: "./shards/*/part-?.jsonl"']),
        ("base/config.json: cut", ['3: model: "./base"']),
        ("./chat.jinja: refuses", ['10: data.template: "./chat.jinja"']),
        ("see runs/a/sft/log.txt, folders, ./rows.jsonl.gz and data.nothing.such", []),
    ],
)
def test_fields_and_files_that_a_mistake_names(located, text, lines):
    assert lines_of(text, located) == [f"{located.file}:{line}" for line in lines]


def test_what_was_given_beside_the_file(located):
    assert lines_of("optim.steps is small", located) == ["--set optim.steps=3"]
    again = locate(Path(located.file), schema("sft"), ["data.eval={holdout: 0.5}"])
    line = "--set data.eval={holdout: 0.5}: data.eval.holdout: 0.5"
    assert lines_of("lower data.eval.holdout", again) == [line]


def test_the_mistake_itself_stays_as_it_is(located):
    with pytest.raises(UserError) as shown, with_lines(located):
        raise UserError("loss is NaN", "lower optim.learning_rate", NUMERIC)
    line = f"{located.file}:11: optim.learning_rate: 0.001"
    assert shown.value.message == "loss is NaN" and shown.value.code == NUMERIC
    assert shown.value.hint == f"lower optim.learning_rate\n  {line}"
    with pytest.raises(UserError) as shown, with_lines(located):
        raise UserError("no disk is left")
    assert str(shown.value) == "no disk is left"


def test_rows_that_are_too_long_for_the_recipe(llmpipe, tmp_path):
    """With the line of what is too small, and a number that is large enough."""
    path = life.write(tmp_path / "run", data__max_length=12)
    code, _, err = llmpipe("prepare", path)
    assert code == 2 and re.search(r"run\.yaml:\d+: data\.max_length: 12\n", err), err
    number = re.search(r"raise data\.max_length to (\d+) for the longest", err)[1]
    assert llmpipe("prepare", path, "--set", f"data.max_length={number}")[0] == 0
