"""Environments by name: they ask, they score, and nothing is read from a file of the user's."""

import importlib
import json
import sys

import pytest
from datasets import Dataset

from llmpipe.errors import UserError
from llmpipe.recipe.check import load
from llmpipe.scores.environments import opened
from llmpipe.stages import schema
from tests import life
from tests.rl import test_ppo
from tests.rl.test_ppo import GRPO

SUMS = """
import random

class Sums:
    def __init__(self, size, seed, most=9):
        assert most > 1, "most must be above 1"
        self.size, self.seed, self.most = size, seed, most

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        numbers = random.Random(self.seed + i)
        a, b = numbers.randint(1, self.most), numbers.randint(1, self.most)
        return {"question": f"What is {a} + {b}?", "answer": str(a + b), "metadata": {}}

    def score_answer(self, answer, entry):
        return 1.0 if answer == entry["answer"] else len(set(answer) & set("abcdefg")) / 10


DATASETS = {"sums": Sums, "products": Sums}


def create_dataset(name, **options):
    return DATASETS[name](**options)
"""
NAME = "reasoning_gym/sums"


@pytest.fixture
def gym(tmp_path, monkeypatch):
    """A double of the library, as far as it is called."""
    package = tmp_path / "site" / "reasoning_gym"
    package.mkdir(parents=True)
    (package / "factory.py").write_text(SUMS)
    (package / "__init__.py").write_text("from .factory import create_dataset\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(package.parent))
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
        del sys.modules[name]


def write(run, source, **changes):
    changes = {"data": {"max_length": 64, "eval": {"holdout": 0.2}}} | changes
    reward = [{"environment": NAME, "questions": 30} | source]
    how = {"reward": reward, "optim__steps": 2, "optim__batch_size": 8}
    return test_ppo.write(run, **how | changes)


@pytest.mark.parametrize("how", [{}, GRPO], ids=["ppo", "grpo"])
def test_it_asks_and_it_scores(tmp_path, gym, how):
    made = life.command(write(tmp_path / "run", {"system": "Be brief."}, **how))
    environment = opened(NAME, 30, 42, {})
    questions = list(environment.questions())
    shown = list(map(json.loads, (made.path / "rollouts.jsonl").read_text().splitlines()))
    for line in shown:
        system, asked = line["prompt"]
        assert system == {"role": "system", "content": "Be brief."} and asked["role"] == "user"
        number = questions.index(asked["content"])
        assert line["score"] == environment.score(number, asked["content"], line["answer"])
    prepared = made.manifest().data
    assert prepared.rows.read == 30 and prepared.rows.train + prepared.rows.eval == 30
    assert "eval_score" in made.verify().final
    assert str(tmp_path) not in (made.path / "manifest.json").read_text()


def test_a_seed_asks_its_questions(tmp_path, gym):
    """Which another seed does not."""
    asked = []
    for seed in (42, 43):
        run = tmp_path / f"run{len(asked)}"
        life.command(write(run, {}, seed=seed, optim__steps=1))
        (arrow,) = run.glob(".prepared/*/train.arrow")
        rows = Dataset.from_file(str(arrow)).to_list()
        asked.append([row["prompt_ids"] for row in rows])
    assert asked[0] != asked[1] and len(asked[0]) == len(asked[1])


def test_what_a_run_goes_on_from_are_the_same_questions(tmp_path, gym, monkeypatch):
    recipe = write(tmp_path / "run", {}, optim__steps=1)
    life.command(recipe)
    assert life.command(recipe).finished, "nothing is done again"
    environment = opened(NAME, 30, 42, {})
    with pytest.raises(UserError, match="asks otherwise than when") as refused:
        environment.score(0, "What is 1 + 0?", "1")
    assert refused.value.code == 3


def test_the_answer_is_what_is_marked_as_one(gym):
    environment = opened(NAME, 3, 1, {"most": 5})
    entry = environment.dataset[2]
    for answer in ("{}", " {}\n", "<answer>1</answer> no: <answer>\n{} </answer>."):
        said = answer.format(entry["answer"])
        assert environment.score(2, entry["question"], said) == 1
    assert environment.score(2, entry["question"], f"It is {entry['answer']}.") < 1


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ({"environment": "sums"}, {}, "should match pattern"),
        ({"options": {"seed": 3}}, {}, "options: size is `questions`"),
        ({}, {"data__train": [{"path": "./rows.jsonl"}]}, "data.train: the environment asks"),
        ({}, {"data__eval": {"sources": [{"path": "./rows.jsonl"}]}}, "hold out a share"),
        ({}, {"reward": [{"environment": NAME}] * 2}, "one environment asks"),
        ({}, {"reward": [{"verifier": "number"}]}, "data.train: required, but missing"),
        ({}, {"reward": [{"verifier": "number", "questions": 3}]}, "are for an environment"),
    ],
)
def test_environments_that_cannot_be(tmp_path, source, changes, message):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path / "run", source, **changes), schema("ppo"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"environment": "reasoning_gym/sum"}, "no such environment; did you mean 'sums'"),
        ({"options": {"least": 3}}, "options: .*unexpected keyword argument 'least'"),
        ({"options": {"most": 1}}, "options: most must be above 1"),
    ],
)
def test_what_it_does_not_know_is_said_ahead(tmp_path, gym, source, message):
    with pytest.raises(UserError, match=rf"run-ppo.yaml:1: reward.0.environment: .*{message}"):
        life.command(write(tmp_path / "run", source))
    assert not (tmp_path / "run" / "ppo").exists()


def test_reasoning_gym_is_as_it_was():
    """What is called of the library; with the extra `rl` alone."""
    pytest.importorskip("reasoning_gym")
    environment = opened("reasoning_gym/chain_sum", 5, 42, {"min_terms": 2, "max_terms": 3})
    again = opened("reasoning_gym/chain_sum", 9, 42, {"min_terms": 2, "max_terms": 3})
    questions = list(environment.questions())
    assert len(questions) == 5 and questions == list(again.questions())[:5]
    entry = environment.dataset[3]
    assert environment.score(3, questions[3], f"<answer>{entry['answer']}</answer>") == 1
    assert environment.score(3, questions[3], "none at all") < 1
    with pytest.raises(UserError, match="no such environment; did you mean 'chain_sum'"):
        opened("reasoning_gym/chain_sums", 5, 42, {})
    with pytest.raises(UserError, match=r"options: .*unexpected keyword argument 'terms'"):
        opened("reasoning_gym/chain_sum", 5, 42, {"terms": 2})


TASKSET = """
import verifiers.v1 as vf


class Config(vf.TasksetConfig):
    most: int = 9


class Data(vf.TaskData):
    answer: int


class Sum(vf.Task[Data]):
    @vf.reward(weight=2.0)
    async def right(self, task, trace):
        return float(str(task.answer) in trace.last_message.content)

    @vf.reward
    async def brief(self, trace):
        return 0.5 if len(trace.last_message.content) < 20 else 0.0


class Sums(vf.Taskset[Sum, Config]):
    def load(self):
        for a in range(1, self.config.most + 1):
            for b in range(1, self.config.most + 1):
                yield Sum(Data(prompt=f"What is {a} + {b}?", system_prompt="Add.", answer=a + b))
"""


@pytest.fixture
def taskset(tmp_path, monkeypatch):
    """A package with a taskset, as whoever uses the library has it."""
    pytest.importorskip("verifiers")
    site = tmp_path / "site"
    site.mkdir()
    (site / "sums_of_two.py").write_text(f"{TASKSET}\n\n__all__ = ['Sums']\n")
    needy = TASKSET.replace("def right(self, task, trace)", "def right(self, task, trace, runtime)")
    (site / "needy.py").write_text(f"{needy}\n\n__all__ = ['Sums']\n")
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    yield "verifiers/sums_of_two"
    for name in ("sums_of_two", "needy"):
        sys.modules.pop(name, None)


def test_a_taskset_of_verifiers_asks_and_scores(tmp_path, taskset):
    """By its own rewards, each times its weight, in the order of the seed."""
    source = {"environment": taskset, "options": {"most": 5}}
    made = life.command(write(tmp_path / "run", source, **GRPO))
    environment = opened(taskset, 30, 42, {"most": 5})
    asked = [question[-1]["content"] for question in environment.questions()]
    assert len(asked) == len(set(asked)) == 25, "there are no more"
    shown = list(map(json.loads, (made.path / "rollouts.jsonl").read_text().splitlines()))
    for line in shown:
        system, user = line["prompt"]
        assert system == {"role": "system", "content": "Add."}
        number = asked.index(user["content"])
        assert line["score"] == environment.score(number, user["content"], line["answer"])
    total = environment.tasks[3].data.answer
    assert environment.score(3, asked[3], f"{total}") == 2.5
    assert environment.score(3, asked[3], f"I have thought of it: {total}") == 2.0
    assert environment.score(3, asked[3], "none") == 0.5
    with pytest.raises(UserError, match="asks otherwise than when"):
        environment.score(3, asked[4], "none")
    assert asked != [
        question[-1]["content"] for question in opened(taskset, 30, 43, {}).questions()
    ]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("verifiers/sums_of_three", {}, "no such taskset is installed"),
        ("verifiers/sums_of_two", {"least": 3}, "validation error"),
        ("verifiers/sums_of_two", {"most": 0}, "has no task"),
        ("verifiers/needy", {}, "its tasks need a runtime for right, which is not there"),
    ],
)
def test_tasksets_that_cannot_be(tmp_path, taskset, name, options, message):
    with pytest.raises(UserError, match=rf"run-ppo.yaml:1: reward.0.environment: .*{message}"):
        life.command(write(tmp_path / "run", {"environment": name, "options": options}))
