"""Evaluation: every number is what its library or a plain loop gives, a killed evaluation ends
as an unbroken one, and a gate stops a pipeline."""

import json
import math
import shutil

import pytest

from llmpipe.errors import UserError
from llmpipe.recipe.check import load
from llmpipe.run.artifact import Artifact
from llmpipe.run.results import LEAST_ITEMS
from llmpipe.stages import schema
from tests import life, store

ROWS = [{"path": str(life.TINY / "rows.jsonl")}]
TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 6,
    "Blue is a colour.",
    "Ein Satz mit Ümläuten 你好.",
]
PAIRS = [
    {"prompt": "What colour is grass?", "chosen": "Green.", "rejected": "A loud kind of Tuesday."},
    {
        "prompt": "What is a young dog called?",
        "chosen": "A puppy.",
        "rejected": "A mountain of old rope.",
    },
]
SUMS = [
    {"prompt": "2 + 2 =", "answer": "4"},
    {"prompt": [{"role": "user", "content": "What is a half?"}], "answer": ["0.5", "$1/2$"]},
    {"prompt": "1000 + 234 =", "answer": "1,234"},
]
CHOICES = [
    {
        "question": "What colour is grass?",
        "choices": ["Green.", "Blue.", "Seventeen."],
        "answer": 0,
    },
    {"question": "What is a young dog called?", "choices": ["A puppy.", "A stone."], "answer": "A"},
    {
        "question": "The sky is",
        "choices": {"text": ["a fish", "blue"], "label": ["1", "2"]},
        "answer": "2",
    },
]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"path": str(path)}]


def write(run, tasks, models=None, **more):
    models = models or {"base": str(life.TINY / "model"), "sft": "artifact:sft"}
    values = {
        "stage": "eval",
        "run": str(run),
        "models": models,
        "tasks": tasks,
        "precision": "fp32",
        **more,
    }
    values.setdefault("launch", {"threads": 1, "batch_size": 8})
    path = run.parent / f"{values.get('name', 'eval')}.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


def results(artifact):
    return json.loads((artifact.path / "results.json").read_text())


def lines(artifact):
    return [json.loads(line) for line in (artifact.path / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose sft model knows a part of the tiny rows by heart."""
    run = tmp_path_factory.mktemp("eval") / "run"
    store.made(
        life.write(
            run,
            optim__steps=60,
            optim__learning_rate=5e-3,
            optim__batch_size=8,
            evaluation={},
            checkpoint__every=99,
            log__every=20,
            launch__micro_batch_size=8,
        )
    )
    return run


@pytest.fixture(scope="module")
def tasks(run):
    return [
        {
            "name": "text",
            "task": "perplexity",
            "data": jsonl(run.parent / "texts.jsonl", [{"text": t} for t in TEXTS]),
            "window": 32,
            "stride": 12,
        },
        {"name": "chat", "task": "perplexity", "data": ROWS},
        {
            "name": "answers",
            "task": "generate",
            "data": ROWS,
            "max_new_tokens": 12,
            "pattern": "(.+)",
            "score": ["exact_match", "contains", "regex", "json", "rouge", "bleu", "chrf"],
        },
        {
            "name": "sums",
            "task": "generate",
            "data": jsonl(run.parent / "sums.jsonl", SUMS),
            "max_new_tokens": 4,
            "score": ["number", "math_verify"],
        },
        {"task": "choice", "data": jsonl(run.parent / "choices.jsonl", CHOICES)},
        {"task": "preference", "data": jsonl(run.parent / "pairs.jsonl", PAIRS)},
    ]


@pytest.fixture(scope="module")
def evaluated(run, tasks):
    return store.made(write(run, tasks))


def test_the_artifact(evaluated):
    manifest = evaluated.verify()
    assert manifest.kind == "evaluation" and [p.name for p in manifest.parents] == ["sft"]
    assert set(manifest.files) == {
        "recipe.yaml",
        "results.json",
        "samples.jsonl",
        "settings.json",
    }
    found = results(evaluated)
    sft = Artifact(evaluated.run / "sft").manifest()
    assert found["models"]["sft"]["parent"] == "base" and found["models"]["base"]["parent"] is None
    assert found["models"]["sft"]["template"] == sft.tokenizer.template, (
        "evaluated with the template of training"
    )
    for task in found["tasks"].values():
        for cells in task["metrics"].values():
            for cell in cells.values():
                assert cell["n"] == task["n"]
                if cell["low"] is None:  # of few items there is none, but for shares
                    assert task["n"] < LEAST_ITEMS
                else:
                    assert cell["low"] <= cell["value"] <= cell["high"]
    assert manifest.final["answers.exact_match"]["sft"] > 0.3


def assert_known_ahead(artifact, *kinds):
    """What was measured of models of these kinds is what gates are held against beforehand."""
    recipe = load(artifact.run.parent / f"{artifact.name}.yaml", schema("eval"))
    for task in recipe.tasks:
        measured = results(artifact)["tasks"][task.label]["metrics"]
        assert measured.keys() == set().union(*map(task.metrics, kinds)), task.label
        assert measured.keys() <= task.metrics(None)


def test_what_is_measured_was_known_ahead(evaluated):
    assert_known_ahead(evaluated, "model")


def plain_loop(folder, text, window, stride):
    """The sliding window of the transformers documentation, with what every token has before it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = torch.tensor(
        [[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]]
    )
    nats, count, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        part, labels = ids[:, begin:end], ids[:, begin:end].clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            logits = model(part).logits[0, :-1].double()
        wanted = labels[0, 1:]
        for row, label in zip(logits, wanted, strict=True):
            if label != -100:
                nats -= float(row.log_softmax(-1)[label])
                count += 1
        before = end
        if end == ids.shape[1]:
            break
    return nats, count


def test_perplexity_is_that_of_a_plain_loop(evaluated):
    for label, folder in (("base", life.TINY / "model"), ("sft", evaluated.run / "sft" / "model")):
        each = [plain_loop(folder, text, 32, 12) for text in TEXTS]
        nats, count = sum(n for n, _ in each), sum(c for _, c in each)
        metrics = results(evaluated)["tasks"]["text"]["metrics"]
        assert metrics["nats_per_token"][label]["value"] == pytest.approx(nats / count, abs=1e-6)
        assert metrics["perplexity"][label]["value"] == pytest.approx(
            math.exp(nats / count), rel=1e-5
        )
        size = sum(len(text.encode()) for text in TEXTS)
        assert metrics["bits_per_byte"][label]["value"] == pytest.approx(
            nats / math.log(2) / size, abs=1e-6
        )


def test_the_perplexity_of_a_conversation_is_the_loss_of_training(evaluated):
    """On the very rows of training: the assistant's tokens and no others, as sft counts them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = evaluated.run / "sft" / "model"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    nats, count = 0.0, 0
    for line in (life.TINY / "rows.jsonl").read_text().splitlines():
        turns = json.loads(line)["messages"]
        for k in [k for k, turn in enumerate(turns) if turn["role"] == "assistant"]:
            prompt = tokenizer.apply_chat_template(
                turns[:k], add_generation_prompt=True, return_dict=False
            )
            text = tokenizer.apply_chat_template(turns[: k + 1], tokenize=False).rstrip()
            whole = tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            for at in range(len(prompt), len(whole)):
                nats -= float(logits[at - 1, whole[at]])
                count += 1
    cell = results(evaluated)["tasks"]["chat"]["metrics"]["nats_per_token"]["sft"]
    assert cell["value"] == pytest.approx(nats / count, abs=1e-5)


def test_scores_are_those_of_their_libraries(evaluated):
    from math_verify import parse, verify
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu, corpus_chrf

    metrics = results(evaluated)["tasks"]["answers"]["metrics"]
    own = [x for x in lines(evaluated) if x["task"] == "answers" and x["model"] == "sft"]
    said, wanted = [x["answers"][0] for x in own], [x["reference"] for x in own]
    assert metrics["bleu"]["sft"]["value"] == corpus_bleu(said, [wanted]).score
    assert metrics["chrf"]["sft"]["value"] == corpus_chrf(said, [wanted]).score
    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        values = [rouge.score(w, s)[name].fmeasure for s, w in zip(said, wanted, strict=True)]
        assert metrics[name]["sft"]["value"] == pytest.approx(sum(values) / len(values), abs=1e-12)
    exact = sum(s.strip() == w for s, w in zip(said, wanted, strict=True)) / len(own)
    assert metrics["exact_match"]["sft"]["value"] == exact
    metrics = results(evaluated)["tasks"]["sums"]["metrics"]
    own = [x for x in lines(evaluated) if x["task"] == "sums" and x["model"] == "sft"]
    assert [x["reference"] for x in own] == [row["answer"] for row in SUMS]
    right = [
        any(verify(parse(reference), parse(x["answers"][0])) for reference in row["answer"])
        for x, row in zip(own, SUMS, strict=True)
    ]
    assert metrics["math_verify"]["sft"]["value"] == sum(right) / len(SUMS)


HARNESS = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
"""


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """A folder with one task of lm-evaluation-harness; the same items as JSON lines."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": c["question"], "choices": c["choices"], "answer": 0} for c in CHOICES[:2]]
    rows += [{"question": "The sky is", "choices": ["a fish", "blue"], "answer": 1}]
    jsonl(tmp_path / "rows.jsonl", rows)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "tiny_choice.yaml").write_text(HARNESS.format(rows=tmp_path / "rows.jsonl"))
    return folder


@pytest.mark.parametrize("template", ["none", "auto"])
@pytest.mark.filterwarnings("ignore")  # lm-evaluation-harness's own, about everything it imports
def test_harness_and_choice_are_what_the_harness_itself_says(run, harness, template, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    name = f"harness-{template}"
    tasks = [
        {"task": "harness", "tasks": ["tiny_choice"], "folder": str(harness), "template": template},
        {
            "task": "choice",
            "data": [{"path": str(harness.parent / "rows.jsonl")}],
            "template": template,
        },
    ]
    artifact = life.command(write(run, tasks, name=name))
    found = results(artifact)["tasks"]
    model = f"pretrained={artifact.run / 'sft' / 'model'},dtype=float32"
    manager = TaskManager(include_path=str(harness), include_defaults=False)
    itself = simple_evaluate(
        "hf",
        model_args=model,
        tasks=["tiny_choice"],
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
        task_manager=manager,
        apply_chat_template=template == "auto",
    )
    for metric in ("acc", "acc_norm"):
        value = itself["results"]["tiny_choice"][f"{metric},none"]
        assert found["harness"]["metrics"][metric]["sft"]["value"] == value
        assert found["harness"]["metrics"][metric]["sft"]["n"] == 3
        assert found["choice"]["metrics"][metric]["sft"]["value"] == value
    sums = [[pair[0][0] for pair in sample["resps"]] for sample in itself["samples"]["tiny_choice"]]
    own = [x["log_probs"] for x in lines(artifact) if x["task"] == "choice" and x["model"] == "sft"]
    for ours, theirs in zip(own, sums, strict=True):
        assert ours == pytest.approx([float(value) for value in theirs], abs=1e-4)


def test_answers_do_not_depend_on_the_batch(run, tmp_path):
    tasks = [{"task": "generate", "data": ROWS, "score": ["exact_match"], "max_new_tokens": 12}]
    said = {}
    for size in (1, 7, 32):
        artifact = life.command(
            write(run, tasks, name=f"batch-{size}", launch={"threads": 1, "batch_size": size})
        )
        said[size] = [(x["model"], x["item"], x["answers"]) for x in lines(artifact)]
    assert said[1] == said[7] == said[32] and len(said[1]) == 144


def test_answers_are_those_of_a_gpu(run, monkeypatch):
    """With the steps that a GPU records, kept from batch to batch, given back for other lengths and
    other models."""
    from llmpipe.models.drawing import replay as replays

    tasks = [
        {
            "name": name,
            "task": "generate",
            "data": ROWS,
            "score": ["exact_match"],
            "max_new_tokens": n,
        }
        for name, n in (("short", 5), ("long", 12))
    ]
    said, released = {}, []
    for how, devices in (("one by one", set()), ("recorded", {"cpu", "cuda"})):
        monkeypatch.setattr(replays, "DEVICES", devices)
        monkeypatch.setattr(replays.Replay, "release", lambda self: released.append(self.steps))
        small = {"threads": 1, "batch_size": 32}
        artifact = life.command(write(run, tasks, name=f"draws-{len(devices)}", launch=small))
        said[how] = [(x["model"], x["task"], x["item"], x["answers"]) for x in lines(artifact)]
    assert said["one by one"] == said["recorded"] and len(said["recorded"]) == 288
    assert len(released) == 4 and all(released), "two lengths, two models"


def test_a_model_compared_with_itself_does_not_differ(run):
    tasks = [
        {"task": "generate", "data": ROWS, "score": ["exact_match", "chrf"], "max_new_tokens": 4},
        {"task": "perplexity", "data": ROWS},
    ]
    artifact = life.command(
        write(run, tasks, {"one": "artifact:sft", "two": "artifact:sft"}, name="itself")
    )
    for task in results(artifact)["tasks"].values():
        for metric, cells in task["differences"].items():
            value, low, high = (cells["two - one"][name] for name in ("value", "low", "high"))
            if metric == "exact_match":  # 72 items leave room for a difference of the shares
                assert value == 0 and low == -high and 0 < high < 0.06
            else:
                assert (value, low, high) == (0, 0, 0)


def test_sampled_answers_are_drawn_from_the_seed(run):
    task = {
        "task": "generate",
        "data": [*ROWS],
        "score": ["exact_match"],
        "max_new_tokens": 6,
        "temperature": 1.0,
        "samples": 4,
        "pass_at": [1, 2, 4],
    }
    task["data"] = [{**ROWS[0], "limit": 8}]
    made = [
        life.command(write(run, [task], {"sft": "artifact:sft"}, name=f"drawn-{i}", seed=seed))
        for i, seed in enumerate((1, 1, 2))
    ]
    assert_known_ahead(made[0], "model")
    first, again, other = ([x["answers"] for x in lines(artifact)] for artifact in made)
    assert first == again != other
    values = [
        results(made[0])["tasks"]["generate"]["metrics"][f"exact_match@{k}"]["sft"]["value"]
        for k in (1, 2, 4)
    ]
    assert values == sorted(values)


def test_bf16_measures_the_model_that_bf16_loads(run):
    """Weights in bf16, positions in fp32, as `from_pretrained(dtype=bf16)` has it."""
    import torch
    from transformers import AutoModelForCausalLM

    tasks = [
        {
            "name": "text",
            "task": "perplexity",
            "data": jsonl(run.parent / "texts.jsonl", [{"text": t} for t in TEXTS]),
        }
    ]
    artifact = life.command(
        write(run, tasks, {"sft": "artifact:sft"}, name="bf16", precision="bf16")
    )
    model = AutoModelForCausalLM.from_pretrained(run / "sft" / "model", dtype=torch.bfloat16)
    assert results(artifact)["models"]["sft"]["dtype"] == "bfloat16"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "sft" / "model")
    own = next(x for x in lines(artifact) if x["item"] == 1)
    ids = torch.tensor(
        [[tokenizer.eos_token_id, *tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"]]]
    )
    with torch.no_grad():
        log_probs = model(ids).logits[0, :-1].float().log_softmax(-1)
    nats = -float(log_probs.gather(1, ids[0, 1:, None]).sum())
    assert own["scores"]["nats_per_token"][0] == pytest.approx(
        nats, rel=2e-2
    )  # padded in a batch of three
    with pytest.raises(UserError, match="begun with other settings"):
        (artifact.path / "manifest.json").unlink()
        write_plan(artifact)
        life.command(
            write(
                run,
                tasks,
                {"sft": "artifact:sft"},
                name="bf16",
                precision="bf16",
                launch={"threads": 1, "batch_size": 3},
            )
        )


def write_plan(artifact):
    """plan.json as it was before the artifact was finished."""
    from llmpipe.run.plan import plan_of

    recipe = load(artifact.run.parent / f"{artifact.name}.yaml", schema("eval"))
    plan_of(recipe, artifact.run, ("model",)).write(artifact.path)


def test_nan_passes_no_gate(run, tasks, monkeypatch):
    import shutil as files

    import torch
    from safetensors.torch import load_file, save_file

    broken = run.parent / "broken"
    files.copytree(life.TINY / "model", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as stopped:
        life.command(
            write(
                run,
                [tasks[1]],
                {"broken": str(broken)},
                name="nan",
                gate={"perplexity": {"max": 1e9}},
            )
        )
    assert stopped.value.code == 4 and "log-probability is not finite" in stopped.value.message


def test_overlap_with_the_training_rows_is_counted(evaluated):
    trained = Artifact(evaluated.run / "sft").manifest().data.rows.train
    found = results(evaluated)["tasks"]
    assert found["answers"]["overlap"] == {"sft": trained} and trained == 65
    assert found["text"]["overlap"] == {"sft": 0}


@pytest.mark.parametrize("gate", [{}, {"min": None}, {"max": 10**400}])
def test_a_gate_that_asks_nothing_is_no_gate(run, tasks, gate):
    with pytest.raises(UserError) as refused:
        life.command(write(run, tasks, name="no-gate", gate={"perplexity": gate}))
    assert refused.value.code == 2 and "gate" in str(refused.value)


def test_the_gate(evaluated, run, tasks, capsys):
    gates = {
        "answers.exact_match": {"min": 0.99},
        "chat.perplexity": {"max_ratio_to_parent": 0.001},
    }
    with pytest.raises(UserError) as stopped:
        life.command(write(run, tasks, gate=gates))
    assert stopped.value.code == 4
    assert "gate: answers.exact_match of sft is" in stopped.value.message
    assert "not at most 0.001 x base's" in stopped.value.message
    for gate, word in (
        ({"exact_mach": {"min": 0}}, "did you mean"),
        ({"perplexity": {"max": 1}}, "several tasks"),
    ):
        with pytest.raises(UserError) as stopped:
            life.command(write(run, tasks, gate=gate))
        assert stopped.value.code == 2 and word in str(stopped.value)
    capsys.readouterr()
    life.command(write(run, tasks, gate={"exact_match": {"min": 0.1, "max": 1.0}}))
    assert "gate: sft passes" in capsys.readouterr().out
    assert evaluated.verify(), "a gate changes nothing"


def test_a_killed_evaluation_ends_as_an_unbroken_one(run, tasks, evaluated, tmp_path):
    for name in ("sft",):
        shutil.copytree(run / name, tmp_path / "run" / name)
    shutil.copytree(run / ".prepared", tmp_path / "run" / ".prepared")
    path = write(tmp_path / "run", tasks)
    for hook in ("kill_after_three_batches", "kill_inside_a_line"):
        trial = life.Trial(path, hook=hook)
        assert trial.wait() == -9, trial.text()
    trial = life.Trial(path, hook="count_batches")
    assert trial.wait() == 0, trial.text()
    again = Artifact(tmp_path / "run" / "eval")
    for name in ("results.json", "samples.jsonl"):
        assert (again.path / name).read_text() == (evaluated.path / name).read_text()
    batches = int(trial.text().rpartition("batches scored: ")[2].split()[0])
    assert batches == 2 * (1 + 9 + 9 + 1 + 1 + 1) - 3 - 1, "only what was missing is scored"


def shared(run, folder):
    """A copy of a run, for an evaluation of its own."""
    for name in ("sft", ".prepared"):
        shutil.copytree(run / name, folder / "run" / name)
    return folder / "run"


TWO = {"threads": 1, "batch_size": 8, "processes": 2}


def test_two_processes_measure_what_one_does(run, tasks, evaluated, tmp_path):
    trial = life.Trial(write(shared(run, tmp_path), tasks, launch=TWO))
    assert trial.wait() == 0, trial.text()
    again = Artifact(tmp_path / "run" / "eval")
    assert set(again.verify().files) == set(evaluated.verify().files)
    for name in ("results.json", "samples.jsonl"):
        assert (again.path / name).read_text() == (evaluated.path / name).read_text()


@pytest.mark.faults
def test_one_process_goes_on_from_what_two_have_scored(run, tasks, evaluated, tmp_path):
    copy = shared(run, tmp_path)
    trial = life.Trial(write(copy, tasks, launch=TWO), hook="kill_after_three_batches")
    assert trial.wait() not in (0, 1), trial.text()
    assert "Traceback" not in trial.text()
    trial = life.Trial(write(copy, tasks), hook="count_batches")
    assert trial.wait() == 0, trial.text()
    for name in ("results.json", "samples.jsonl"):
        text = (copy / "eval" / name).read_text()
        assert text == (evaluated.path / name).read_text()
    batches = int(trial.text().rpartition("batches scored: ")[2].split()[0])
    assert batches < 2 * (1 + 9 + 9 + 1 + 1 + 1)


@pytest.mark.faults
def test_an_item_that_one_of_two_processes_refuses_ends_both(run, tmp_path):
    """By its row, and not by the other process that waits."""
    rows = [{"prompt": "a" * size, "completion": "b"} for size in (40, 9000, 30)]
    task = {"task": "perplexity", "data": jsonl(tmp_path / "rows.jsonl", rows), "window": 10000}
    path = write(shared(run, tmp_path), [task], launch=TWO | {"batch_size": 1})
    trial = life.Trial(path)
    assert trial.wait() == 2, trial.text()
    assert "Traceback" not in trial.text() and "the model takes" in trial.text()


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (
            "choice",
            [{"question": "?", "choices": ["a", "b"], "answer": 5}],
            "1: bad answer: '5' is none of the 2",
        ),
        ("choice", [{"question": "?", "choices": ["a"], "answer": 0}], "1: wrong type"),
        ("generate", [{"prompt": "a"}, {"prompt": ""}], "2: empty text: prompt"),
        (
            "perplexity",
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            "format preference does not fit perplexity",
        ),
        (
            "preference",
            [{"prompt": "a", "chosen": "b", "rejected": "b"}],
            "1: chosen equals rejected",
        ),
        ("exact", [{"prompt": "a"}], "1: no reference"),
        (
            "perplexity",
            [{"prompt": "a", "completion": "b"}, {"text": "x"}],
            "2: missing column: prompt",
        ),
    ],
)
def test_a_bad_item_is_named(run, tmp_path, task, rows, message):
    values = {
        "task": task.replace("exact", "generate"),
        "data": jsonl(tmp_path / "rows.jsonl", rows),
    }
    values |= (
        {"score": ["exact_match" if task == "exact" else "json"]}
        if task in ("generate", "exact")
        else {}
    )
    with pytest.raises(UserError) as refused:
        life.command(write(run, [values], name="bad"))
    assert refused.value.code == 2 and message in refused.value.message


def test_a_typo_in_a_task_gives_the_near_name_and_the_line(tmp_path):

    text = (
        "stage: eval\nrun: r\nmodels: {a: ./x}\ntasks:\n- task: perplexity\n"
        "  data: [{path: ./x.jsonl}]\n  strid: 3\n"
        "- task: genrate\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        load(tmp_path / "r.yaml", schema("eval"))
    found = str(refused.value).replace(f"{tmp_path}/", "")
    assert "r.yaml:7: tasks.0.strid: unknown key; did you mean 'stride'?" in found
    assert (
        "'genrate' is not one of" in found
        and "did you mean 'generate'?" in found
        and "r.yaml:8" in found
    )


# --- reward models --------------------------------------------------------------------------------
# --------------------


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """A tiny reward model with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("reward") / "model"
    tokenizer = AutoTokenizer.from_pretrained(life.TINY / "model")
    config = AutoConfig.from_pretrained(
        life.TINY / "model", num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_ranks(run, rewards, tmp_path):
    """Beside policies, each with its own metrics; its scores are those of plain transformers."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    models = {"base": str(life.TINY / "model"), "sft": "artifact:sft", "rm": str(rewards)}
    turns = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    pairs = [
        {name: [{"role": role, "content": pair[name]}] for name, role in turns.items()}
        for pair in PAIRS
    ]
    with_thought = json.loads(json.dumps(pairs))
    answer = with_thought[0]["chosen"][0]
    answer["content"] = f"<think>so</think>{answer['content']}"  # which a judge does not see
    tasks = [{"task": "preference", "data": jsonl(tmp_path / "pairs.jsonl", with_thought)}]
    artifact = life.command(write(run, tasks, models, name="ranked"))
    found = results(artifact)["tasks"]
    assert list(found["preference"]["metrics"]["accuracy"]) == ["rm"]
    assert list(found["preference"]["metrics"]["accuracy_sum"]) == ["base", "sft"]
    assert_known_ahead(artifact, "model", "reward-model")
    model = AutoModelForSequenceClassification.from_pretrained(rewards)
    tokenizer = AutoTokenizer.from_pretrained(rewards)
    ranked = [x for x in lines(artifact) if x["model"] == "rm"]
    assert len(ranked) == len(pairs) and "<think>" not in ranked[0]["chosen"]
    assert "<think>so" in next(x for x in lines(artifact) if x["model"] == "sft")["chosen"]
    for line, pair in zip(ranked, pairs, strict=True):
        for side, value in zip(("chosen", "rejected"), line["values"]["accuracy"], strict=True):
            ids = tokenizer.apply_chat_template(pair["prompt"] + pair[side], return_dict=False)
            while (
                ids[-1] != tokenizer.eos_token_id
            ):  # the template's line break behind the last turn is not scored
                ids.pop()
            with torch.no_grad():
                assert float(model(torch.tensor([ids])).logits[0, 0]) == pytest.approx(
                    value, abs=1e-5
                )


def test_a_frozen_head_gets_whole_rows():
    """A slice would make PyTorch's CPU matmul copy the frozen weight once per row."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmpipe.evaluation.candidate import Candidate
    from llmpipe.evaluation.task import Marked
    from llmpipe.models.drawing.draw import Sampling
    from llmpipe.models.generate import generate

    model, tokenizer = (
        kind.from_pretrained(life.TINY / "model") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    model.requires_grad_(False)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _, given, out: seen.append(given[0]))
    made = Candidate("it", life.TINY / "model", model, tokenizer, False, {}, 4, print)
    made.log_probs([Marked.after([5, 6, 7, 8, 9, 10], 4), Marked.after([5, 6, 7], 2)])
    generate(model, tokenizer, [[5, 6], [7]], Sampling(3))
    assert len(seen) > 1 and all(len(rows) == 2 and rows.is_contiguous() for rows in seen)
    assert seen[0].shape[1] == 3, "no more than what is scored, and one before"
