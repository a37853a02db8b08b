"""`sample`: exactly these rows of these answers, the same bytes wherever it was killed, and rows
that other stages read."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest

from llmpipe.data.encode import encoder_of
from llmpipe.errors import UserError
from llmpipe.evaluation.book import Book
from llmpipe.front import ahead
from llmpipe.models.drawing.draw import Episode
from llmpipe.recipe.check import load, load_pipeline
from llmpipe.recipe.sample import SampleRecipe
from llmpipe.report.page import write_report
from llmpipe.report.terminal import describe
from llmpipe.rl.chosen import ALIKE, NO_TEXT, TOO_LOW, UNFINISHED, Asked, Sample, outcome
from llmpipe.rl.sampling import Sampler
from llmpipe.run.artifact import Artifact
from llmpipe.stages import schema
from tests import life, store
from tests.training import test_preference

TURN = [{"role": "user", "content": "What colour is snow?"}]
ASKED = [
    json.loads(line)["messages"][:1] for line in (life.TINY / "rows.jsonl").read_text().splitlines()
]
ROWS = [{"prompt": prompt, "kind": i % 2} for i, prompt in enumerate(ASKED)]
SIX = ROWS[:6]
REWARD = """
from pathlib import Path

WORTH = {"right": 2.0, "near": 1.0, "wrong": 0.0}


def worth(prompts, completions, **columns):
    return [WORTH[text] for text in completions]


def letters(prompts, completions, kind, **columns):
    assert set(kind) <= {0, 1} and len(kind) == len(prompts)
    return [text.count("e") / 4 + each for text, each in zip(completions, kind)]


def none(prompts, completions, **columns):
    return [0.0] * len(completions)
"""


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A model that ends its answers, in a run of its own."""
    run = tmp_path_factory.mktemp("taught") / "run"
    how = {"learning_rate": 5e-3, "batch_size": 8, "steps": 60, "precision": "fp32"}
    return store.made(life.write(run, optim=how, launch__micro_batch_size=8, evaluation={}))


def write(run, rows=SIX, **changes):
    run.parent.mkdir(exist_ok=True)
    (run.parent / "rewards.py").write_text(REWARD)
    data = run.parent / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "stage": "sample",
        "run": str(run),
        "model": str(life.TINY / "model"),
        "data": {"train": [{"path": str(data)}], "max_length": 64},
        "reward": [{"function": f"{run.parent}/rewards.py:letters"}],
        "rollout": {"group": 4, "max_new_tokens": 12},
        "precision": "fp32",
        "launch": {"processes": 1, "threads": 1, "batch_size": 8},
    }
    life.put(values, changes)
    path = run.parent / f"{run.name}-{values.get('name', values['stage'])}.yaml"
    path.write_text(json.dumps(values))
    return path


def of(model, run, rows=SIX, **changes):
    """The recipe that asks a model of another run."""
    return write(run, rows, model=str(model.path), **changes)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def content(artifact):
    return {name: (artifact.path / name).read_bytes() for name in ("samples.jsonl", "rows.jsonl")}


# --- which answers are learned from ---------------------------------------------------------------


def recipe(**fields):
    asked = {"run": "runs/x", "model": "./m", "data": {"train": [{"path": "./r.jsonl"}]}}
    reward = [{"verifier": "number"}]
    return SampleRecipe.model_validate({"stage": "sample", **asked, "reward": reward, **fields})


def answers(*given):
    """Of (text, score), with `...` behind those that did not end."""
    return [
        Sample(text.removesuffix("..."), score, {}, 3, not text.endswith("..."))
        for text, score in given
    ]


SEVERAL = answers(("b", 1), ("a", 2), ("c...", 9), (" ", 8), ("\ufffd.", 7), ("d", 0), ("e", 0))


@pytest.mark.parametrize(
    ("fields", "given", "made"),
    [
        ({}, SEVERAL, [{"prompt": "p", "chosen": "a", "rejected": "d"}]),
        ({"write": "best"}, SEVERAL, [{"prompt": "p", "completion": "a"}]),
        (
            {"write": "accepted", "at_least": 1},
            SEVERAL,
            [{"prompt": "p", "completion": "b"}, {"prompt": "p", "completion": "a"}],
        ),
        ({"at_least": 2}, SEVERAL, [{"prompt": "p", "chosen": "a", "rejected": "d"}]),
        ({"at_least": 3}, SEVERAL, TOO_LOW),
        ({"write": "accepted", "at_least": 3}, SEVERAL, TOO_LOW),
        ({}, answers(("a", 1), ("b", 1), ("c...", 0)), ALIKE),
        ({"write": "best"}, answers(("a", 1), ("b", 1)), [{"prompt": "p", "completion": "a"}]),
        ({}, answers(("a", 1), ("a", 0), ("a", 2)), ALIKE),  # a judge of two minds
        ({}, answers(("a", 1)), ALIKE),
        (
            {"write": "accepted", "at_least": 1},
            answers(("a", 1), ("a", 1)),
            [{"prompt": "p", "completion": "a"}],
        ),
        ({}, answers(("a...", 1), ("b...", 0)), UNFINISHED),
        ({}, answers(("a...", 1), ("", 0)), NO_TEXT),
        ({}, [replace(answer, whole=False) for answer in SEVERAL], NO_TEXT),
    ],
)
def test_what_becomes_of_answers(fields, given, made):
    became = outcome(recipe(**fields), Asked("p"), given)
    assert (became.without or became.rows) == made
    assert bool(became.rows) != bool(became.without)


def test_turns_stay_turns():
    """With the tools of the row, and the thought that the template opens, as it writes it."""
    given = answers(("a</think>b", 1), ("c</think>d", 0))
    (row,) = outcome(recipe(), Asked(TURN, [{"name": "f"}], "<think>\n"), given).rows
    assert row == {
        "prompt": TURN,
        "tools": [{"name": "f"}],
        "chosen": [{"role": "assistant", "content": "<think>\na</think>b"}],
        "rejected": [{"role": "assistant", "content": "<think>\nc</think>d"}],
    }


# --- the stage ------------------------------------------------------------------------------------

SCRIPTED = [{"prompt": f"{i} is", "answer": "right"} for i in range(6)]
SCRIPT = {
    "0 is": ["wrong", "right", "near", "wrong"],
    "1 is": ["near", "near", "near", "near"],
    "2 is": ["right", "wrong...", "near", "right"],
    "3 is": ["right...", "wrong...", "near...", "near..."],
    "4 is": ["near", "wrong", "wrong", "near"],
    "5 is": ["wrong", "wrong", "wrong", "wrong"],
}


@pytest.fixture
def scripted(monkeypatch):
    """Answers as `SCRIPT` has them, in the place of those that are drawn."""

    def answers(self, note, prompts, places):
        episodes = []
        for ids, place in zip(prompts, places, strict=True):
            text = SCRIPT[self.tokenizer.decode(ids, skip_special_tokens=True)][place.episode % 4]
            said = self.tokenizer(text.removesuffix("..."), add_special_tokens=False)["input_ids"]
            ended = not text.endswith("...")
            end = [self.tokenizer.eos_token_id] if ended else []
            episodes.append(Episode(ids, said + end, ended, None, None))
        return episodes

    monkeypatch.setattr(Sampler, "answers", answers)


def test_exactly_these_rows_of_these_answers(tmp_path, scripted, capsys):
    reward = [
        {"function": f"{tmp_path}/rewards.py:worth"},
        {"verifier": "exact_match", "weight": 0.0},
    ]
    made = life.command(write(tmp_path / "run", SCRIPTED, reward=reward))
    assert lines(made.rows) == [
        {"prompt": "0 is", "chosen": "right", "rejected": "wrong"},
        {"prompt": "2 is", "chosen": "right", "rejected": "near"},
        {"prompt": "4 is", "chosen": "near", "rejected": "wrong"},
    ]
    manifest = made.verify()
    assert manifest.kind == "dataset" and manifest.base is None and manifest.training is None
    assert set(manifest.files) == {
        *("recipe.yaml", "rejected.jsonl", "rows.jsonl", "samples.jsonl", "settings.json")
    }
    assert manifest.final == {
        "prompts": 6,
        "answers": 24,
        "rows": 3,
        "ended": 19,
        "no_text": 0,
        "spread": 4 / 6,
        "solved": 3 / 6,
        "right": 4 / 24,
        "score": (3 * 2 + 2 * 1 + 2 + 4 * 1 + 2 + 2 * 1 + 2 * 1 - 2) / 24,
        "score_best": (2 + 1 + 2 + 2 + 1 + 0) / 6,
        "score_worst": (0 + 1 + 0 + 0 + 0 + 0) / 6,
        "without": {UNFINISHED: 1, ALIKE: 2},
    }
    said = "6 prompts, 3 rows of pairs; 1 without: no answer ended; 2 without: answers score alike"
    assert said in capsys.readouterr().out
    samples = lines(made.path / "samples.jsonl")
    texts = [[answer["text"] for answer in line["answers"]] for line in samples]
    assert texts == [[text.removesuffix("...") for text in given] for given in SCRIPT.values()]
    first = samples[0]["answers"][1]
    assert list(first["scores"].values()) == [2.0, 1.0] and first["score"] == 2.0


SAID = "so.</think>4"
THINKS = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}{{ eos_token }}{% endfor %}" + (
    "{% if add_generation_prompt %}assistant:\nOPENS{% endif %}"
)


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize(
    ("opens", "prompt", "opening"),
    [
        ("<think>", TURN, "<think>"),
        ("<think>\n", TURN, "<think>\n"),
        ("", TURN, "<think>\n"),
        ("", "2 + 2 is\n", "<think>\n"),
        ("", "2 + 2 is\n<think>", ""),
    ],
)
def test_a_row_is_what_was_asked_and_drawn(tmp_path, monkeypatch, think, opens, prompt, opening):
    """Whoever opens the block of thought: with the tag in front of the answer, token by token the
    text that the model saw and went on with."""
    if not opens and not think:
        opening = ""
    (tmp_path / "thinks.jinja").write_text(THINKS.replace("OPENS", opens))
    asked = []

    def answers(self, note, prompts, places):
        asked.extend(prompts)
        episodes = []
        for ids in prompts:
            said = [*self.tokenizer(SAID)["input_ids"], self.tokenizer.eos_token_id]
            episodes.append(Episode(ids, said, True, None, None))
        return episodes

    monkeypatch.setattr(Sampler, "answers", answers)
    changes = {"write": "best", "rollout__think": think, "reward": [{"length": {"limit": 9}}]}
    changes |= {"data__template": f"{tmp_path}/thinks.jinja"}
    made = life.command(write(tmp_path / "run", [{"prompt": prompt}], **changes))
    (row,) = lines(made.rows)
    spoken = opening + SAID
    is_text = isinstance(prompt, str)
    turn = {"role": "assistant", "content": spoken}
    assert row == {"prompt": prompt, "completion": spoken if is_text else [turn]}
    assert lines(made.path / "samples.jsonl")[0].get("opening", "") == opening
    untold = "rewards look at the block of thought as well" in (made.path / "log.txt").read_text()
    assert untold == (not think and (bool(opens) or "<think>" in str(prompt)))
    (prepared,) = (made.run / ".prepared").glob("*/tokenizer")
    encoder = encoder_of(prepared, {})
    whole = encoder.answered(row["prompt"], row["completion"]).ids
    assert whole[: len(asked[0])] == asked[0]
    assert whole[len(asked[0]) :] == [*encoder.tokenizer.ids(SAID), encoder.eos]


def test_where_nothing_is_made(tmp_path):
    """Exit 4 in a line that counts why; what was drawn is kept, and nothing is drawn again."""
    path = write(tmp_path / "run", reward=[{"function": f"{tmp_path}/rewards.py:none"}])
    for _ in range(2):
        with pytest.raises(UserError, match=r"nothing to learn; .* without: ") as refused:
            life.command(path)
        assert refused.value.code == 4 and "\n" not in refused.value.message
    home = Artifact(tmp_path / "run" / "sample")
    assert not home.finished and len(lines(home.path / "samples.jsonl")) == 6
    assert "6 of 6 prompts are answered already" in (home.path / "log.txt").read_text()


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_killed_one_ends_as_an_unbroken_one(tmp_path, monkeypatch, kept, taught):
    """Batches are of two prompts: before the first is kept, in between, and behind the last."""
    straight = content(life.command(of(taught, tmp_path / "one" / "run")))
    path = of(taught, tmp_path / "two" / "run")
    add, batches = Book.add, []

    def pulled(self, new):
        if len(batches) == kept:
            with self.path.open("a") as file:
                file.write('{"task": "sample", "mo')
            raise UserError("the plug was pulled")
        counted(self, new)

    def counted(self, new):
        batches.append([line.item for line in new])
        add(self, new)

    monkeypatch.setattr(Book, "add", pulled)
    with pytest.raises(UserError, match="plug"):
        life.command(path)
    monkeypatch.setattr(Book, "add", counted)
    assert content(life.command(path)) == straight
    assert batches == [[0, 1], [2, 3], [4, 5]], "each once"


def test_one_that_was_killed_while_it_published(tmp_path, monkeypatch, taught):
    path = of(taught, tmp_path / "run")
    commit = Artifact.commit

    def pulled(self, manifest):
        raise UserError("the plug was pulled")

    monkeypatch.setattr(Artifact, "commit", pulled)
    with pytest.raises(UserError, match="plug"):
        life.command(path)
    home = Artifact(tmp_path / "run" / "sample")
    before = content(home)
    home.rows.write_text("half of")
    monkeypatch.setattr(Artifact, "commit", commit)
    assert content(life.command(path)) == before
    home.verify()


def test_what_was_drawn_and_changed_is_refused(tmp_path, monkeypatch):
    """A byte of samples.jsonl, and other settings of the machine: exit 3."""
    path = write(tmp_path / "run", reward=[{"function": f"{tmp_path}/rewards.py:none"}])
    with pytest.raises(UserError, match="nothing to learn"):
        life.command(path)
    with pytest.raises(UserError, match="other settings: batch_size 8 there, 4 now") as refused:
        life.command(path, ["launch.batch_size=4"])
    assert refused.value.code == 3
    samples = tmp_path / "run" / "sample" / "samples.jsonl"
    samples.write_text(samples.read_text().replace('"score": 0.0', '"score": 1.0', 1))
    with pytest.raises(UserError, match=r"samples\.jsonl: is not what was scored") as refused:
        life.command(path)
    assert refused.value.code == 3


@pytest.mark.faults
@pytest.mark.parametrize("hook", ["kill_after_three_batches", "kill_inside_a_line"])
def test_a_kill_leaves_no_trace(tmp_path, hook, taught):
    rows = ROWS[:16]
    straight = life.command(of(taught, tmp_path / "one" / "run", rows))
    path = of(taught, tmp_path / "two" / "run", rows)
    trial = life.Trial(path, hook=hook)
    assert trial.wait() == -9, trial.text()
    assert content(life.command(path)) == content(straight)


@pytest.mark.faults
def test_two_processes_draw_what_one_does(tmp_path, taught):
    rows = ROWS[:9]
    one = life.command(of(taught, tmp_path / "one" / "run", rows))
    both = life.pair(of(taught, tmp_path / "two" / "run", rows, launch__processes="auto"))
    assert content(one) == content(both)


def test_answers_are_drawn_by_their_places(tmp_path, taught):
    """More prompts behind those that were there change no answer; another seed changes them."""
    few = life.command(of(taught, tmp_path / "few" / "run", SIX[:4]))
    many = life.command(of(taught, tmp_path / "many" / "run"))
    assert content(many)["samples.jsonl"].startswith(content(few)["samples.jsonl"])
    other = life.command(of(taught, tmp_path / "few" / "run", SIX[:4], seed=7, name="other"))
    assert content(other)["samples.jsonl"] != content(few)["samples.jsonl"]
    texts = Counter(
        each["text"] for line in lines(few.path / "samples.jsonl") for each in line["answers"]
    )
    assert len(texts) > 8, "answers to a prompt differ"


def test_an_adapter_answers_as_what_it_is_merged_into(taught, tmp_path):
    run = tmp_path / "run"
    adapter = {"rank": 4, "alpha": 8, "merge": True}
    how = {"adapter": adapter, "optim__steps": 4, "optim__learning_rate": 2e-2, "evaluation": {}}
    lora = store.made(life.write(run, name="lora", model=str(taught.path), **how))
    texts = [
        [[each["text"] for each in line["answers"]] for line in lines(made.path / "samples.jsonl")]
        for made in (
            life.command(write(run, model="artifact:lora", name="of-lora")),
            life.command(write(run, model="artifact:lora-merged", name="of-merged")),
            life.command(of(taught, run)),
        )
    ]
    assert texts[0] == texts[1] != texts[2]
    assert lora.name in [p.name for p in Artifact(run / "of-lora").manifest().parents]


def test_a_reward_model_scores_and_does_not_answer(taught, tmp_path):
    run = tmp_path / "run"
    store.made(test_preference.write(run, "reward", optim__steps=2, evaluation={}))
    made = life.command(of(taught, run, reward=[{"model": "artifact:reward"}]))
    answers = [each for line in lines(made.path / "samples.jsonl") for each in line["answers"]]
    by_text = {each["text"]: each["score"] for each in answers}
    assert len(set(by_text.values())) > 8
    assert "reward" in [parent.name for parent in made.manifest().parents]
    for model, code in (("artifact:reward", 3), (str(run / "reward" / "model"), 3)):
        with pytest.raises(UserError, match="reward") as refused:
            life.command(write(run, model=model, name="other"))
        assert refused.value.code == code and "\n" not in refused.value.message
    with pytest.raises(UserError, match="is not a reward model") as refused:
        reward = [{"model": str(taught.model)}]
        life.command(of(taught, run, reward=reward, name="other"))
    assert refused.value.code == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__eval": {"holdout": 0.1}}, "data.eval: every prompt is answered"),
        ({"rollout__group": 1}, "rollout.group: a pair takes 2 answers"),
        ({"write": "accepted"}, "at_least: required by write: accepted"),
        ({"data__train": []}, "data.train: required, but missing"),
        ({"rollout__engine": "vllm"}, "rollout.engine: unknown key"),
    ],
)
def test_what_cannot_be_asked(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as refused:
        load(write(tmp_path / "run", **changes), schema("sample"))
    assert refused.value.code == 2


def test_a_model_without_the_templates_tokens_is_refused(tmp_path):
    path = write(tmp_path / "run", [{"prompt": TURN}], data__template="llama3")
    with pytest.raises(UserError, match="which the model has not") as refused:
        life.command(path)
    assert refused.value.code == 2


# --- what reads it --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def road(tmp_path_factory, taught):
    """A run with what `sample` made of a model."""
    home = tmp_path_factory.mktemp("sample")
    life.command(of(taught, home / "run", ROWS[:16]))
    return home


def learn(run, source="artifact:sample", **changes):
    data = {"train": [{"path": source}], "max_length": 64}
    return test_preference.write(run, "dpo", data=data, optim__steps=2, evaluation={}, **changes)


@pytest.fixture
def run(road, tmp_path):
    """A run of its own."""
    shutil.copytree(road / "run", tmp_path / "run")
    return tmp_path / "run"


def test_dpo_learns_from_it(run, tmp_path):
    """It is a parent, its content decides, and a run that was moved is as good."""
    path = learn(run)
    made = life.command(path)
    sample = Artifact(run / "sample")
    manifest = made.verify()
    assert ("sample", sample.manifest().fingerprint) in [
        (parent.name, parent.fingerprint) for parent in manifest.parents
    ]
    assert manifest.data.rows.read == len(lines(sample.rows)) > 0
    assert "path: artifact:sample\n" in (made.path / "recipe.yaml").read_text()
    before = (made.path / "manifest.json").read_bytes()
    run.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    copy = tmp_path / "copy.jsonl"
    shutil.copy(moved / "sample" / "rows.jsonl", copy)
    for source in ("artifact:sample", str(copy)):
        life.command(learn(moved, source))
        assert (moved / "dpo" / "manifest.json").read_bytes() == before, "skipped"


def test_an_unfinished_reader_goes_on_where_it_was_moved_to(run, tmp_path):
    life.command(learn(run), only_prepare=True)
    run.rename(tmp_path / "moved")
    made = life.command(learn(tmp_path / "moved"))
    assert "sample" in [parent.name for parent in made.verify().parents]


def test_it_is_shown(run):
    told = "\n".join(describe(Artifact(run / "sample")))
    final = Artifact(run / "sample").manifest().final
    assert "dataset by sample" in told and "16 to answer" in told
    assert f"{final['rows']} rows of pairs" in told and "64 to 16 prompts" in told
    html = write_report([run]).read_text()
    assert f"{final['rows']} rows of pairs" in html and "prompts, with all answers" in html


@pytest.mark.parametrize("name", ["rows.jsonl", "samples.jsonl"])
def test_a_damaged_one_is_refused(run, name):
    path = run / "sample" / name
    path.write_bytes(path.read_bytes().replace(b"prompt", b"pronpt", 1))
    with pytest.raises(UserError, match=name) as refused:
        life.command(learn(run))
    assert refused.value.code == 3 and not (run / "dpo" / "manifest.json").exists()


def test_rows_that_changed_since_it_was_planned_are_refused(run):
    life.command(learn(run), only_prepare=True)
    rows = run / "sample" / "rows.jsonl"
    rows.write_bytes(rows.read_bytes() + rows.read_bytes())
    with pytest.raises(UserError, match=r"rows\.jsonl") as refused:
        life.command(learn(run))
    assert refused.value.code == 3


@pytest.mark.parametrize(
    ("source", "message", "code"),
    [
        ("artifact:samples", "there is no such artifact in .*did you mean 'sample'", 2),
        ("artifact:sample@3", "is not artifact:NAME", 2),
        ("artifact:", "is not artifact:NAME", 2),
    ],
)
def test_what_is_no_data_set(run, source, message, code):
    with pytest.raises(UserError, match=message) as refused:
        life.command(learn(run, source))
    assert refused.value.code == code


PIPELINE = """
run: runs/x
stages:
  - {stage: sample, model: MODEL, data: {train: [{path: ROWS}], max_length: 64},
     reward: [{verifier: number}], write: WRITE, at_least: 0}
  - {stage: STAGE, model: MODEL, data: {train: [{path: 'artifact:sample'}]},
     optim: {learning_rate: 1e-5}}
"""


@pytest.mark.parametrize(
    ("write", "reader", "problem"),
    [
        ("pairs", "dpo", None),
        ("best", "sft", None),
        ("pairs", "sft", "stage 1 makes rows of format preference (write); this stage takes "),
        ("accepted", "dpo", "stage 1 makes rows of format prompt-completion (write); "),
    ],
)
def test_a_pipeline_is_told_ahead_that_rows_do_not_fit(tmp_path, write, reader, problem):
    """In a second, with its line."""
    words = {"MODEL": f"{life.TINY}/model", "ROWS": f"{life.TINY}/rows.jsonl", "WRITE": write}
    text = PIPELINE
    for word, meant in {**words, "STAGE": reader}.items():
        text = text.replace(word, meant)
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    pipeline = load_pipeline(path, schema)
    if problem is None:
        ahead.look(pipeline.stages, pipeline=pipeline)
        return
    with pytest.raises(UserError) as refused:
        ahead.look(pipeline.stages, pipeline=pipeline)
    assert f"{path}:6: data.train.0.path: artifact:sample: {problem}" in refused.value.message
    assert refused.value.code == 2


def test_the_folder_of_one_is_no_folder_of_rows(run):
    """Every file of it would be read; what to write is said."""
    path = run / "sample"
    with pytest.raises(UserError, match="is an artifact, not a folder of rows") as refused:
        life.command(learn(run, str(path)))
    assert f"its rows are {path}/rows.jsonl; in its run, artifact:sample" in str(refused.value)
    assert refused.value.code == 2
    made = life.command(learn(run, f"{path}/rows.jsonl"))
    assert made.manifest().data.rows.read == len(lines(path / "rows.jsonl"))


def test_a_data_set_is_no_model_and_a_model_no_data_set(run):
    with pytest.raises(UserError, match="is of kind 'dataset'; this stage takes") as refused:
        life.command(learn(run, model="artifact:sample"))
    assert refused.value.code == 3
    life.command(learn(run))
    with pytest.raises(UserError, match="is of kind 'model'; this stage takes dataset") as refused:
        life.command(learn(run, "artifact:dpo", name="again"))
    assert refused.value.code == 3
