"""A micro-batch that is chosen by memory, on a device whose memory is a test's."""

import json
import random
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from llmpipe.errors import RESOURCES, UserError
from llmpipe.models.activations import copies, of_a_pass
from llmpipe.models.hardware import Hardware
from llmpipe.run.artifact import Artifact
from llmpipe.run.machine import micro_batch_sizes
from llmpipe.training import hosted, memory
from llmpipe.training.rows import longest
from tests import hooks, life, store
from tests.training import test_preference, test_pretrain

AUTO = {"launch__micro_batch_size": "auto", "optim__batch_size": 8, "optim__steps": 4}


@pytest.fixture
def short(monkeypatch):
    """`short(most)`: memory for so many sequences at once."""
    monkeypatch.setattr(memory, "DEVICES", memory.DEVICES)
    monkeypatch.setattr(memory, "GAUGE", memory.GAUGE)
    monkeypatch.setattr(memory, "_pass", memory._pass)
    return hooks.short_of_memory


def said(artifact):
    lines = (artifact / "log.txt").read_text().splitlines()
    return [line for line in lines if line.startswith("memory:")]


def sft(run, **changes):
    return life.write(run, **{"log__every": 1} | changes)


def preferences(stage):
    return lambda run, **changes: test_preference.write(run, stage, **changes)


LAYERS = json.loads((life.TINY / "model" / "config.json").read_text())["num_hidden_layers"]
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


VARIANTS = ("packed", "lora", "precomputed")
"""Of a trainer that `make test` has tried with its stage."""


@pytest.mark.parametrize(
    "stage", [life.by_the_dozen(name) if name in VARIANTS else name for name in STAGES]
)
def test_what_does_not_fit_is_cut_without_a_trace(tmp_path, short, stage):
    """As if the run had begun with the smaller micro-batch: weights, metrics, samples."""
    write = STAGES[stage]
    settings = AUTO | {"evaluation": {"every": 2}, "checkpoint__every": 2}
    fixed = write(tmp_path / "fixed", **settings | {"launch__micro_batch_size": 2})
    straight = life.command(fixed)
    short(2)
    made = life.command(write(tmp_path / "cut", **settings))
    assert life.essence(made) == life.essence(straight)
    *tried, settled = said(made.path)
    assert tried == [f"memory: micro-batches of {n} do not fit; trying {n // 2}" for n in (8, 4)]
    assert settled.startswith("memory: batch 8 = 2 x 4 accumulated x 1; ")
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
    lines = said(tmp_path / "run" / "sft")
    assert lines[:3] == [
        f"memory: micro-batches of {size} do not fit; trying {size // 2}" for size in (8, 4, 2)
    ]
    assert ["selective)" in lines[3], "full)" in lines[4]] == [True, True] and len(lines) == 5


def test_what_the_recipe_says_is_not_tried(tmp_path, short):
    short(1)
    given = {"launch__micro_batch_size": 4, "launch__activation_checkpointing": "none"}
    made = life.command(sft(tmp_path / "run", **AUTO | given))
    assert made.manifest().hardware["micro_batch_size"] == 4
    assert not said(made.path)


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


def rows_of(**lengths):
    """Rows of so many tokens in each of their columns."""
    columns = {name: [[1] * length for length in each] for name, each in lengths.items()}
    return Dataset.from_dict(columns | {"place": range(len(next(iter(lengths.values()))))})


@pytest.mark.parametrize(
    ("rows", "places"),
    [
        # a batch is as wide as one response, whatever the other one is
        (rows_of(prompt_ids=[5, 5, 9], chosen_ids=[9, 20, 1], rejected_ids=[19, 1, 2]), [1, 0]),
        (rows_of(prompt_ids=[5, 5], completion_ids=[9, 8], KL_completion_ids=[2, 90]), [0, 1]),
        (rows_of(input_ids=[3, 7, 7], labels=[3, 7, 7]), [1, 2]),
        (rows_of(input_ids=[3]), [0, 0]),
    ],
)
def test_the_longest_rows_are_those_that_take_most(rows, places):
    assert [row["place"] for row in longest(rows, 2)] == places


def test_which_sizes_there_are(tmp_path):
    from llmpipe.recipe.check import load
    from llmpipe.stages import schema

    def asked(stage="sft", batch=12, **changes):
        changes |= {"optim__batch_size": batch, "launch__micro_batch_size": "auto"}
        return load(STAGES[stage](tmp_path / "run", **changes), schema(stage))

    assert micro_batch_sizes(asked(), 1) == [1, 2, 3, 4, 6, 12]
    assert micro_batch_sizes(asked(), 2) == [1, 2, 3, 6]
    assert micro_batch_sizes(asked("kto"), 1) == [2, 3, 4, 6, 12], "whose losses need two rows"
    assert micro_batch_sizes(asked("kto", batch=2), 2) == [1], "as it is without us"
    assert micro_batch_sizes(asked("dpo", objective="aot"), 1) == [12], "a whole step"


# --- by what is measured ---


class Device:
    """A device with `room`, on which a sequence takes so much, by what is computed again."""

    def __init__(self, room, costs, monkeypatch):
        self._room = room
        self.costs = costs
        self.passed = []
        monkeypatch.setattr(memory, "DEVICES", {"cpu", "cuda"})
        monkeypatch.setattr(memory, "GAUGE", self)
        monkeypatch.setattr(memory, "_pass", self._pass)

    def room(self):
        return self._room

    def held(self):
        return 0.0

    def begin(self):
        self._peak = 0.0

    def peak(self):
        return self._peak

    def _pass(self, trainer):
        hardware = trainer.hardware
        kind = hardware.activation_checkpointing
        assert trainer.layered.is_activation_checkpointing == (kind != "none")
        self.passed.append((hardware.micro_batch_size, kind))
        self._peak = self.costs[kind] * hardware.micro_batch_size
        if self._peak > 1.1 * self._room:
            raise torch.OutOfMemoryError("CUDA out of memory.")


def test_the_largest_micro_batch_that_fits(tmp_path, monkeypatch):
    """An estimate that was too high is corrected once, by what a pass took."""
    monkeypatch.setattr(memory, "of_a_pass", lambda model, hardware, kind, tokens: 4e9 * tokens)
    row = longest_row(tmp_path)
    device = Device(8.5 * row, {"none": 1.5 * row}, monkeypatch)
    made = life.command(sft(tmp_path / "run", **AUTO))
    assert device.passed == [(2, "none"), (4, "none")], "8 would take 12 of 8.5"
    assert made.manifest().hardware["micro_batch_size"] == 4


def longest_row(tmp_path):
    """Tokens of the recipe's longest row, in GB: beside them the tiny model is nothing."""
    life.command(sft(tmp_path / "look", **AUTO | {"optim__steps": 1}))
    (path,) = (tmp_path / "look" / ".prepared").glob("*/train.arrow")
    return 1e9 * max(map(len, Dataset.from_file(str(path))["input_ids"]))


@pytest.mark.parametrize("goes", ["on", "back"])
def test_a_forecast_that_was_too_low_is_taken_back(tmp_path, monkeypatch, goes):
    """And the size that fits is passed last, as layers are compiled then."""
    monkeypatch.setattr(memory, "of_a_pass", lambda model, hardware, kind, tokens: 4e9 * tokens)
    row = longest_row(tmp_path)
    device = Device(8.5 * row, {"none": row}, monkeypatch)

    class Steep(dict):
        def __getitem__(self, kind):
            return row if goes == "on" or device.passed[-1][0] < 8 else 2 * row

    device.costs = Steep()
    anew = []
    monkeypatch.setattr(memory, "compile_anew", lambda: anew.append(device.passed[-1][0]))
    made = life.command(sft(tmp_path / "run", **AUTO))
    back = [(2, "none"), (8, "none"), (2, "none")]
    assert device.passed == (back[:2] if goes == "on" else back)
    assert anew == ([2] if goes == "on" else [2, 8])
    assert made.manifest().hardware["micro_batch_size"] == device.passed[-1][0]


def test_what_fits_no_more_is_cut_again(tmp_path, monkeypatch):
    """Another process took memory, since a size had fitted that is gone back to."""
    monkeypatch.setattr(memory, "of_a_pass", lambda model, hardware, kind, tokens: 4e9 * tokens)
    row = longest_row(tmp_path)
    device = Device(8.5 * row, {}, monkeypatch)
    costs = iter([row, 2 * row, 5 * row, row])
    monkeypatch.setattr(Device, "costs", property(lambda _: {"none": next(costs)}), raising=False)
    made = life.command(sft(tmp_path / "run", **AUTO))
    assert device.passed == [(2, "none"), (8, "none"), (2, "none"), (1, "none")]
    assert made.manifest().hardware["micro_batch_size"] == 1
    assert said(made.path)[-1].startswith("memory: batch 8 = 1 x 8 accumulated x 1; ")


def test_what_did_not_fit_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "of_a_pass", lambda *_: 0.0)
    device = Device(8e9, {}, monkeypatch)

    class Steep(dict):
        def __getitem__(self, kind):
            return 2e9 if device.passed[-1][0] == 8 else 1e8

    device.costs = Steep()
    life.command(sft(tmp_path / "run", **AUTO))
    assert device.passed == [(8, "none"), (4, "none")]


@pytest.mark.parametrize(
    ("estimates", "costs", "passed"),
    [
        ((1, 1, 1), (1, 0, 0), [(2, "none")]),
        ((9, 1, 1), (0, 1, 0), [(2, "selective")]),  # it is known before that none does not fit
        ((9, 9, 1), (0, 0, 1), [(2, "full")]),
        ((9, 9, 9), (0, 0, 1), [(1, "full"), (2, "full")]),  # more than was thought
        ((1, 1, 1), (9, 1, 0), [(2, "none"), (1, "none"), (1, "selective"), (2, "selective")]),
        ((2.8, 1, 1), (1, 0, 0), [(1, "none"), (2, "none")]),  # it is worth a try
    ],
)
def test_activations_are_computed_again_where_one_sequence_does_not_fit(
    tmp_path, monkeypatch, estimates, costs, passed
):
    kinds = ("none", "selective", "full")
    row = longest_row(tmp_path)
    by_shape = dict(zip(kinds, estimates, strict=True))
    monkeypatch.setattr(
        memory, "of_a_pass", lambda model, hardware, kind, tokens: 1e9 * by_shape[kind] * tokens
    )
    device = Device(2.5 * row, dict(zip(kinds, (row * c for c in costs), strict=True)), monkeypatch)
    computed = watched_layers(monkeypatch)
    settings = AUTO | {"optim__batch_size": 2, "optim__steps": 2}
    made = life.command(sft(tmp_path / "run", **settings))
    assert device.passed == passed
    kind = passed[-1][1]
    assert made.manifest().hardware["activation_checkpointing"] == kind
    assert bool(computed) == (kind == "selective")
    plain = life.command(sft(tmp_path / "plain", **settings | {"launch__micro_batch_size": 2}))
    assert life.essence(made) == life.essence(plain)


def watched_layers(monkeypatch):
    """An entry for each pass of a layer that keeps its products alone."""
    from llmpipe.upstream import checkpointing

    computed, contexts = [], checkpointing.contexts
    monkeypatch.setattr(checkpointing, "contexts", lambda: computed.append("layer") or contexts())
    return computed


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("stage", ["lora", "dpo", "reward"])
def test_layers_keep_what_the_recipe_says(tmp_path, monkeypatch, stage, kind):
    """Also after TRL has turned it off for the reference."""
    computed = watched_layers(monkeypatch)
    settings = AUTO | {"evaluation": {}, "launch__activation_checkpointing": kind}
    life.command(STAGES[stage](tmp_path / "run", **settings | {"optim__steps": 2}))
    assert len(computed) == (2 * LAYERS if kind == "selective" else 0)


def test_a_number_of_the_recipes_decides_what_is_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "of_a_pass", lambda *_: 0.0)
    device = Device(8e9, {"none": 3e9, "selective": 2e9}, monkeypatch)
    made = life.command(sft(tmp_path / "run", **AUTO | {"launch__micro_batch_size": 4}))
    assert device.passed == [(4, "none"), (4, "selective")]
    assert made.manifest().hardware["micro_batch_size"] == 4


def test_what_is_estimated(tmp_path):
    """SmolLM2-1.7B's shape on an H100, as it was measured: one pass beside weights and gradients,
    in GiB.
    """
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(**shape, num_attention_heads=32, vocab_size=49152, tie_word_embeddings=True)
        )
    weights = sum(p.nbytes for p in model.parameters())
    plain = Hardware("cuda", 1, 1, 4, 1, True, "sdpa")
    for compiles, tokens, seen in (
        (False, 16384, 60.2),
        (True, 16384, 42.3),
        (False, 8192, 36.3),
        (True, 8192, 27.2),
    ):
        hardware = replace(plain, compiles=compiles)
        passed = of_a_pass(model, hardware, "none", tokens)
        estimate = (2 * weights + copies(model, hardware) + passed) / 2**30
        assert 1 < estimate / seen < 1.15, (compiles, tokens, estimate)
    needs = [of_a_pass(model, plain, kind, 8192) for kind in ("none", "selective", "full")]
    assert needs[0] > 1.5 * needs[1] > 3 * needs[2]


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon", "mixtral"])
def test_every_architecture_is_estimated(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name))
    hardware = Hardware("cuda", 1, 1, 4, 1, True, "sdpa")
    sizes = [of_a_pass(model, hardware, kind, 100) for kind in ("none", "selective", "full")]
    assert sizes[0] > sizes[1] > sizes[2] > 0


@pytest.mark.parametrize(
    ("free", "reserved", "room"),
    [
        (83e9, 1.5e9, 0.9 * 85e9),  # nobody else is there: the same on every day
        (70e9, 14e9, 0.9 * 85e9),  # nor where PyTorch holds what it can use again
        (10e9, 2e9, 0.95 * 12e9),
    ],
)
def test_what_a_gpu_has_room_for(monkeypatch, free, reserved, room):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 85e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved)
    assert memory.Gauge().room() == pytest.approx(room)
