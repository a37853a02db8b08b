"""A micro-batch that is chosen by memory, on a device whose memory is a test's."""

import random

import pytest
import torch

from llmpipe.errors import RESOURCES, UserError
from llmpipe.run.artifact import Artifact
from llmpipe.run.machine import smaller_micro_batches
from llmpipe.training import hosted, memory
from tests import hooks, life, store
from tests.training import test_preference, test_pretrain

AUTO = {"launch__micro_batch_size": "auto", "optim__batch_size": 8, "optim__steps": 4}


@pytest.fixture
def short(monkeypatch):
    """`short(most)`: memory for so many sequences at once."""
    monkeypatch.setattr(memory, "DEVICES", memory.DEVICES)
    monkeypatch.setattr(memory, "_pass", memory._pass)
    return hooks.short_of_memory


def sft(run, **changes):
    return life.write(run, **{"log__every": 1} | changes)


def preferences(stage):
    return lambda run, **changes: test_preference.write(run, stage, **changes)


DROPPING = {"adapter": {"rank": 4, "alpha": 8, "dropout": 0.5}}
STAGES = {
    "sft": sft,
    "packed": lambda run, **changes: sft(run, data__packing=True, **changes),
    "lora": lambda run, **changes: sft(run, stage="lora", **DROPPING, **changes),
    "dpo": preferences("dpo"),
    "precomputed": lambda run, **more: test_preference.write(run, "dpo", precompute=True, **more),
    "reward": preferences("reward"),
    "kto": preferences("kto"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_what_does_not_fit_is_cut_without_a_trace(tmp_path, short, stage):
    """As if the run had begun with the smaller micro-batch: weights, metrics, samples."""
    write = STAGES[stage]
    settings = AUTO | {"evaluation": {"every": 2}, "checkpoint__every": 2}
    fixed = write(tmp_path / "fixed", **settings | {"launch__micro_batch_size": 2})
    straight = life.command(fixed)
    short(2)
    made = life.command(write(tmp_path / "cut", **settings))
    assert life.essence(made) == life.essence(straight)
    said = (made.path / "log.txt").read_text()
    first, second = (f"memory: micro-batches of {size} do not fit" for size in (8, 4))
    assert f"{first}; trying 4" in said and f"{second}; trying 2" in said
    assert made.manifest().hardware == straight.manifest().hardware


@pytest.mark.parametrize("streamed", [False, True])
def test_blocks_are_cut_too(tmp_path, short, streamed):
    texts = store.texts()
    changes = test_pretrain.streamed(texts) if streamed else {}
    changes |= {"optim__steps": 3, "evaluation": {}}
    fixed = test_pretrain.write(tmp_path / "fixed", texts, **changes)
    straight = life.command(fixed)
    short(4)
    auto = test_pretrain.write(tmp_path / "cut", texts, **changes, launch__micro_batch_size="auto")
    made = life.command(auto)
    assert life.essence(made) == life.essence(straight)
    assert made.manifest().hardware["micro_batch_size"] == 4


def test_a_resumed_run_keeps_what_it_began_with(tmp_path, short):
    """Also where there is memory for more by then."""
    settings = AUTO | {"optim__steps": 8}
    path = sft(tmp_path / "fixed", **settings | {"launch__micro_batch_size": 2})
    straight = life.command(path)
    path = sft(tmp_path / "killed", **settings)
    assert life.Trial(path, hook="killed_when_short_2").wait() < 0
    short(8)
    resumed = life.command(path)
    assert resumed.manifest().training.exact_resume
    assert life.essence(resumed) == life.essence(straight)


def test_a_pass_that_is_thrown_away_leaves_nothing(tmp_path, monkeypatch, short):
    """Neither gradients nor numbers that were drawn, in evaluation as in training."""
    seen = []

    def watched(trainer):
        before = (torch.get_rng_state(), random.getstate(), trainer.model.training)
        memory.fit_memory(trainer)
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
        assert trainer.model.training == before[2]
        assert all(weight.grad is None for weight in trainer.model.parameters())
        args = trainer.args
        seen.extend((args.per_device_train_batch_size, args.per_device_eval_batch_size))

    monkeypatch.setattr(hosted, "fit_memory", watched)
    short(2)
    life.command(STAGES["lora"](tmp_path / "run", **AUTO))
    assert seen == [2, 2]


def test_what_a_reference_said_is_kept_under_one_name(tmp_path, short):
    """However the steps are cut by then."""
    path = STAGES["precomputed"](tmp_path / "run", **AUTO | {"optim__steps": 8})
    assert life.Trial(path, hook="killed_when_short_2").wait() < 0
    kept = list((tmp_path / "run" / ".prepared").glob("reference-*"))
    assert len(kept) == 2, "of the rows and of those held out"
    life.command(path)
    assert list((tmp_path / "run" / ".prepared").glob("reference-*")) == kept


def test_a_resumed_run_is_not_cut_any_more(tmp_path, short):
    path = sft(tmp_path / "run", **AUTO | {"optim__steps": 8})
    assert life.Trial(path, hook="killed_when_short_2").wait() < 0
    short(1)
    with pytest.raises(UserError, match="out of memory") as refused:
        life.command(path)
    assert refused.value.code == RESOURCES
    with pytest.raises(UserError, match="micro_batch_size 2 there, 4 now"):
        life.command(path, ["launch.micro_batch_size=4"])


def test_one_sequence_that_does_not_fit_is_out_of_memory(tmp_path, monkeypatch, short):
    def never(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    short(1)
    monkeypatch.setattr(memory, "_pass", never)
    with pytest.raises(UserError, match="out of memory: CUDA out of memory") as refused:
        life.command(sft(tmp_path / "run", **AUTO))
    assert refused.value.code == RESOURCES
    assert "launch.activation_checkpointing" in refused.value.hint
    said = (tmp_path / "run" / "sft" / "log.txt").read_text()
    assert [line for line in said.splitlines() if line.startswith("memory:")] == [
        f"memory: micro-batches of {size} do not fit; trying {size // 2}" for size in (8, 4, 2)
    ]


def test_a_number_of_the_recipes_is_not_tried(tmp_path, short):
    short(1)
    made = life.command(sft(tmp_path / "run", **AUTO | {"launch__micro_batch_size": 4}))
    assert made.manifest().hardware["micro_batch_size"] == 4


def test_processes_agree(tmp_path):
    """Where one of them has less memory, all take what fits there."""
    settings = AUTO | {"evaluation": {}, "launch__processes": "auto"}
    fixed = sft(tmp_path / "fixed", **settings | {"launch__micro_batch_size": 2})
    straight = life.pair(fixed)
    path = sft(tmp_path / "cut", **settings)
    ends = life.ranks(path, hooks=("short_of_memory_0", "short_of_memory_2"))
    assert [code for code, _ in ends] == [0, 0], ends
    made = Artifact(tmp_path / "cut" / "sft")
    assert made.manifest().hardware["micro_batch_size"] == 2
    assert life.essence(made) == life.essence(straight)


def test_which_sizes_are_tried(tmp_path):
    from llmpipe.recipe.check import load
    from llmpipe.stages import schema

    def asked(stage="sft", batch=12, **changes):
        changes |= {"optim__batch_size": batch, "launch__micro_batch_size": "auto"}
        path = STAGES[stage](tmp_path / "run", **changes)
        return load(path, schema("dpo" if stage == "precomputed" else stage))

    assert smaller_micro_batches(asked(), 1, 12) == [6, 4, 3, 2, 1]
    assert smaller_micro_batches(asked(), 2, 6) == [3, 2, 1]
    assert smaller_micro_batches(asked(), 1, 1) == []
    assert smaller_micro_batches(asked("kto"), 1, 4) == [2], "whose losses need two rows"
    assert smaller_micro_batches(asked("dpo", objective="aot"), 1, 12) == [], "a whole step"
