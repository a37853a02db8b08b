"""KTO: the paper's loss, TRL's numbers, one trajectory however a step is cut, every row
accounted for."""

import csv
import json
import signal

import numpy as np
import pytest
import torch

from llmpipe.data.kinds.labels import BAD, GOOD, mismatched
from llmpipe.errors import UserError
from llmpipe.recipe.check import load
from llmpipe.run.artifact import Artifact
from llmpipe.stages import schema
from tests import life, store
from tests.training.test_preference import PAIRS, losses, metrics, probed, write

ADAPTER = {"adapter": {"rank": 4, "alpha": 8}}
TURNS = [{"role": "user", "content": "What colour is grass?"}]
ANSWER = [{"role": "assistant", "content": "Green."}]


def rows_file(folder, rows):
    path = folder / "judged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": [{"path": str(path)}], "max_length": 64, "eval": {}}


def judged(count=24):
    """The first half of the tiny pairs' answers, good and bad in turn, each for itself."""
    rows = []
    for i, line in enumerate(PAIRS.read_text().splitlines()[:count]):
        pair = json.loads(line)
        good = i % 3 != 0
        completion = pair["chosen"] if good else pair["rejected"]
        rows.append({"prompt": pair["prompt"], "completion": completion, "label": good})
    return rows


def tokens_of(artifact):
    """The prepared rows of a run that has one preparation."""
    from datasets import Dataset

    (path,) = (artifact.run / ".prepared").glob("*/train.arrow")
    return Dataset.from_file(str(path)).to_list()


def test_the_artifact(tmp_path):
    """Begins at the loss that a policy equal to its parent has, and learns; the reference stays."""
    made = life.command(
        write(
            tmp_path / "run", "kto", optim__steps=40, evaluation__every=20, undesirable_weight=0.8
        )
    )
    first, *_ = [line for line in metrics(made) if "eval_loss" in line]
    trained = [line for line in metrics(made) if "rewards/chosen" in line]
    assert first["eval_loss"] == pytest.approx(0.5 * (1 + 0.8) / 2, abs=1e-6)
    assert first["eval_log_ratio_per_token"] == pytest.approx(0, abs=1e-6)
    assert trained[-1]["rewards/chosen"] > trained[-1]["rewards/rejected"]
    assert losses(made)[-1] < losses(made)[0]
    manifest = made.verify()
    assert manifest.kind == "model" and manifest.stage == "kto"
    rows = manifest.data.rows
    assert rows.kept == 72 and rows.pieces == 72 and rows.train + rows.eval == 144
    assert manifest.final["reference"]


def test_every_weight_moves_and_the_frozen_ones_do_not(tmp_path):
    from safetensors.torch import load_file

    parent = load_file(life.TINY / "model" / "model.safetensors")
    whole = life.command(write(tmp_path / "whole", "kto"))
    trained = load_file(whole.model / "model.safetensors")
    assert all(not torch.equal(trained[name], parent[name]) for name in parent)
    adapted = life.command(write(tmp_path / "run", "kto", **ADAPTER))
    tensors = load_file(adapted.model / "adapter_model.safetensors")
    assert tensors and all(tensor.abs().sum() > 0 for tensor in tensors.values())
    assert adapted.verify().kind == "adapter"
    assert "the parent, the adapter off" in (adapted.path / "log.txt").read_text()


def test_an_adapter_that_goes_on_is_its_own_reference(tmp_path):
    run = tmp_path / "run"
    sft = {"stage": "lora", "name": "lora", "optim__learning_rate": 2e-2, "evaluation": {}}
    store.made(life.write(run, **sft, **ADAPTER))
    made = life.command(write(run, "kto", model="artifact:lora", **ADAPTER))
    assert "reference: the parent's adapter" in (made.path / "log.txt").read_text()
    first = next(line for line in metrics(made) if "eval_loss" in line)
    assert first["eval_loss"] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "divergence"), [("kto", 0.3), ("kto", -2.0), ("apo_zero_unpaired", 0.3)]
)
def test_the_loss_is_trls(tmp_path, monkeypatch, objective, divergence):
    """On one batch, with weights and a policy that has moved: what we say of held-out rows, what
    we learn from, and what is noted of it."""
    from trl import KTOTrainer

    from llmpipe.training.judged import JudgedTrainer, losses_of
    from llmpipe.training.resume import as_numbers

    compared = []
    trained = JudgedTrainer.fit

    def fit(trainer):
        final = trained(trainer)
        trainer.model.train()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
        rows = {name: value for name, value in batch.items() if name not in ("examples", "judged")}
        z = trainer.step_divergence = torch.tensor([divergence])
        trainer._metrics["train"].clear()
        learned = trainer._compute_loss(trainer.model, batch, return_outputs=False)
        noted = as_numbers(trainer._metrics["train"])
        trainer._metrics["train"].clear()
        trainer._total_train_tokens = 0
        monkeypatch.setattr(
            KTOTrainer, "_compute_kl_logps", lambda *_: z if torch.is_grad_enabled() else 0 * z
        )
        theirs = KTOTrainer._compute_loss(trainer, trainer.model, rows, return_outputs=False)
        numbers = dict(trainer._metrics["train"])
        del noted["num_tokens"], numbers["num_tokens"]  # which are summed over the training
        assert noted.keys() == numbers.keys() and "rewards/margins" in noted
        for name, values in numbers.items():
            assert noted[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name
        least = max(0.0, divergence)
        said = losses_of(trainer.log_ratios(batch), batch["label"], trainer, least).mean()
        compared.append((said.item(), learned.item(), theirs.item()))
        return final

    monkeypatch.setattr(JudgedTrainer, "fit", fit)
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    life.command(write(tmp_path / "run", "kto", objective=objective, **weights))
    ((said, learned, theirs),) = compared
    assert [said, learned] == pytest.approx([theirs, theirs], abs=1e-6)
    assert said != pytest.approx(0.5, abs=1e-3), "the policy is its parent still"


@pytest.mark.faults
def test_a_step_cut_any_way_is_one_trajectory(tmp_path):
    """12 x 1 = 4 x 3 = 2 x 6 = two processes, z included; the last batch of an epoch is not
    whole."""
    settings = {"optim__batch_size": 12, "optim__steps": 14, "log__every": 1, "evaluation": {}}
    settings["data"] = rows_file(tmp_path, judged(42)) | {"eval": {"holdout": 0.2}}
    made = [
        life.command(
            write(tmp_path / f"run{micro}", "kto", **settings, launch__micro_batch_size=micro)
        )
        for micro in (12, 4, 2)
    ]
    two = write(
        tmp_path / "two", "kto", **settings, launch__micro_batch_size=3, launch__processes="auto"
    )
    made.append(life.pair(two))
    assert made[0].manifest().data.rows.train % 12
    divergences = [[line["kl"] for line in metrics(a) if "kl" in line] for a in made]
    assert max(divergences[0]) > 1e-3, "z was never above zero"
    for artifact, kl in zip(made[1:], divergences[1:], strict=True):
        assert losses(artifact) == pytest.approx(losses(made[0]), abs=1e-4)
        assert kl == pytest.approx(divergences[0], abs=1e-4)
        final = artifact.manifest().final["eval_loss"]
        assert final == pytest.approx(made[0].manifest().final["eval_loss"], abs=1e-4)
        assert probed(artifact) == pytest.approx(probed(made[0]), abs=1e-4)


def test_resume_is_bitwise_the_straight_run(tmp_path):
    whole = life.command(write(tmp_path / "whole", "kto"))
    path = write(tmp_path / "run", "kto")
    for hook, code in (
        ("kill_after_checkpoint_3", -signal.SIGKILL),
        ("term_in_step_5", 143),
        ("term_in_save_9", 143),
    ):
        trial = life.Trial(path, hook=hook)
        assert trial.wait() == code, trial.text()
    assert life.essence(life.command(path)) == life.essence(whole)


def test_nan_stops_before_the_optimizer(tmp_path):
    trial = life.Trial(
        write(tmp_path / "run", "kto", data__eval={}, evaluation={}), hook="nan_loss_5"
    )
    assert trial.wait() == 4, trial.text()
    assert not Artifact(tmp_path / "run" / "kto").finished


def test_a_response_is_mismatched_with_the_nearest_other_prompt():
    """Closed form: never a response to the same prompt, though a preference's two stand
    together."""
    prompts = tuple(np.array(ids) for ids in ([1], [1], [2], [2], [3]))
    assert mismatched(prompts) == [4, 4, 1, 1, 3]
    assert mismatched(prompts[:2]) == [1, 0]


def test_every_form_of_a_label(tmp_path):
    """Rows of text, of messages, of a CSV and of pairs give the same tokens and labels."""
    messages = [{"prompt": TURNS, "completion": ANSWER, "label": True}]
    whole = [{"messages": TURNS + ANSWER, "label": 1}]
    made = []
    for name, rows in (("a", messages), ("b", whole)):
        folder = tmp_path / name
        folder.mkdir()
        other = {
            "prompt": [{"role": "user", "content": "2 + 2?"}],
            "completion": ANSWER,
            "label": False,
        }
        if name == "b":
            other = {"messages": other["prompt"] + ANSWER, "label": 0}
        data = rows_file(folder, [*rows, other])
        made.append(tokens_of(life.command(write(folder / "run", "kto", data=data, evaluation={}))))
    assert made[0] == made[1]
    assert [row["label"] for row in made[0]] == [GOOD, BAD]
    path = tmp_path / "judged.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [("prompt", "completion", "label"), ("2 + 2 =", " 4", "true"), ("a", "b", "0")]
        )
    data = {"train": [{"path": str(path)}], "max_length": 64}
    rows = tokens_of(life.command(write(tmp_path / "csv", "kto", data=data, evaluation={})))
    assert [row["label"] for row in rows] == [GOOD, BAD]
    assert rows[0]["KL_completion_ids"] == rows[1]["completion_ids"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": TURNS, "completion": ANSWER}, "missing column: label"),
        ({"prompt": TURNS, "completion": ANSWER, "label": None}, "missing column: label"),
        ({"prompt": TURNS, "completion": ANSWER, "label": "maybe"}, "bad label: 'maybe'"),
        ({"prompt": TURNS, "completion": ANSWER, "label": 2}, "bad label: 2"),
        ({"prompt": TURNS * 40, "completion": ANSWER, "label": True}, "too long"),
    ],
    ids=["missing", "null", "word", "number", "long"],
)
def test_a_bad_row_is_named(tmp_path, row, words):
    data = rows_file(tmp_path, [*judged(6), row])
    with pytest.raises(UserError) as refused:
        life.command(write(tmp_path / "run", "kto", data=data, evaluation={}))
    assert refused.value.code == 2 and f"judged.jsonl:7: {words}" in str(refused.value)


def test_an_unbalanced_set_is_said(tmp_path):
    data = rows_file(tmp_path, judged(24))
    made = life.command(write(tmp_path / "run", "kto", data=data, evaluation={}, optim__steps=2))
    assert "labels: 16 good, 8 bad; weighted 2.00 to 1" in (made.path / "log.txt").read_text()


def test_recipes(tmp_path):
    """A pass of one row has no other prompt to estimate z from; adapters that rewrite are
    refused."""
    for changes, words in (
        ({"launch__micro_batch_size": 1}, "two rows or more"),
        ({"adapter": {"init": "pissa"}}, "rewrites the model, which is the reference"),
    ):
        with pytest.raises(UserError, match=words):
            load(write(tmp_path / "run", "kto", **changes), schema("kto"))
    load(
        write(tmp_path / "run", "kto", objective="apo_zero_unpaired", launch__micro_batch_size=1),
        schema("kto"),
    )
