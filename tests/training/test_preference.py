"""Reward models and DPO: TRL's losses however a step is cut, the parent as reference, every pair
accounted for."""

import json
import math
import shutil
import signal

import pytest

from llmpipe.errors import UserError
from llmpipe.recipe.check import load
from llmpipe.run.artifact import Artifact
from llmpipe.stages import schema
from tests import life, store

PAIRS = life.TINY / "pairs.jsonl"
STEPS = 10
HOW = {
    "full": {},
    "lora": {"adapter": {"rank": 4, "alpha": 8}},
    "qlora": {
        "adapter": {"rank": 4, "alpha": 8},
        "quantization": {"bits": 4},
        "optim__precision": "bf16",
    },
}


def write(run, stage, **changes):
    values = {
        "stage": stage,
        "run": str(run),
        "model": str(life.TINY / "model"),
        "data": {"train": [{"path": str(PAIRS)}], "eval": {"holdout": 0.1}, "max_length": 64},
        "optim": {"learning_rate": 2e-3, "batch_size": 4, "steps": 12, "precision": "fp32"},
        "evaluation": {"every": 5},
        "checkpoint": {"every": 3},
        "log": {"every": 2},
        "launch": {"processes": 1, "threads": 1, "micro_batch_size": 2},
    }
    life.put(values, changes)
    path = run.parent / f"{run.name}-{values.get('name', stage)}.yaml"
    path.write_text(json.dumps(values))
    return path


def metrics(artifact):
    return [json.loads(line) for line in (artifact.path / "metrics.jsonl").read_text().splitlines()]


def losses(artifact):
    return [line["loss"] for line in metrics(artifact) if "loss" in line]


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A run with what preferences start from: sft, an adapter on it, merged as well, and one on
    4 bits."""
    run = tmp_path_factory.mktemp("parents") / "run"
    quick = {"optim__steps": 4, "evaluation": {}}
    store.made(life.write(run, optim__steps=8, optim__learning_rate=5e-3, evaluation={}))
    adapter = {"adapter": {"rank": 4, "alpha": 8, "merge": True}, "optim__learning_rate": 2e-2}
    store.made(life.write(run, stage="lora", name="lora", model="artifact:sft", **adapter, **quick))
    four = {
        "quantization": {"bits": 4},
        "optim__precision": "bf16",
        "name": "qlora",
        "stage": "qlora",
    }
    store.made(life.write(run, model="artifact:sft", **four, **adapter, **quick))
    adapter = {"adapter": {"rank": 4, "alpha": 8, "dropout": 0.5}, "optim__learning_rate": 2e-2}
    store.made(
        life.write(run, stage="lora", name="dropped", model="artifact:sft", **adapter, **quick)
    )
    return run


# --- rows -----------------------------------------------------------------------------------------
# -------------------


def prepared(tmp_path, rows, **changes):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "data__train": [{"path": str(tmp_path / "rows.jsonl")}],
        "data__eval": {},
        "optim__steps": 1,
        **changes,
    }
    return life.command(write(tmp_path / "run", "dpo", evaluation={}, **changes))


def table(artifact):
    from datasets import Dataset

    (folder,) = {p.parent for p in (artifact.run / ".prepared").glob("*/train.arrow")}
    return Dataset.from_file(str(folder / "train.arrow")).to_list()


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def test_every_form_of_a_preference_gives_the_same_tokens(tmp_path):
    """Explicit and implicit prompts, dicts, ShareGPT turns, a system turn of its own: TRL's
    split, our end of turn."""
    from transformers import AutoTokenizer

    ask, good, bad = user("Is grass green?"), assistant("Yes."), assistant("No, it is a fish.")
    turns, says = (
        {"from": "human", "value": "Is grass green?"},
        lambda text: {"from": "gpt", "value": text},
    )
    forms = [
        {"prompt": ask, "chosen": good, "rejected": bad},
        {"chosen": ask + good, "rejected": ask + bad},
        {"conversations": [turns], "chosen": says("Yes."), "rejected": says(bad[0]["content"])},
    ]
    made = []
    for i, form in enumerate(forms):
        (tmp_path / str(i)).mkdir()
        made += table(prepared(tmp_path / str(i), [form] * 4))[:1]
    assert made[0] == made[1] == made[2]
    tokenizer = AutoTokenizer.from_pretrained(life.TINY / "model")
    asked = tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_dict=False)
    assert made[0]["prompt_ids"] == asked
    end = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert made[0]["chosen_ids"] == tokenizer("Yes.", add_special_tokens=False)["input_ids"] + end
    assert made[0]["rejected_ids"][-1:] == end and made[0]["margin"] == 0


def test_what_others_say_in_an_answer_is_read_and_not_learned():
    """The mask that a loss is made of holds the assistant's tokens alone."""
    from llmpipe.training import judged, policy

    pair = {"prompt_ids": [1, 2], "margin": 0.0, "rejected_ids": [3], "rejected_context": []}
    pair |= {"chosen_ids": [4, 5, 6, 7], "chosen_context": [1, 2]}
    batch = policy.Collator(0)([pair])
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    row = {"prompt_ids": [1, 2], "label": 1, "completion_ids": [3, 4], "completion_context": [0]}
    row |= {"KL_completion_ids": [5, 6, 7], "KL_completion_context": [1, 2]}
    batch = judged.Collator(0, max_length=4)([row])
    assert batch["completion_mask"].tolist() == [[0, 0, 0, 1]]
    assert batch["KL_completion_mask"].tolist() == [[0, 0, 1, 0]]  # cut where max_length ends


def test_a_reward_model_is_the_same_whatever_was_thought(tmp_path, capsys):
    """`ppo` and `grpo` do not show it thoughts, so it learns from none."""
    bare = [json.loads(line) for line in PAIRS.read_text().splitlines()[:24]]
    thoughts = json.loads(json.dumps(bare))
    for i, pair in enumerate(thoughts):
        turn = pair["chosen" if i % 2 else "rejected"][0]
        turn["content"] = f"<think>\nso {i}\n</think>\n\n{turn['content']}"
    made = []
    for name, rows in (("bare", bare), ("thoughts", thoughts)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        short = {"data__train": [{"path": str(path)}], "optim__steps": 2, "log__every": 1}
        made.append(life.command(write(tmp_path / name, "reward", **short, evaluation={})))
    assert losses(made[0]) == losses(made[1]) and len(losses(made[0])) == 2
    assert "thoughts in front of answers are left out" in capsys.readouterr().out
    model = made[0].manifest().files["model/model.safetensors"].sha256
    assert made[1].manifest().files["model/model.safetensors"].sha256 == model


def test_pairs_that_teach_nothing_are_named(tmp_path):
    long = "word " * 80
    rows = [
        {"prompt": user("a"), "chosen": assistant("x"), "rejected": assistant("y")},
        {"prompt": user("a"), "chosen": assistant("x"), "rejected": assistant("x")},
        {"prompt": user("a"), "chosen": assistant(long + "x"), "rejected": assistant(long + "y")},
        {"prompt": user(long), "chosen": assistant("x"), "rejected": assistant("y")},
        {"prompt": user("a"), "chosen": assistant(long), "rejected": assistant("y")},
        {
            "prompt": user("a"),
            "chosen": assistant("x"),
            "rejected": assistant("y"),
            "margin": "much",
        },
        {"prompt": user("a"), "chosen": assistant("x"), "rejected": user("y")},
    ] + [
        {
            "prompt": user(f"b{i}"),
            "chosen": assistant("x"),
            "rejected": assistant("y"),
            "margin": 0.5,
        }
        for i in range(5)
    ]
    artifact = prepared(tmp_path, rows, data__max_rejected=0.9)
    found = [
        json.loads(line) for line in (artifact.path / "rejected.jsonl").read_text().splitlines()
    ]
    assert [(line["row"], line["reason"]) for line in found] == [
        (2, "chosen equals rejected"),
        (3, "cut to the same text"),
        (4, "too long"),
        (6, "wrong type"),
        (7, "no assistant turn"),
    ]
    counts = artifact.manifest().data.rows
    assert counts.read == 12 == counts.kept + counts.rejected and counts.truncated == 1
    made = table(artifact)
    assert [row["margin"] for row in made] == [0, 0, *[0.5] * 5]
    assert len(made[1]["prompt_ids"]) + len(made[1]["chosen_ids"]) == 64


GOOD = {"prompt": user("a"), "chosen": assistant("x"), "rejected": assistant("y")}
BROKEN = {  # a line, and why it is rejected
    "bad JSON": ('{"prompt": nonsense}', "bad JSON"),
    "cut line": (json.dumps(GOOD)[:50], "bad JSON"),
    "latin-1": (
        json.dumps(GOOD).replace('"x"', '"@"').encode().replace(b"@", b"\xf6"),
        "not UTF-8",
    ),
    "NUL": (json.dumps(GOOD | {"chosen": assistant("x\0y")}), "NUL character"),
    "half a surrogate pair": (json.dumps(GOOD | {"chosen": assistant("\ud83d")}), "broken Unicode"),
    "a list": ("[1, 2]", "not an object"),
    "missing key": (json.dumps({"prompt": user("a"), "chosen": assistant("x")}), "missing column"),
    "null": (json.dumps(GOOD | {"rejected": None}), "null"),
    "type change": (json.dumps(GOOD | {"rejected": 7}), "wrong type"),
    "type of a message": (json.dumps(GOOD | {"chosen": ["x"]}), "wrong type"),
    "no messages": (json.dumps(GOOD | {"chosen": []}), "no messages"),
    "empty text": (json.dumps(GOOD | {"chosen": assistant("  ")}), "empty message"),
    "unknown role": (
        json.dumps(GOOD | {"chosen": [{"role": "narrator", "content": "x"}]}),
        "unknown role",
    ),
    "no assistant turn": (json.dumps(GOOD | {"chosen": user("x")}), "no assistant turn"),
    "a system turn in an answer": (
        json.dumps(GOOD | {"chosen": [{"role": "system", "content": "s"}, *assistant("x")]}),
        "system turn not first",
    ),
    "a user turn in an answer": (
        json.dumps(GOOD | {"chosen": user("b") + assistant("x")}),
        "no common prompt",
    ),
    "chosen == rejected": (
        json.dumps(GOOD | {"rejected": assistant("x")}),
        "chosen equals rejected",
    ),
    "too long": (json.dumps(GOOD | {"prompt": user("word " * 80)}), "too long"),
    "bad tools": (json.dumps(GOOD | {"tools": "{"}), "bad tools"),
    "an image": (
        json.dumps(
            GOOD | {"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}
        ),
        "unsupported content",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_pair_is_named(tmp_path, kind):
    """R7: by file and row, with the reason; reward and dpo read pairs alike."""
    line, reason = BROKEN[kind]
    good = [json.dumps(GOOD | {"prompt": user(letter), "tools": None}).encode() for letter in "bcd"]
    line = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join([*good[:2], line, good[2], b""]))
    changes = {
        "data": {"train": [{"path": str(path)}], "max_length": 64},
        "optim__steps": 1,
        "evaluation": {},
    }
    with pytest.raises(UserError, match=rf"pairs\.jsonl:3: {reason}") as refused:
        life.command(write(tmp_path / "run", "reward", **changes))
    assert refused.value.code == 2


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_other_formats_are_refused(tmp_path, stage):
    with pytest.raises(UserError, match="has no chosen and rejected answers"):
        life.command(
            write(tmp_path / "run", stage, data__train=[{"path": str(life.TINY / "rows.jsonl")}])
        )


# --- the same as TRL, however a step is cut
# --------------------------------------------------------------------------


def bare_trl(folder, stage):
    process = life.forked(_bare_trl, str(folder), stage)
    process.join(120)
    return json.loads((folder / f"{stage}.json").read_text())


def _bare_trl(folder, stage):
    """TRL as its documentation has it, on the conversations themselves: it renders, tokenizes
    and batches."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    how = {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,  # whose first step would learn nothing
        "max_steps": STEPS,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "seed": 42,
        "data_seed": 42,
        "gradient_checkpointing": False,
        "max_length": None,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    tokenizer = AutoTokenizer.from_pretrained(life.TINY / "model")
    # the newline behind the end of a turn is no part of llmpipe's answers
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "'<|im_end|>' + '\\n'", "'<|im_end|>' + ('' if loop.last else '\\n')"
    )
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ '<|im_start|>assistant", "{{ '\\n<|im_start|>assistant"
    )
    rows = load_dataset("json", data_files=f"{folder}/pairs.jsonl", split="train")
    if stage == "reward":
        torch.manual_seed(42)
        made = RewardTrainer(
            folder + "/start", RewardConfig(**how), train_dataset=rows, processing_class=tokenizer
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(life.TINY / "model", dtype=torch.float32)
        made = DPOTrainer(
            model, args=DPOConfig(**how), train_dataset=rows, processing_class=tokenizer
        )
    made.train()
    with open(f"{folder}/{stage}.json", "w") as file:
        json.dump([line["loss"] for line in made.state.log_history if "loss" in line], file)


def _is_one(answer):
    return len(answer) == 1


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_losses_equal_bare_trl(tmp_path, stage):
    from transformers import AutoTokenizer

    from llmpipe.models.pretrained import load_model

    settings = {"data__eval": {}, "evaluation": {}, "optim__steps": STEPS, "log__every": 1}
    settings |= {"optim__warmup": 0, "launch__micro_batch_size": 4}
    # of answers with several turns, TRL learns what the user says between them, too
    lines = PAIRS.read_text().splitlines(keepends=True)
    answers = [(json.loads(line)["chosen"], json.loads(line)["rejected"]) for line in lines]
    single = [line for line, both in zip(lines, answers, strict=True) if all(map(_is_one, both))]
    assert len(single) >= 4 * STEPS
    (tmp_path / "pairs.jsonl").write_text("".join(single))
    settings["data__train"] = [{"path": str(tmp_path / "pairs.jsonl")}]
    mine = life.command(write(tmp_path / "run", stage, **settings))
    if stage == "reward":  # the same random head
        import torch

        torch.manual_seed(42)
        start = load_model(life.TINY / "model", scores=True)
        start.config.pad_token_id = 0
        start.save_pretrained(tmp_path / "start")
        AutoTokenizer.from_pretrained(life.TINY / "model").save_pretrained(tmp_path / "start")
    assert losses(mine) == pytest.approx(bare_trl(tmp_path, stage), abs=1e-4)


@pytest.mark.parametrize("stage", [life.by_the_dozen("reward"), "dpo"])
def test_a_step_cut_any_way_is_one_trajectory(tmp_path, stage):
    """8x1 = 4x2 = 3 rows at a time = two processes; the last batch of an epoch is not whole."""
    settings = {"optim__batch_size": 12, "optim__steps": 14, "log__every": 1, "evaluation": {}}
    made = [
        life.command(
            write(tmp_path / f"run{micro}", stage, **settings, launch__micro_batch_size=micro)
        )
        for micro in (12, 4, 1)
    ]
    two = write(tmp_path / "two", stage, **settings, launch__micro_batch_size=3)
    made.append(life.pair(two))
    assert made[0].manifest().data.rows.train % 12
    for artifact in made[1:]:
        assert losses(artifact) == pytest.approx(losses(made[0]), abs=1e-4)
        first, last = (a.manifest().final for a in (made[0], artifact))
        assert last["eval_loss"] == pytest.approx(first["eval_loss"], abs=1e-4)
        assert probed(artifact) == pytest.approx(probed(made[0]), abs=1e-4)


def probed(artifact):
    """A published model's logits, or scores, on some tokens, by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = (
        AutoModelForSequenceClassification
        if artifact.manifest().kind == "reward-model"
        else AutoModelForCausalLM
    )
    with torch.no_grad():
        return (
            kind.from_pretrained(artifact.model)(torch.arange(3, 43)[None])
            .logits.flatten()
            .tolist()
        )


@pytest.mark.parametrize("objective", ["sft", {"sigmoid": 1.0, "sft": 0.2}, "aot"])
def test_objectives_that_depend_on_the_cut_are_refused(tmp_path, objective):
    with pytest.raises(UserError, match="depends on how a step is cut"):
        load(write(tmp_path / "run", "dpo", objective=objective), schema("dpo"))
    whole = {"launch__micro_batch_size": 4, "optim__steps": 1, "evaluation": {}}
    assert life.command(write(tmp_path / "whole", "dpo", objective=objective, **whole)).finished


@pytest.mark.parametrize(
    "objective",
    [
        "robust",
        {"sigmoid": 0.7, "ipo": 0.3},
        *map(life.by_the_dozen, ("ipo", "hinge", "exo_pair", "apo_zero")),
    ],
)
def test_objectives_by_name(tmp_path, objective):
    rate = 5e-3 if objective == "robust" else 1e-3  # ipo is steep here
    changes = {"optim__steps": 30, "optim__learning_rate": rate, "evaluation": {}}
    changes |= {"label_smoothing": 0.1} if objective in ("robust", "exo_pair") else {}
    made = life.command(write(tmp_path / "run", "dpo", objective=objective, **changes))
    lines = [line for line in metrics(made) if "loss" in line]
    assert sum(line["rewards/margins"] for line in lines[-5:]) > 0
    assert sum(line["loss"] for line in lines[-5:]) / 5 < lines[0]["loss"]
    assert all(math.isfinite(line["loss"]) for line in lines)


# --- what is made ---------------------------------------------------------------------------------
# -------------------


@pytest.fixture(scope="module", params=["full", "lora", life.by_the_dozen("qlora")])
def reward(request, tmp_path_factory):
    run = tmp_path_factory.mktemp("reward") / "run"
    rate = {"optim__learning_rate": 5e-3 if request.param == "full" else 2e-2}
    return store.made(
        write(run, "reward", **HOW[request.param], **rate, center=0.01, optim__steps=40)
    )


def plain_scores(folder, base, rows, out):
    """A reward model's scores of tokenized texts by plain transformers and peft; `base`: of one
    that is an adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base or folder, num_labels=1)
    if base:
        model = PeftModel.from_pretrained(model, folder)
    model.eval()
    with torch.no_grad():
        out.write_text(
            json.dumps([float(model(torch.tensor([ids])).logits[0, 0]) for ids in json.loads(rows)])
        )


def test_the_reward_model(reward, tmp_path):
    """Scores in memory, in a plain process and by `eval` are the same; every weight that should
    move did."""
    from transformers import AutoTokenizer

    manifest = reward.verify()
    assert manifest.kind == "reward-model" and manifest.verified["max_logit_difference"] < 1e-5
    ranking = manifest.final["ranking"]
    assert (
        ranking["n"] == 7
        and ranking["held_out"]
        and sum(part["n"] for part in ranking["calibration"]) == 7
    )
    assert ranking["accuracy"] == manifest.final["eval_accuracy"] and ranking["reward_std"] > 0
    assert min(losses(reward)[3:]) < losses(reward)[0], "it learns"
    from llmpipe.report.terminal import show_run

    assert f"ranking    {ranking['accuracy']:.0%} [" in show_run(reward.path)
    # `eval` gives the same scores as the plain process, with the adapter on its base or alone
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()][:5]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [{"task": "preference", "data": [{"path": str(tmp_path / "pairs.jsonl")}]}]
    values = {
        "stage": "eval",
        "run": str(reward.run),
        "models": {"rm": f"artifact:{reward.name}"},
        "tasks": tasks,
    }
    (tmp_path / "eval.yaml").write_text(
        json.dumps(values | {"precision": "fp32", "launch": {"threads": 1}})
    )
    measured = life.command(tmp_path / "eval.yaml")
    lines = [
        json.loads(line) for line in (measured.path / "samples.jsonl").read_text().splitlines()
    ]
    found = [value for line in lines for value in line["values"]["accuracy"]]
    tokenizer, texts = AutoTokenizer.from_pretrained(reward.model), []
    for row in rows:
        for side in ("chosen", "rejected"):
            ids = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False)
            texts.append(
                ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
            )  # to the end of the turn
    base = life.TINY / "model" if (reward.model / "adapter_config.json").exists() else None
    process = life.forked(
        plain_scores, reward.model, base, json.dumps(texts), tmp_path / "plain.json"
    )
    process.join(120)
    assert found == pytest.approx(json.loads((tmp_path / "plain.json").read_text()), abs=1e-4)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        ("dpo", "lora"),
        *(
            life.by_the_dozen(stage, how)
            for stage in ("reward", "dpo")
            for how in HOW
            if (stage, how) != ("dpo", "lora")
        ),
    ],
)
def test_resume_is_bitwise_the_straight_run(tmp_path, stage, how):
    """R1, R5: killed after a checkpoint, then told to stop inside a step and inside a save."""
    whole = life.command(write(tmp_path / "whole", stage, **HOW[how]))
    path = write(tmp_path / "run", stage, **HOW[how])
    for hook, code in (
        ("kill_after_checkpoint_3", -signal.SIGKILL),
        ("term_in_step_5", 143),
        ("term_in_save_9", 143),
    ):
        trial = life.Trial(path, hook=hook)
        assert trial.wait() == code, trial.text()
    assert life.essence(life.command(path)) == life.essence(whole)


@pytest.mark.parametrize("precompute", [False, life.by_the_dozen(True)])
def test_resume_with_the_parents_adapter_as_reference(parents, tmp_path, precompute):
    """The checkpoint holds the reference, too, or its log-probabilities lie beside the rows."""
    shutil.copytree(parents, tmp_path / "run")
    shutil.copytree(parents, tmp_path / "whole")
    changes = {
        "model": "artifact:lora",
        "adapter": {"rank": 4, "alpha": 8},
        "precompute": precompute,
    }
    whole = life.command(write(tmp_path / "whole", "dpo", name="again", **changes))
    path = write(tmp_path / "run", "dpo", name="again", **changes)
    for hook, code in (("kill_after_checkpoint_3", -signal.SIGKILL), ("term_in_step_5", 143)):
        trial = life.Trial(path, hook=hook)
        assert trial.wait() == code, trial.text()
    assert life.essence(life.command(path)) == life.essence(whole)


def test_the_reference_has_the_parents_new_tokens(tmp_path):
    """An adapter with trained rows of the embeddings goes on: its reference has these rows, not
    freshly drawn ones."""
    template = (
        (life.TINY / "model" / "chat_template.jinja")
        .read_text()
        .replace("<|im_start|>", "<|turn|>")
    )
    (tmp_path / "turns.jinja").write_text(template)
    adapter = {"rank": 4, "alpha": 8}
    changes = {
        "data__template": str(tmp_path / "turns.jinja"),
        "adapter": adapter,
        "optim__learning_rate": 5e-2,
    }
    life.command(life.write(tmp_path / "run", stage="lora", evaluation={}, **changes))
    made = life.command(
        write(tmp_path / "run", "dpo", model="artifact:lora", adapter=adapter, optim__steps=2)
    )
    first = metrics(made)[0]
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["eval_log_ratio_per_token"] == pytest.approx(0, abs=1e-5)


# two processes and steps that are not whole are in `test_a_step_cut_any_way`, too
@pytest.mark.faults
def test_two_processes_with_what_does_not_divide(tmp_path):
    """Held-out rounds and last steps in which one process has fewer pairs, with the reference
    computed beforehand."""
    settings = {
        "optim__batch_size": 8,
        "optim__steps": 9,
        "log__every": 1,
        "evaluation": {},
        "precompute": True,
    }
    one = life.command(write(tmp_path / "one", "dpo", **settings, launch__micro_batch_size=8))
    two = life.pair(write(tmp_path / "two", "dpo", **settings, launch__micro_batch_size=4))
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert two.manifest().final["eval_loss"] == pytest.approx(
        one.manifest().final["eval_loss"], abs=1e-4
    )


@pytest.mark.parametrize(
    ("where", "stage"),
    [  # tests/training/test_life.py tries each of them in the loop that all stages share
        ("loss_5", "dpo"),
        ("gradient_12", "reward"),
        *(life.by_the_dozen(where, "dpo") for where in ("loss_1", "gradient_12")),
        *(life.by_the_dozen(where, "reward") for where in ("loss_1", "loss_5")),
    ],
)
def test_nan_stops_before_the_optimizer(tmp_path, stage, where):
    """R13."""
    trial = life.Trial(
        write(tmp_path / "run", stage, data__eval={}, evaluation={}), hook=f"nan_{where}"
    )
    assert trial.wait() == 4, trial.text()
    assert not Artifact(tmp_path / "run" / stage).finished


# start: the parent, what the recipe changes, where the parent lies (a folder, an adapter on it),
# and the untuned model
DROPOUT = {"adapter": {"rank": 4, "alpha": 8, "dropout": 0.5}}
STARTS = {
    "full": ("artifact:sft", {}, ("sft", None), None),
    "new adapter": ("artifact:sft", HOW["lora"], ("sft", None), None),
    "adapter continued": ("artifact:lora", HOW["lora"], ("sft", "lora"), None),
    "adapter merged": ("artifact:lora-merged", {}, ("lora-merged", None), None),
    "adapter, all weights": ("artifact:lora", {}, ("sft", "lora"), None),
    "4 bits continued": ("artifact:qlora", HOW["qlora"], ("sft", "qlora"), None),
    "precomputed": ("artifact:lora", HOW["lora"] | {"precompute": True}, ("sft", "lora"), None),
    "dropout": ("artifact:dropped", DROPOUT, ("sft", "dropped"), None),
    "precomputed, dropout": (
        "artifact:dropped",
        DROPOUT | {"precompute": True},
        ("sft", "dropped"),
        None,
    ),
    "from zero": ("artifact:taught", {}, ("taught", None), "pretrain"),
}


def log_probs(run, rows, parent, untuned, bits, out):
    """Sums of the answers' log-probabilities by plain transformers and peft: of the parent, and
    of the untuned base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def of(folder, adapter=None, **how):
        model = AutoModelForCausalLM.from_pretrained(folder, **how)
        model = PeftModel.from_pretrained(model, run / adapter / "model") if adapter else model
        model.eval()
        sums = []
        for ids, answered in json.loads(rows.read_text()):
            ids = torch.tensor([ids])
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bool(bits)):
                found = (
                    model(ids)
                    .logits[0, :-1]
                    .float()
                    .log_softmax(-1)
                    .gather(1, ids[0, 1:, None])
                    .squeeze(1)
                )
            sums.append(float(found[len(ids[0]) - answered - 1 :].sum()))
        return sums

    how = {"dtype": torch.float32}
    if bits:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    folder, adapter = parent
    out.write_text(
        json.dumps({"parent": of(run / folder / "model", adapter, **how), "untuned": of(untuned)})
    )


TWICE = ("adapter, all weights", "precomputed, dropout")
"""Of which each half is another start."""


@pytest.mark.parametrize(
    "start", [life.by_the_dozen(start) if start in TWICE else start for start in STARTS]
)
def test_the_policy_and_the_reference_begin_as_the_parent(parents, tmp_path, monkeypatch, start):
    """At step 0 the loss is ln 2, and both have the log-probabilities of the parent, pair by
    pair; not the base's."""

    reference, changes, parent, untuned = STARTS[start]
    if start == "from zero":
        tests_of_pretrain = pytest.importorskip("tests.training.test_pretrain")
        (tmp_path / "texts").mkdir()
        for i in range(30):
            (tmp_path / "texts" / f"{i}.txt").write_text(
                f"Question {i}: what is {i} plus one? It is {i + 1}. " * 20
            )
        life.command(tests_of_pretrain.write(parents, tmp_path / "texts"))
        settings = {
            "optim__steps": 8,
            "optim__learning_rate": 5e-3,
            "evaluation": {},
            "data__max_rejected": 1.0,
        }
        life.command(life.write(parents, name="taught", model="artifact:pretrain", **settings))
        changes = changes | {"data__max_rejected": 1.0}
    from trl import DPOTrainer

    rows, policy, held, original = [], [], [], DPOTrainer._compute_loss

    def spied(self, model, inputs, *args):
        if self.state.global_step == 0 and not self.model.training:
            lengths, answered = inputs["attention_mask"].sum(1), inputs["completion_mask"].sum(1)
            rows.extend(
                (ids[:n].tolist(), int(m))
                for ids, n, m in zip(inputs["input_ids"], lengths, answered, strict=True)
            )
            policy.extend(model().log_probs.sum(1).tolist())
            held.extend(
                [*inputs["ref_chosen_logps"].tolist(), *inputs["ref_rejected_logps"].tolist()]
            )
        return original(self, model, inputs, *args)

    monkeypatch.setattr(DPOTrainer, "_compute_loss", spied)
    name = start.replace(" ", "-").replace(",", "")
    made = life.command(
        write(parents, "dpo", name=name, model=reference, optim__steps=6, **changes)
    )
    first, *_, last = [line for line in metrics(made) if "eval_loss" in line]
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert last["eval_rewards/margins"] != 0

    (tmp_path / "rows.json").write_text(json.dumps(rows))
    base, out = (
        parents / untuned / "model" if untuned else life.TINY / "model",
        tmp_path / "plain.json",
    )
    process = life.forked(
        log_probs, parents, tmp_path / "rows.json", parent, base, "quantization" in changes, out
    )
    process.join(120)
    plain = json.loads(out.read_text())
    assert len(rows) == 2 * made.manifest().data.rows.eval
    within = 0.2 if "quantization" in changes else 1e-3  # bf16
    assert policy == pytest.approx(held, abs=1e-4)
    assert policy == pytest.approx(plain["parent"], abs=within)
    assert max(abs(a - b) for a, b in zip(plain["parent"], plain["untuned"], strict=True)) > 0.5


@pytest.mark.parametrize("how", ["full", life.by_the_dozen("lora")])
def test_activation_checkpointing_changes_nothing(tmp_path, how):
    """Bit by bit; TRL turns it off for the reference, and on again."""
    kinds = ("none", "selective", "full")
    made = [
        life.command(
            write(
                tmp_path / kind,
                "dpo",
                **HOW[how],
                optim__steps=3,
                launch__activation_checkpointing=kind,
            )
        )
        for kind in kinds
    ]
    essences = [life.essence(artifact) for artifact in made]
    assert essences[0] == essences[1] == essences[2]
    used = [artifact.manifest().hardware["activation_checkpointing"] for artifact in made]
    assert tuple(used) == kinds


@pytest.mark.parametrize("recomputes", [False, True])
def test_what_a_layer_drops_in_its_own_code_stays_in(tmp_path, recomputes):
    """OPT's layers do; the first loss is ln 2 only where policy and parent say the same."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(life.TINY / "model")
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        dropout=0.5,
        attention_dropout=0.5,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    path = write(
        tmp_path / "run",
        "dpo",
        model=str(tmp_path / "opt"),
        evaluation={},
        log__every=1,
        optim__steps=2,
        launch__activation_checkpointing=recomputes,
    )
    first, _ = losses(life.command(path))
    assert first == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_what_learns_is_fp32(parents, stage):
    """Under bf16 arithmetic too, the head that scores included, so that a small learning rate
    moves all of it."""
    import torch
    from safetensors.torch import load_file

    how = {
        "optim__precision": "bf16",
        "optim__learning_rate": 1e-5,
        "optim__steps": 3,
        "optim__warmup": 0,
    }
    made = life.command(
        write(parents, stage, name=f"{stage}-fp32", model="artifact:sft", **HOW["lora"], **how)
    )
    tensors = load_file(made.model / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    if stage == "reward":
        assert made.manifest().verified["max_logit_difference"] < 1e-5
        begun = torch.tensor(probed_head(parents))
        (head,) = (tensor for name, tensor in tensors.items() if "score" in name)
        assert head.shape == begun.shape and ((head - begun).abs() > 0).float().mean() > 0.95


def probed_head(run):
    """The head that a reward model of seed 42 on this model begins with."""
    import torch

    from llmpipe.models.pretrained import load_model

    torch.manual_seed(42)
    return (
        load_model(run / "sft" / "model", dtype=torch.bfloat16, scores=True)
        .score.weight.float()
        .tolist()
    )


def test_another_template_than_the_parents_is_refused(parents):
    """With both values; the model's folder instead of the artifact says that it is meant."""
    changes = {
        "data__template": "llama3",
        "name": "drift",
        "optim__steps": 1,
        "data__max_rejected": 1.0,
    }
    with pytest.raises(
        UserError, match=r"was trained with [0-9a-f]{12}, and here it is [0-9a-f]{12}"
    ) as refused:
        life.command(write(parents, "dpo", model="artifact:sft", **changes))
    assert refused.value.code == 3
    shutil.rmtree(parents / "drift")
    life.command(write(parents, "dpo", model=str(parents / "sft" / "model"), **changes))


@pytest.mark.parametrize(("rate", "warns"), [(1e-1, True), (1e-4, False)])
def test_a_collapse_is_said(parents, rate, warns):
    changes = {
        "name": f"rate-{rate}",
        "model": "artifact:sft",
        "optim__learning_rate": rate,
        "optim__steps": 20,
    }
    made = life.command(write(parents, "dpo", **changes))
    assert (
        "the log-probability of chosen answers fell" in (made.path / "log.txt").read_text()
    ) == warns


def test_a_checkpoint_is_of_a_kind_too(parents):
    life.command(
        write(parents, "reward", name="ranks", model="artifact:sft", optim__steps=3, evaluation={})
    )
    for reference, words in {
        "ranks@3": "is of kind 'reward-model'",
        "lora@4": "is a checkpoint of an adapter",
    }.items():
        with pytest.raises(UserError, match=words) as refused:
            life.command(write(parents, "reward", name="refused", model=f"artifact:{reference}"))
        assert refused.value.code == 3


def test_a_column_of_system_turns_makes_every_row_a_conversation(tmp_path):
    """Also where it is empty; and an answer never begins with the user."""
    rows = [
        {"system": s, "question": f"Is {s or 'it'} so?", "chosen": "Yes.", "rejected": "No."}
        for s in ("Be brief.", "")
    ]
    rows.append(
        {
            "prompt": user("Hello "),
            "chosen": user("Hello") + assistant("Hi."),
            "rejected": user("Hello") + assistant("No."),
        }
    )
    for i, part in enumerate((rows[:2] * 2, rows[2:] * 3)):
        (tmp_path / str(i)).mkdir()
        if i:
            with pytest.raises(UserError, match="no common prompt"):
                prepared(tmp_path / str(i), part)
        else:
            made = table(prepared(tmp_path / str(i), part))
            assert all(row["prompt_ids"][0] == made[0]["prompt_ids"][0] for row in made), (
                "both in the template"
            )


def test_lineage(parents):
    """Manifests name the true base, and `show` the parents."""
    from llmpipe.report.terminal import show_run

    life.command(
        write(
            parents,
            "dpo",
            name="on",
            model="artifact:lora",
            adapter={"rank": 4, "alpha": 8},
            optim__steps=1,
        )
    )
    manifest = Artifact(parents / "on").verify()
    assert manifest.kind == "adapter" and manifest.base.reference == "artifact:sft"
    assert [parent.name for parent in manifest.parents] == ["lora"]
    assert "from       lora" in show_run(parents / "on")


def test_recipes(tmp_path):
    for changes, message in [
        ({"objective": "sigmoyd"}, "sigmoid"),
        ({"adapter": {"rank": 4, "init": "pissa"}}, "which is the reference"),
        ({"trainer": {"beta": 0.3}}, "use beta"),
        ({"label_smoothing": 0.7}, "less than 0.5"),
        ({"label_smoothing": 0.1}, "sigmoid does not read it"),
        ({"objective": "exo_pair"}, "needs label_smoothing"),
        ({"objective": "robust"}, "needs label_smoothing"),
        ({"objective": {"sigmoid": 0.0}}, "greater than 0"),
        ({"trainer": {"ref_model_mixup_alpha": 0.5}}, "llmpipe sets this itself"),
        ({"trainer": {"ld_alpha": 0.5}}, "llmpipe sets this itself"),
    ]:
        with pytest.raises(UserError) as refused:
            load(write(tmp_path / "run", "dpo", **changes), schema("dpo"))
        assert message in str(refused.value)
    with pytest.raises(UserError, match="samples: unknown key"):
        load(write(tmp_path / "run", "reward", samples={"prompts": ["x"]}), schema("reward"))
