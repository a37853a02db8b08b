"""Sources of reward by the command: each counted beside the others, and what is wrong with one said
ahead."""

import json
import sys

import pytest
from transformers import AutoTokenizer

from llmpipe.data.template import thinking
from llmpipe.data.tokenizer import Tokenizer
from llmpipe.errors import UserError
from llmpipe.recipe.check import load
from llmpipe.rl import rewards
from llmpipe.rl.sources.functions import UserFiles
from llmpipe.rl.sources.source import Source
from llmpipe.stages import schema
from tests import life
from tests.rl import test_ppo
from tests.rl.test_ppo import GRPO, updates
from tests.scores.test_judge import KEY, completion, served

SHORT = {"length": {"unit": "characters", "limit": 30}}
TAGS = {"format": "<think>...</think>..."}


def write(run, **changes):
    return test_ppo.write(run, **{"optim__steps": 2, "optim__batch_size": 8, **changes})


def rollouts(artifact):
    return list(map(json.loads, (artifact.path / "rollouts.jsonl").read_text().splitlines()))


def test_a_file_runs_once_whatever_is_taken_from_it(tmp_path):
    """By whichever way it is named; another file of that name is another module."""
    text = "calls = []\n\n\ndef one(): return calls\n\n\ndef other(): return calls\n"
    places = [tmp_path / "mine" / "rewards.py", tmp_path / "yours" / "rewards.py"]
    for place in places:
        place.parent.mkdir()
        place.write_text(text)
    (tmp_path / "link.py").symlink_to(places[0])
    files = UserFiles()
    ways = [(places[0], "one"), (places[0], "other"), (tmp_path / "link.py", "one")]
    mine = [files.take("", str(path), name)() for path, name in ways]
    assert mine[0] is mine[1] is mine[2]
    yours = files.take("", str(places[1]), "one")
    assert yours() is not mine[0] and sys.modules[yours.__module__].one is yours
    with pytest.raises(UserError, match=r"^reward: x: AttributeError: .*has no attribute 'gone'"):
        files.take("x", str(places[0]), "gone")


@pytest.mark.parametrize("how", [{}, GRPO], ids=["ppo", "grpo"])
def test_what_a_text_alone_tells(tmp_path, how):
    """Each part is logged, before its weight; and the sum is what is learned from."""
    halved = {"length": {"target": 20}, "weight": 0.5}
    made = life.command(write(tmp_path / "run", reward=[SHORT, TAGS, halved], **how))
    parts = ["scores/length", "scores/format", "scores/length (3)"]
    for line in updates(made):
        long, form, half = (line[part] for part in parts)
        assert 0 <= long <= 1 and form == 0 and 0 <= half <= 1
        assert line["objective/scores"] == pytest.approx(long + form + half / 2, abs=1e-5)
    for shown in rollouts(made):
        by_characters = max(0, 1 - max(len(shown["answer"]) - 30, 0) / 30)
        assert 0 <= shown["score"] - by_characters <= 0.5


def test_thought_is_learned_and_what_follows_it_is_scored(tmp_path, monkeypatch):
    """The function is given what a person would be; the answer that is learned has all tokens."""
    (tmp_path / "seen.py").write_text(
        "import json, pathlib\n\n\ndef seen(prompts, completions, **columns):\n"
        f"    pathlib.Path('{tmp_path}/seen.json').write_text(json.dumps(completions))\n"
        "    return [float(i) for i in range(len(completions))]\n"
    )
    from llmpipe.rl.sampling import Sampler

    thoughts, text = iter(range(1000)), Sampler.text

    def thought(self, episode):
        number = next(thoughts)
        return f"so {number}</think>\n{number}\n" if number % 2 else text(self, episode)

    monkeypatch.setattr(Sampler, "text", thought)
    how = {"optim__steps": 1, "rollout__think": True} | GRPO
    made = life.command(
        write(tmp_path / "run", reward=[{"function": f"{tmp_path}/seen.py:seen"}, TAGS], **how)
    )
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen == [str(i) if i % 2 else "" for i in range(8)]
    assert updates(made)[0]["scores/format"] == 0.5, "with the tag that the prompt ends in"
    first, second = rollouts(made)[:2]
    assert second["answer"] == "so 1</think>\n1\n" and first["tokens"] > 0


def asked(model):
    """What a model is asked, as whoever loads it with transformers has it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    question = [{"role": "user", "content": "What is 2 + 2?"}]
    return tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)


def prepared_prompts(artifact):
    """What was asked, of all prompts that are prepared in its run."""
    from llmpipe.training.rows import dataset

    backend = Tokenizer(artifact.model).backend
    files = (artifact.run / ".prepared").glob("*/train.arrow")
    tables = [table for table in map(dataset, files) if "prompt_ids" in table.column_names]
    return [backend.decode(row["prompt_ids"], False) for table in tables for row in table]


def test_what_learned_to_think_is_asked_to_wherever_it_goes(tmp_path):
    """Published with a template that opens the block, after a parent whose template does not; the
    next stage takes that as it is."""
    run = tmp_path / "run"
    sft = life.command(life.write(run, optim__steps=1))
    thinks = {"optim__steps": 1, "rollout__think": True, "reward": [SHORT]} | GRPO
    thinks["model"] = "artifact:sft"
    first = life.command(write(run, **thinks))
    told = f"{asked(sft.model)}<think>\n"
    assert asked(first.model) == told
    prompts = prepared_prompts(first)
    assert prompts and all(prompt.endswith("<think>\n") for prompt in prompts)
    again = life.command(write(run, **thinks | {"model": "artifact:grpo", "name": "again"}))
    assert asked(again.model) == told, "one tag is enough"
    other = tmp_path / "other.jinja"
    other.write_text((sft.model / "chat_template.jinja").read_text() + "{{ '!' }}")
    changed = thinks | {"name": "changed", "data__template": str(other)}
    with pytest.raises(UserError, match=r"data\.template: artifact:sft was trained with"):
        life.command(write(run, **changed))


def test_a_template_that_closes_the_thought():
    closed = "{% for m in messages %}{{ m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}"
    )
    with pytest.raises(UserError, match="closes the block of thought before an answer begins"):
        thinking(closed, {}, {})


SUMS = [{"prompt": f"add {i}", "tests": [f"assert add(1) == {1 + i}"]} for i in range(9)]


def test_programs_are_run_against_the_tests_of_their_rows(tmp_path, monkeypatch):
    from llmpipe.rl.sampling import Sampler

    answers = iter(range(1000))

    def text(self, episode):
        return "" if next(answers) % 2 else "```python\ndef add(x):\n    return x + 4\n```"

    monkeypatch.setattr(Sampler, "text", text)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    how = GRPO | {"optim__steps": 1, "data__train": [{"path": str(rows)}]}
    letters = {"function": f"{tmp_path}/rewards.py:brevity"}  # so that there is something to learn
    reward = [{"code": {"seconds": 5}}, letters]
    made = life.command(write(tmp_path / "run", reward=reward, **how))
    (line,) = updates(made)
    asked = {shown["prompt"] for shown in rollouts(made)}
    assert line["scores/code"] == (0.25 if "add 4" in asked else 0)
    assert line["groups/none_right"] == 1 - 2 * line["scores/code"]
    rows.write_text(rows.read_text() + json.dumps({"prompt": "?", "tests": "assert ("}) + "\n")
    with pytest.raises(UserError, match=r"rows.jsonl:10: no tests: test 1 is no Python: line 1"):
        life.command(write(tmp_path / "other", reward=reward, **how))


JUDGE = {"url": "http://127.0.0.1:9/v1", "model": "wise", "prompt": "Rate {response}."}


def test_a_judge_is_asked_by_the_command(tmp_path, monkeypatch):
    """Its key is in no file of the run; one that is not there ends the training with a line."""
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    with served(lambda n, body: completion(str(n))) as (url, asked):
        judge = JUDGE | {"url": url, "key_from": "JUDGE_API_KEY"}
        recipe = write(tmp_path / "run", reward=[{"judge": judge}], **GRPO)
        made = life.command(recipe)
        assert len(asked) == 16 and all(KEY in headers["Authorization"] for _, headers, _ in asked)
    assert updates(made)[0]["objective/scores"] == 4.5, "the mean of 1 to 8"
    texts = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(KEY.encode() in text for text in texts)
    gone = JUDGE | {"retries": 0}
    with pytest.raises(UserError, match=r"judge: http://127.0.0.1:9/v1: .*refused") as refused:
        life.command(write(tmp_path / "gone", reward=[{"judge": gone}], **GRPO))
    assert refused.value.code == 5
    monkeypatch.delenv("JUDGE_API_KEY")
    with pytest.raises(UserError, match=r"reward.0.judge.key_from: JUDGE_API_KEY is not set"):
        life.command(write(tmp_path / "other", reward=[{"judge": judge}], **GRPO))


def test_who_sees_the_thought():
    made = rewards.Rewards.__new__(rewards.Rewards)
    response = ["a</think> b", "c"]
    for thinks, sees, expected in [
        (False, False, response),
        (False, True, response),
        (True, False, ["b", ""]),
        (True, True, ["<think>\na</think> b", "<think>\nc"]),
    ]:
        made.thinks = thinks
        source = Source("x", 1.0, lambda rows, responses: [], None, sees)
        assert made.seen(source, response) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"format": "..."}, "'...' is the form of any answer"),
        ({"format": "<a>...</a>", "verifier": "number"}, "give one of model, function, verifier"),
        ({}, "give one of model, function, verifier"),
        ({"length": {}}, "give one of target and limit"),
        ({"length": {"target": 3, "limit": 4}}, "give one of target and limit"),
        ({"length": {"target": 0}}, "greater than or equal to 1"),
        ({"judge": JUDGE | {"url": "localhost:8000"}}, "url: 'localhost:8000' is not http://HOST"),
        ({"judge": JUDGE | {"prompt": "Rate it."}}, "prompt: holds no {response}"),
        ({"judge": JUDGE | {"bounds": [5, 1]}}, "nothing lies between 5.0 and 1.0"),
        ({"judge": JUDGE | {"key_from": "sk-1"}}, "key_from: is the name of a variable"),
        ({"judge": JUDGE | {"key_from": "JUDGE"}}, "name it so, such as JUDGE_API_KEY"),
        ({"code": {"seconds": 0}}, "greater than or equal to 1"),
        ({"verifier": "number", "schema": "./s.json"}, "schema is for verifier: json"),
    ],
)
def test_sources_that_cannot_be(tmp_path, source, message):
    with pytest.raises(UserError) as refused:
        load(write(tmp_path / "run", reward=[source]), schema("ppo"))
    assert message in str(refused.value) and "run-ppo.yaml:1: reward.0" in str(refused.value)


def test_thinking_that_the_template_is_told_not_to(tmp_path):
    off = {"rollout__think": True, "data__chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(UserError, match="enable_thinking is off"):
        load(write(tmp_path / "run", **off), schema("ppo"))


def test_a_schema_is_looked_at_ahead_and_is_part_of_the_result(tmp_path):
    pytest.importorskip("jsonschema")
    path = tmp_path / "schema.json"
    source = {"verifier": "json", "schema": str(path)}
    letters = {"verifier": "regex", "pattern": "[a-m]"}  # so that there is something to learn
    recipe = write(tmp_path / "run", reward=[source, letters], optim__steps=1)
    for written, message in [
        (None, "no such file"),
        ('{"type": "integr"}', r"reward.0.schema: .*schema.json: \$.type: 'integr'"),
    ]:
        if written:
            path.write_text(written)
        with pytest.raises(UserError, match=message) as refused:
            life.command(recipe)
        assert refused.value.code == 2 and not (tmp_path / "run" / "ppo").exists()
    path.write_text('{"type": "integer"}')
    assert "scores/json" in updates(life.command(recipe))[0]
    path.write_text('{"type": "number"}')
    with pytest.raises(UserError, match=r"schema\.json") as refused:
        life.command(recipe)
    assert refused.value.code == 3
