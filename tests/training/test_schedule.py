"""No step learns nothing: the rate of every step against transformers', and in what is logged."""

import json

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from llmpipe.errors import Stopped, UserError
from llmpipe.recipe.check import load
from llmpipe.stages import schema
from llmpipe.training import hosted, schedule
from tests import life

SHAPES = ["linear", "cosine", "constant", "wsd", "to a tenth"]


def asked(tmp_path, shape, warmup, steps):
    """A recipe of pretraining, which has every shape."""
    optim = {"learning_rate": 1e-3, "warmup": warmup, "steps": steps, "batch_tokens": 1024}
    ends = {"wsd": ("wsd", 0.0), "to a tenth": ("cosine", 0.1)}
    name, final = ends.get(shape, (shape, 0.0))
    optim |= {"scheduler": name, "final": final}
    values = {
        "stage": "pretrain",
        "run": str(tmp_path / "run"),
        "model": str(life.TINY / "model"),
        "data": {"train": [{"path": str(life.TINY / "corpus.txt")}], "max_length": 64},
        "optim": optim,
    }
    path = tmp_path / "pretrain.yaml"
    path.write_text(json.dumps(values))
    return load(path, schema("pretrain"))


def rates_of(scheduler, optimizer, steps):
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def rates_logged(artifact):
    lines = map(json.loads, (artifact.path / "metrics.jsonl").read_text().splitlines())
    return [line["learning_rate"] for line in lines if "loss" in line]


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("warmup", [0, 0.03, 0.5, 0.999, 1, 3, 40])
@pytest.mark.parametrize("steps", [1, 2, 3, 13])
def test_no_step_is_at_rate_0(tmp_path, shape, warmup, steps):
    recipe = asked(tmp_path, shape, warmup, steps)
    mine = optimizer()
    rates = rates_of(schedule.make_scheduler(recipe, mine, steps), mine, steps)
    assert min(rates) > 0
    of_warmup = schedule.warmup_steps(warmup, steps)
    assert rates[:of_warmup] == [(s + 1) / (of_warmup + 1) for s in range(min(of_warmup, steps))]
    overlap = shape == "wsd" and warmup == 0.999  # its decay has begun when the warm-up ends
    assert warmup >= steps or max(rates) == 1 or overlap


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("warmup", [0, 0.25, 3])
def test_behind_the_warmup_it_is_transformers(tmp_path, shape, warmup):
    steps = 13
    recipe = asked(tmp_path, shape, warmup, steps)
    mine, theirs = optimizer(), optimizer()
    words = schedule.in_transformers_words(recipe)
    arguments = TrainingArguments(str(tmp_path / "out"), report_to="none", **words)
    of_warmup = arguments.get_warmup_steps(steps)
    assert schedule.warmup_steps(warmup, steps) == of_warmup
    reference = get_scheduler(
        arguments.lr_scheduler_type,
        theirs,
        num_warmup_steps=of_warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    rates = rates_of(schedule.make_scheduler(recipe, mine, steps), mine, steps)
    assert rates[of_warmup:] == rates_of(reference, theirs, steps)[of_warmup:]


def test_what_the_escape_hatch_says_of_a_shape_is_kept(tmp_path):
    path = life.write(tmp_path / "run", trainer={"lr_scheduler_kwargs": {"num_cycles": 0.25}})
    made = optimizer()
    scheduler = schedule.make_scheduler(load(path, schema("sft")), made, 12)
    assert rates_of(scheduler, made, 12)[-1] > 0.2  # half the way down


def test_one_step_learns_at_the_peak(tmp_path):
    artifact = life.command(life.write(tmp_path / "run", optim__steps=1, log__every=1))
    assert rates_logged(artifact) == [1e-3]


def test_the_rate_of_a_step_is_the_one_that_is_logged(tmp_path):
    path = life.write(
        tmp_path / "run", optim__steps=4, optim__warmup=2, optim__scheduler="linear", log__every=1
    )
    assert rates_logged(life.command(path)) == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 0.5e-3])


def test_a_warmup_without_an_end_is_said(tmp_path, capsys):
    path = life.write(tmp_path / "run", optim__steps=2, optim__warmup=7)
    life.command(path)
    said = capsys.readouterr().out
    assert "optim.warmup: 7 steps, and the training has 2" in said and "0.25 of its peak" in said


def test_a_checkpoint_within_the_warmup_of_an_older_version_is_refused(tmp_path, monkeypatch):
    """It would go on with other rates; behind the warm-up they are the same ones."""
    path = life.write(tmp_path / "run", optim__warmup=6, checkpoint__every=1)

    def stop(trainer):
        trainer.stop_code = 143
        return trainer.state.global_step == 3

    with monkeypatch.context() as older:
        older.setattr(schedule, "share_of_peak", lambda step, warmup, then: then(step))
        older.setattr(hosted.Durable, "stop_asked", stop)
        with pytest.raises(Stopped):
            life.command(path)
    with pytest.raises(UserError, match=r"step-3: was written within the warm-up") as refused:
        life.command(path)
    assert refused.value.code == 3 and "\n" not in refused.value.message
    assert "--fresh" in refused.value.hint
