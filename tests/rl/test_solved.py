"""The difficulty filter: what is too hard or too easy is left out, counted, and tried once."""

import json

import pytest
from datasets import Dataset

from llmpipe.errors import UserError
from llmpipe.recipe.check import load
from llmpipe.rl.loop import Loop
from llmpipe.rl.solved import FILE, Chosen, Pass
from llmpipe.stages import schema
from tests import life
from tests.rl import test_ppo
from tests.rl.test_ppo import GRPO

ROWS = [{"prompt": f"{i} is", "kind": i} for i in range(16)]
LETTER = {"verifier": "regex", "pattern": "w"}  # which a random model writes now and then
TRIED = {"rollout__solved": [0.2, 0.6], "rollout__tries": 5, "reward": [LETTER]}


def write(run, **changes):
    rows = run.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    how = {
        "data": {"train": [{"path": str(rows)}], "max_length": 64},
        "optim__steps": 2,
        "optim__batch_size": 8,
        "checkpoint__every": 1,
        "launch__rollout_batch_size": 20,
    }
    return test_ppo.write(run, **how | TRIED | changes)


def tried(artifact):
    return list(map(json.loads, (artifact.path / FILE).read_text().splitlines()))


def asked(artifact):
    lines = map(json.loads, (artifact.path / "rollouts.jsonl").read_text().splitlines())
    return {line["prompt"] for line in lines}


@pytest.mark.parametrize("how", [{}, GRPO], ids=["ppo", "grpo"])
def test_what_is_too_hard_or_too_easy_is_left_out(tmp_path, how, capsys):
    made = life.command(write(tmp_path / "run", **how, optim__steps=4))
    lines = tried(made)
    assert [line["prompt"] for line in lines] == list(range(16)), "each once, in order"
    rights = [line["right"] for line in lines]
    rarely, often = sum(right < 1 for right in rights), sum(right > 3 for right in rights)
    assert rarely > 0 and 0 < 16 - rarely - often < 16, "there is something to leave out"
    said = f"solved: {rarely} of 16 prompts too rarely, {often} too often"
    assert f"{said}; {16 - rarely - often} are left" in capsys.readouterr().out
    (arrow,) = (tmp_path / "run" / ".prepared").glob("*/train.arrow")
    rows = [json.loads(row["row"])["prompt"] for row in Dataset.from_file(str(arrow)).to_list()]
    left = {rows[i] for i, right in enumerate(rights) if 1 <= right <= 3}
    assert asked(made) <= left


def test_a_pass_that_was_stopped_goes_on_and_is_never_made_again(tmp_path, monkeypatch):
    """The same lines and weights come of it, a line that was half written is written anew, and
    once training has begun nobody asks."""
    straight = life.command(write(tmp_path / "straight", **GRPO))
    recipe = write(tmp_path / "run", **GRPO)
    begun, write_lines, update = [], Pass._write, Loop.update

    def stopped_in_pass(self, begin, lines):
        write_lines(self, begin, lines)
        if begin == 4:
            with self.file.open("a") as file:
                file.write('{"prompt": 8, "ri')
            raise UserError("the plug was pulled")

    def noted(self, begin, lines):
        begun.append(begin)
        write_lines(self, begin, lines)

    def stopped_in_training(self):
        if self.state.step == 1:
            raise UserError("the plug was pulled")
        return update(self)

    monkeypatch.setattr(Pass, "_write", stopped_in_pass)
    with pytest.raises(UserError, match="plug"):
        life.command(recipe)
    monkeypatch.setattr(Pass, "_write", noted)
    monkeypatch.setattr(Loop, "update", stopped_in_training)
    with pytest.raises(UserError, match="plug"):
        life.command(recipe)
    assert begun == [8, 12], "what was left"
    monkeypatch.setattr(Loop, "update", update)
    lines = tmp_path / "run" / "grpo" / FILE
    content = lines.read_text()
    for damage, problem in [
        (content.replace('"prompt": 3', '"prompt": 4'), f"{FILE}:4: is not what was written"),
        (content.replace('"right": ', '"right": 9', 1), f"{FILE}:1: is not what was written"),
        (content[:100], "training has begun"),
        ("", "has 0 of 16 prompts"),
    ]:
        lines.write_text(damage)
        with pytest.raises(UserError, match=problem) as refused:
            life.command(recipe)
        assert refused.value.code == 3
    lines.write_text(content)
    made = life.command(recipe)
    assert begun == [8, 12] and tried(made) == tried(straight)
    weights = [each.path / "model" / "model.safetensors" for each in (made, straight)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.faults
def test_two_processes_leave_out_the_same(tmp_path):
    one = life.command(write(tmp_path / "one", **GRPO))
    both = life.pair(write(tmp_path / "two", **GRPO, launch__processes="auto"))
    assert tried(one) == tried(both)


def test_where_nothing_is_left(tmp_path):
    never = {"reward": [{"verifier": "regex", "pattern": "w{99}"}], "rollout__tries": 1}
    with pytest.raises(UserError, match=r"16 of 16 .* too rarely, 0 too .*none is left") as refused:
        life.command(write(tmp_path / "run", **never))
    assert refused.value.code == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout__solved": [0.9, 0.1]}, "nothing lies between 0.9 and 0.1"),
        ({"rollout__solved": [0.1]}, "at least 2 items"),
        ({"rollout__solved": [0.1, 1.5]}, "less than or equal to 1"),
        ({"reward": [{"format": "<a>...</a>"}]}, "no reward tells what is right"),
    ],
)
def test_bounds_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path / "run", **changes), schema("ppo"))


def test_some_rows():
    rows = Chosen("abcdef", [5, 0, 2])
    assert len(rows) == 3 and [*rows] == ["f", "a", "c"]
