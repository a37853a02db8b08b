"""Content decides which work is the same: where files lie and what they are called does not."""

import json
import shutil
from pathlib import Path

import pytest

from llmpipe.data.kinds import rows as kind
from llmpipe.data.prepare import key_of
from llmpipe.errors import UserError
from llmpipe.recipe.check import load
from llmpipe.recipe.sections import Data
from llmpipe.run.artifact import Artifact
from llmpipe.run.plan import decide, plan_of
from llmpipe.stages import schema
from tests import life

ROWS = (life.TINY / "rows.jsonl").read_text()
REWARD = "def score(prompt, response, row):\n    return 0.0\n"
KINDS = ("model", "adapter")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with the same rows in three places and a model in two."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "other/rows.jsonl", "other/called.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(ROWS)
    for name in ("model", "other/model"):
        shutil.copytree(life.TINY / "model", name)
    return tmp_path


def recipe(stage="sft", **changes):
    values = {"stage": stage, "model": "./model", "data__train": [{"path": "./rows.jsonl"}]}
    if stage == "ppo":
        values |= {"optim__batch_size": 4, "reward": [{"function": "./rewards.py:score"}]}
    path = Path(f"{stage}.yaml")
    path.write_text(json.dumps(life.recipe(Path("run"), **{**values, **changes})))
    return load(path, schema(stage))


def identity(stage="sft", **changes):
    return plan_of(recipe(stage, **changes), Path("run"), KINDS).identity


def key(path, model="./model"):
    """What names the prepared rows of a source."""
    data = Data.model_validate({"train": [{"path": str(path)}], "eval": {"holdout": 0.1}})
    return key_of(data, kind.ROWS, Path(model), 42)[0]


@pytest.mark.parametrize("name", ["rows.jsonl", "other/rows.jsonl", "other/called.jsonl"])
@pytest.mark.parametrize("absolute", [False, True])
def test_the_same_rows_are_the_same_wherever_they_lie(here, name, absolute):
    path = here / name if absolute else f"./{name}"
    assert identity(data__train=[{"path": str(path)}]) == identity()
    assert key(path) == key("./rows.jsonl")


def test_other_rows_are_others(here):
    ways = [{"path": "./rows.jsonl"}]
    Path("more.jsonl").write_text(ROWS + ROWS.splitlines()[0] + "\n")
    ways.append({"path": "./more.jsonl"})
    shutil.copy("rows.jsonl", "rows.txt")  # the same bytes, read as a text
    ways.append({"path": "./rows.txt"})
    ways += [{"path": "./rows.jsonl", "limit": 70}, {"path": "./rows.jsonl", "weight": 2}]
    ways.append({"path": "./rows.jsonl", "format": "messages"})
    made = {identity(data__train=[source]) for source in ways}
    made.add(identity(data__train=ways[:2]))
    made.add(identity(data__train=[ways[1], ways[0]]))  # the order of the sources is the data's
    made.add(identity(data__train=ways[:1], data__eval={"sources": [{"path": "./more.jsonl"}]}))
    assert len(made) == len(ways) + 3
    assert len({key(source["path"]) for source in ways[:3]}) == 3


def test_a_folder_is_its_files_in_their_order(here):
    lines = ROWS.splitlines(keepends=True)
    parts = {"a": "".join(lines[:30]), "b": "".join(lines[30:])}
    orders = {"one": parts, "two": {"x": parts["a"], "y": parts["b"]}}
    orders["swapped"] = {"a": parts["b"], "b": parts["a"]}
    for folder, files in orders.items():
        Path(folder).mkdir()
        for name, text in files.items():
            Path(folder, f"{name}.jsonl").write_text(text)
    one, two, swapped = (identity(data__train=[{"path": f"./{name}"}]) for name in orders)
    assert one == two != swapped
    assert key("./one") == key("./two") != key("./swapped")


def test_models_templates_and_functions_are_what_they_hold(here):
    assert identity(model="./other/model") == identity(model=str(here / "model")) == identity()
    Path("other/model/generation_config.json").write_text("{}")
    assert identity(model="./other/model") != identity()

    for name in ("rewards.py", "other/called.py"):
        Path(name).write_text(REWARD + REWARD.replace("score", "second"))
    ways = [[{"function": f"{name}:score"}] for name in ("./rewards.py", here / "other/called.py")]
    assert {identity("ppo", reward=way) for way in ways} == {identity("ppo")}
    assert identity("ppo", reward=[{"function": "./rewards.py:second"}]) != identity("ppo")

    template = (life.TINY / "model" / "chat_template.jinja").read_text()
    for name in ("t.jinja", "other/u.jinja"):
        Path(name).write_text(template)
    ways = ["./t.jinja", str(here / "other/u.jinja")]
    assert len({identity(data__template=way) for way in ways}) == 1
    assert identity(data__template="./t.jinja") != identity()


def test_a_commit_of_the_hub_is_data_of_that_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    from llmpipe.run import plan

    commits = {"some/rows": "c0ffee", "other/rows": "c0ffee"}
    monkeypatch.setattr(plan, "hub_revision", lambda source: commits[source.path])
    model = {"model": str(life.TINY / "model")}
    before = identity(data__train=[{"path": "some/rows"}], **model)
    assert identity(data__train=[{"path": "other/rows"}], **model) != before
    commits["some/rows"] = "beef"
    assert identity(data__train=[{"path": "some/rows"}], **model) != before


def test_finished_work_is_skipped_under_another_spelling(here):
    artifact = life.command(written(recipe_values(optim__steps=2, evaluation={})))
    made = artifact.manifest()

    def again(**changes):
        path = written(recipe_values(optim__steps=2, evaluation={}, **changes))
        return decide(Artifact(Path("run/sft")), load(path, schema("sft")), KINDS, "checkpoints/*")

    moved = {"model": str(here / "other/model"), "data__train": [{"path": "./other/called.jsonl"}]}
    decision = again(**moved)
    assert decision.action == "skip" and decision.plan.identity == made.identity

    with pytest.raises(UserError) as refused:  # what differs is named, and not what is only spelled
        again(**moved, seed=7)
    assert refused.value.code == 3
    assert refused.value.message.splitlines()[1:] == ["  seed: 42 there, 7 now"]

    Path("other/called.jsonl").write_text(ROWS[::-1])
    with pytest.raises(UserError, match=r"content\.data\.train\.0:called\.jsonl: absent there"):
        again(**moved)


def recipe_values(**changes):
    spelled = {"model": "./model", "data__train": [{"path": "./rows.jsonl"}]}
    return life.recipe(Path("run"), **{**spelled, **changes})


def written(values):
    path = Path("sft.yaml")
    path.write_text(json.dumps(values))
    return path
