"""`launch.strategy: fsdp`: a model in parts, on two gloo processes and against two whole ones."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    Qwen3MoeConfig,
)

from llmpipe.errors import LOST, UserError
from llmpipe.files.tables import table
from llmpipe.front import ahead
from llmpipe.recipe.check import locate
from llmpipe.run import checkpoints
from llmpipe.run.artifact import Artifact
from llmpipe.stages import schema
from tests import life, store

SETTINGS = {
    "launch__processes": "auto",
    "launch__micro_batch_size": 1,
    "launch__activation_checkpointing": "none",
    "log__every": 1,
}
PACKED = {
    "data__packing": True,
    "optim__batch_size": 8,
    "launch__micro_batch_size": 2,
    "launch__activation_checkpointing": "full",
}


PAIRS = {
    "data__train": [{"path": str(life.TINY / "pairs.jsonl")}],
    "optim__batch_size": 8,
    "launch__micro_batch_size": 2,
}
TEXT = {
    "model": None,
    "tokenizer": str(life.TINY / "model"),
    "architecture": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2},
    "optim__batch_size": None,
    "optim__batch_tokens": 256,
}
ADAPTER = {"adapter": {"rank": 4, "alpha": 8}}
STAGES = {
    "pretrain": TEXT,
    "reward": PAIRS | {"samples": None},
    "dpo": PAIRS,
    "kto": PAIRS,
    "lora": ADAPTER,
}
"""What a recipe of each stage changes in one of sft."""


def write(run, strategy="fsdp", stage="sft", **changes):
    how = SETTINGS | STAGES.get(stage, {}) | changes
    values = life.recipe(run, **how, stage=stage, launch__strategy=strategy)
    path = run.parent / f"{run.name}.yaml"
    path.write_text(json.dumps(_without_nothing(values)))
    return path


def _without_nothing(values):
    """A recipe without the fields that a stage does not have."""
    return {
        name: _without_nothing(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None
    }


def lines(artifact):
    text = (artifact.path / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def weights(artifact):
    tensors = {}
    for path in artifact.model.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in list(file.keys())}
    return tensors


def assert_alike(one, other):
    """Losses to 1e-5, weights to 1e-4, the same answers and the very same files."""
    names = ["loss", "eval_loss", "grad_norm"]
    if len({each.manifest().hardware["processes"] for each in (one, other)}) == 1:
        names.append("num_tokens")  # TRL counts the row that a process without one takes part with
    for mine, theirs in zip(lines(one), lines(other), strict=True):
        for name in names:
            near = pytest.approx(theirs.get(name, 0), abs=1e-5, rel=1e-5)
            assert mine.get(name, 0) == near, (mine, theirs)
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], atol=1e-4, rtol=0), name
    said = [each.path / "samples.jsonl" for each in (one, other)]
    assert said[0].exists() == said[1].exists()
    assert not said[0].exists() or said[0].read_text() == said[1].read_text()
    names = {path.name for path in one.model.iterdir()}
    assert names == {path.name for path in other.model.iterdir()}
    for name in names:
        if name.endswith((".json", ".jinja")):
            assert (one.model / name).read_bytes() == (other.model / name).read_bytes(), name


def model_folder(folder, model):
    """A model with the tiny one's tokenizer."""
    model.save_pretrained(folder)
    for path in (life.TINY / "model").iterdir():
        if "token" in path.name or "template" in path.name:
            shutil.copy(path, folder)
    return folder


def rows():
    config = json.loads((life.TINY / "model" / "config.json").read_text())
    return config["vocab_size"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(PACKED, id="packed"),
        life.by_the_dozen({"data__packing": False}),
        life.by_the_dozen({"launch__activation_checkpointing": "selective"}),
    ],
)
def test_two_processes_in_parts_are_two_whole_ones(tmp_path, changes):
    """Held-out rows are measured and prompts answered before the first step."""
    parts = life.pair(write(tmp_path / "parts", **changes))
    manifest = parts.verify()
    assert manifest.hardware["sharded"] is True and manifest.verified["max_logit_difference"] == 0
    said = (tmp_path / "parts.0.out").read_text()
    assert "LlamaForCausalLM, 0.1 M parameters" in said and "FSDPLlama" not in said
    assert "no small llama can be made" not in said, "its architecture is looked at as any other's"
    assert_alike(parts, life.pair(write(tmp_path / "whole", "ddp", **changes)))
    assert AutoModelForCausalLM.from_pretrained(parts.model).config.tie_word_embeddings


OTHERS = [
    life.by_the_dozen("pretrain", {}),
    life.by_the_dozen("pretrain", {"data__stream": True, "data__eval": {}, "evaluation": {}}),
    life.by_the_dozen("reward", {}),
    pytest.param("dpo", {"optim__steps": 3}, id="dpo"),
    life.by_the_dozen("dpo", {"precompute": True}),
    life.by_the_dozen("dpo", {"objective": "orpo"}),
    life.by_the_dozen("kto", {}),
    pytest.param("lora", {"optim__steps": 3}, id="lora"),
    life.by_the_dozen("lora", PACKED),
    life.by_the_dozen("lora", {"optim__optimizer": "adamw_8bit"}),
    life.by_the_dozen("dpo", ADAPTER),
    life.by_the_dozen("kto", ADAPTER),
    life.by_the_dozen("reward", ADAPTER),
]


@pytest.mark.parametrize(("stage", "changes"), OTHERS)
def test_every_stage_in_parts_is_one_process(tmp_path, stage, changes):
    """The rows do not divide by processes and micro-batches, and neither do the held-out ones."""
    parts = life.pair(write(tmp_path / "parts", stage=stage, **changes))
    manifest = parts.verify()
    assert manifest.hardware["sharded"] is True
    assert manifest.verified["max_logit_difference"] == 0
    alone = life.command(write(tmp_path / "alone", "ddp", stage, **changes, launch__processes=1))
    assert_alike(parts, alone)
    reference = manifest.final.get("reference")
    assert reference == alone.manifest().final.get("reference")
    none = {"precompute", "objective"} & changes.keys()
    assert bool(reference) == (stage in ("dpo", "kto") and not none)


@pytest.mark.faults
def test_an_adapter_of_a_parent_goes_on(tmp_path):
    """The parent's adapter is the reference, and is merged where a reward model begins from it."""
    made = {}
    for strategy in ("fsdp", "ddp"):
        run = tmp_path / strategy
        life.pair(write(run, strategy, "lora", optim__steps=3))
        changes = {"model": "artifact:lora", "optim__steps": 3}
        made[strategy] = [
            life.pair(write(run, strategy, stage, **changes, **ADAPTER))
            for stage in ("dpo", "reward")
        ]
    for mine, theirs in zip(made["fsdp"], made["ddp"], strict=True):
        assert_alike(mine, theirs)


def untied(tmp_path):
    """The tiny model's head is its embeddings; here it has one of its own."""
    config = LlamaConfig.from_pretrained(life.TINY / "model", tie_word_embeddings=False)
    torch.manual_seed(0)
    return str(model_folder(tmp_path / "model", AutoModelForCausalLM.from_config(config)))


@pytest.mark.faults
def test_a_head_of_its_own(tmp_path):
    changes = {**PACKED, "model": untied(tmp_path)}
    parts = life.pair(write(tmp_path / "parts", **changes))
    assert "lm_head.weight" in weights(parts)
    assert_alike(parts, life.pair(write(tmp_path / "whole", "ddp", **changes)))


def experts(tmp_path):
    """Of four experts each token sees two."""
    config = Qwen3MoeConfig(
        vocab_size=rows(),
        hidden_size=64,
        intermediate_size=96,
        head_dim=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return str(model_folder(tmp_path / "model", AutoModelForCausalLM.from_config(config)))


@pytest.mark.faults
def test_experts_that_files_hold_one_by_one(tmp_path):
    changes = {**PACKED, "model": experts(tmp_path), "optim__steps": 4}
    parts = life.pair(write(tmp_path / "parts", **changes))
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in weights(parts)
    assert_alike(parts, life.pair(write(tmp_path / "whole", "ddp", **changes)))


@pytest.mark.faults
def test_the_best_step_is_kept(tmp_path):
    changes = {"evaluation": {"every": 3, "keep_best": True}, "optim__learning_rate": 3e-2}
    made = [
        life.pair(write(tmp_path / strategy, strategy, **changes)) for strategy in ("fsdp", "ddp")
    ]
    steps = [artifact.manifest().training.published_step for artifact in made]
    assert steps[0] == steps[1] < 12
    mine, theirs = map(weights, made)
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], atol=1e-3, rtol=0), name


@pytest.mark.faults
def test_arithmetic_in_bf16(tmp_path):
    """Weights stay in fp32; what is rounded is not what autocast rounds."""
    changes = {"optim__precision": "bf16"}
    made = [
        life.pair(write(tmp_path / strategy, strategy, **changes)) for strategy in ("fsdp", "ddp")
    ]
    for mine, theirs in zip(*map(lines, made), strict=True):
        assert mine.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=2e-2)
    assert {tensor.dtype for tensor in weights(made[0]).values()} == {torch.float32}


def in_parts(run, stage="sft", **changes):
    """What two processes make, which have in parts what learns, its gradients and its moments."""
    path = write(run, stage=stage, **changes)
    for code, text in life.ranks(path, hooks=["says_what_is_in_parts"] * 2):
        assert code == 0, text
        said = [line for line in text.splitlines() if line.startswith("in parts: ")]
        count = len(weights(Artifact(run / stage)))
        of_all = f"in parts: {count} weights, {count * changes.get('launch__offload', 0)} offloaded"
        assert said[0] == f"{of_all}; 0 moments" and said[-1] == f"{of_all}; {2 * count} moments"
    return Artifact(run / stage)


def made_in_parts(tmp_path_factory, **changes):
    """The same, once in a run of the suite."""

    def by_two(path):
        return in_parts(path.with_suffix(""), **changes)

    return store.made(write(tmp_path_factory.mktemp("made") / "run", **changes), by_two)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return made_in_parts(tmp_path_factory)


@pytest.fixture(scope="module")
def without_a_stop(tmp_path_factory):
    """What a stage makes that nobody stops, once for each, and in how many seconds."""
    made = {}

    def make(stage):
        if stage not in made:
            began = time.monotonic()
            artifact = life.pair(write(tmp_path_factory.mktemp(stage) / "run", stage=stage))
            made[stage] = (artifact, time.monotonic() - began)
        return made[stage]

    return make


@pytest.mark.faults
@pytest.mark.parametrize("number", range(6 if life.FULL else 1))
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["kill", "term"])
def test_a_stop_at_random_leaves_no_trace(tmp_path, without_a_stop, stage, how, number):
    """One of two processes, at any time of its life."""
    straight, seconds = without_a_stop(stage)
    draw = random.Random(f"{how} {stage} {number}")
    hook = f"{how}_after_hundredths_{int(100 * seconds * draw.uniform(0.1, 1))}"
    hooks = [None, None]
    hooks[draw.randrange(2)] = hook
    path = write(tmp_path / "run", stage=stage)
    ends = life.ranks(path, hooks=hooks)
    codes = {code for code, _ in ends}
    if how == "kill":
        assert codes <= {0, 1, LOST, -signal.SIGKILL}, ends
    else:  # before training there is nothing to agree on: one ends, and the other one misses it
        assert codes <= {0, 143, -signal.SIGTERM, LOST}, ends
    artifact = type(straight)(tmp_path / "run" / stage)
    if not artifact.finished:
        life.pair(path)
    assert life.essence(artifact) == life.essence(straight)


@pytest.mark.faults
@pytest.mark.parametrize("hooks", [("kill_in_publish", None), (None, "kill_in_publish")])
def test_a_process_that_dies_while_an_adapter_is_published(tmp_path, without_a_stop, hooks):
    straight, _ = without_a_stop("lora")
    path = write(tmp_path / "run", stage="lora")
    began = time.monotonic()
    ends = life.ranks(path, hooks=hooks)
    assert time.monotonic() - began < 100
    assert {code for code, _ in ends} <= {-signal.SIGKILL, 1, LOST}, ends
    assert not (tmp_path / "run" / "lora" / "model").exists()
    assert life.essence(life.pair(path)) == life.essence(straight)


@pytest.mark.parametrize(
    ("hooks", "codes"),
    [
        pytest.param((None, "term_in_step_5"), {143}, id="term"),
        life.by_the_dozen(("kill_after_checkpoint_6", None), {-signal.SIGKILL, 1, LOST}),
        life.by_the_dozen((None, "kill_after_checkpoint_6"), {-signal.SIGKILL, 1, LOST}),
        life.by_the_dozen((None, "kill_after_checkpoint_12"), {-signal.SIGKILL, 1, LOST}),
        life.by_the_dozen(("kill_in_save_6", None), {-signal.SIGKILL, 1, LOST}),
        life.by_the_dozen((None, "kill_in_stream"), {-signal.SIGKILL, 1, LOST}),
        life.by_the_dozen(("kill_in_stream", None), {-signal.SIGKILL, 1, LOST}),
    ],
)
def test_a_stop_leaves_no_trace(tmp_path, straight, hooks, codes):
    """Also where an evaluation was put off, and where nothing but publishing was left."""
    path = write(tmp_path / "run")
    ends = life.ranks(path, hooks=hooks)
    assert {code for code, _ in ends} <= codes, ends
    resumed = life.pair(path)
    assert "resuming from step-" in path.with_suffix(".0.out").read_text()
    assert life.essence(resumed) == life.essence(straight)
    assert resumed.manifest().training.exact_resume


OFFLOADED = {"launch__offload": True}


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory):
    return made_in_parts(tmp_path_factory, **OFFLOADED)


def test_parts_in_the_hosts_memory_train_as_parts_do(straight, offloaded):
    assert offloaded.verify().hardware["offload"] is True
    assert "they lie in the host's memory between uses" in (offloaded.path / "log.txt").read_text()
    assert "offload" not in straight.manifest().hardware, "as older versions have written it"
    assert_alike(offloaded, straight)


@pytest.mark.faults  # `make test` has dpo in parts, and parts that are offloaded
def test_a_reference_is_offloaded_beside_the_policy(tmp_path):
    """Dpo has two models, of which one never learns."""
    changes = {"stage": "dpo", "optim__steps": 3}
    parts = life.pair(write(tmp_path / "parts", **changes))
    assert_alike(in_parts(tmp_path / "offloaded", **changes, **OFFLOADED), parts)


@pytest.mark.parametrize(
    ("hooks", "codes"),
    [
        pytest.param((None, "kill_after_checkpoint_6"), {-signal.SIGKILL, 1, LOST}, id="kill"),
        life.by_the_dozen(("term_in_step_5", None), {143}),
    ],
)
def test_a_stop_leaves_no_trace_of_what_is_offloaded(tmp_path, offloaded, hooks, codes):
    path = write(tmp_path / "run", **OFFLOADED)
    ends = life.ranks(path, hooks=hooks)
    assert {code for code, _ in ends} <= codes, ends
    resumed = life.pair(path)
    assert "resuming from step-" in path.with_suffix(".0.out").read_text()
    assert life.essence(resumed) == life.essence(offloaded)
    assert resumed.manifest().training.exact_resume


@pytest.mark.parametrize("begun", [False, life.by_the_dozen(True)])
def test_another_place_for_the_parts_is_another_machine(tmp_path, begun):
    """Whose optimizer computes elsewhere; the files of a checkpoint are the same."""
    write(tmp_path / "run", launch__offload=begun, optim__steps=6)
    path = tmp_path / "run.yaml"
    assert {code for code, _ in life.ranks(path, hooks=(None, "term_in_step_5"))} == {143}
    write(tmp_path / "run", launch__offload=not begun, optim__steps=6)
    for code, text in life.ranks(path):
        assert code == 3 and f"offload {begun} there, {not begun} now" in text, text
    for code, text in life.ranks(path, inexact=True):
        assert code == 0, text
    manifest = Artifact(tmp_path / "run" / "sft").verify()
    assert not manifest.training.exact_resume
    assert manifest.hardware.get("offload", False) is not begun


def test_a_checkpoint_has_a_part_of_each_process_and_nothing_pickled_of_the_model(straight):
    step = straight.checkpoints / "step-12"
    parts = sorted((step / checkpoints.SHARDED).iterdir())
    assert [path.name for path in parts] == [
        f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)
    ]
    sums = checkpoints.Sums.read(step)
    assert {f"sharded/{path.name}" for path in parts} < set(sums.files)
    assert not [name for name in sums.files if name.endswith((".pt", ".bin", ".metadata"))]
    sizes = [path.stat().st_size for path in parts]
    assert max(sizes) < 0.6 * sum(sizes)
    moments = 2 * sum(tensor.nbytes for tensor in weights(straight).values())
    assert sum(sizes) > 1.4 * moments


def test_a_damaged_part_is_passed_over(tmp_path, straight):
    shutil.copytree(straight.run, tmp_path / "run")
    artifact = type(straight)(tmp_path / "run" / "sft")
    step = artifact.checkpoints / "step-12"
    damage(step, rank=1)
    (problem,) = checkpoints.verify(step)
    assert problem.startswith("sharded/shard-00002-")
    assert checkpoints.verify(step, None, 1, 2) == [problem], "as its reader sees it"
    assert checkpoints.verify(step, None, 0, 2) == [], "who reads another part"
    assert checkpoints.verify(step, None, 0, 3) == [problem], "all of it, for another number"


def damage(step, rank):
    (name,) = files_of(step, rank)
    data = bytearray((step / name).read_bytes())
    data[len(data) // 2] ^= 1
    (step / name).write_bytes(data)


def files_of(step, rank):
    """The part of a process, with its sum."""
    begins = f"{checkpoints.SHARDED}/shard-{rank + 1:05}-"
    return {name: entry for name, entry in table(step).items() if name.startswith(begins)}


def test_each_process_has_hashed_its_part(straight):
    step = straight.checkpoints / "step-12"
    files = checkpoints.Sums.read(step).files
    parts = files_of(step, 0) | files_of(step, 1)
    assert len(parts) == 2 and parts.items() <= files.items()


@pytest.mark.faults
def test_what_one_process_finds_damaged_all_pass_over(tmp_path, straight):
    path = write(tmp_path / "run", optim__steps=12)
    assert {code for code, _ in life.ranks(path, hooks=(None, "term_in_step_8"))} == {143}
    artifact = Artifact(tmp_path / "run" / "sft")
    damage(artifact.checkpoints / "step-8", rank=1)
    resumed = life.pair(path)
    said = (tmp_path / "run.0.out").read_text()
    assert "checkpoint step-8 is damaged (sharded/shard-00002" in said
    assert life.essence(resumed) == life.essence(straight)


@pytest.mark.faults
@pytest.mark.parametrize(("one", "other"), [("fsdp", "ddp"), ("ddp", "fsdp")])
def test_another_strategy_does_not_go_on(tmp_path, one, other):
    stopped = life.ranks(write(tmp_path / "run", one), hooks=(None, "term_in_step_5"))
    assert {code for code, _ in stopped} == {143}, stopped
    for inexact in (False, True):
        for code, text in life.ranks(write(tmp_path / "run", other), inexact=inexact):
            assert code == 3 and f"were written with launch.strategy: {one}" in text, text


def test_nothing_starts_from_a_checkpoint_in_parts(tmp_path, straight):
    shutil.copytree(straight.run, tmp_path / "run")
    path = life.write(tmp_path / "run", name="child", model="artifact:sft@12")
    with pytest.raises(UserError, match="is a checkpoint in parts") as refused:
        life.command(path)
    assert refused.value.code == 3


@pytest.mark.faults
def test_an_adapter_goes_on_where_its_base_is_whole_and_back(tmp_path):
    """Its checkpoints are the same either way: two processes, one, and two again."""
    rows = [{"path": str(life.TINY / "rows.jsonl"), "limit": 36}]
    how = {"stage": "lora", "data__train": rows, "data__packing": False, "data__eval": {}}
    how |= {"evaluation": {}, "optim__batch_size": 6}
    straight = life.pair(write(tmp_path / "straight", **how))
    path = write(tmp_path / "run", **how)
    assert {code for code, _ in life.ranks(path, hooks=(None, "term_in_step_4"))} == {143}
    alone = write(tmp_path / "run", "ddp", **how, launch__processes=1)
    with pytest.raises(UserError, match="sharded True there, False now"):
        life.command(alone)
    ends = life.ranks(alone, hooks=("term_in_step_8",), inexact=True)
    assert [code for code, _ in ends] == [143], ends
    for code, text in life.ranks(write(tmp_path / "run", **how), inexact=True):
        assert code == 0, text
    resumed = type(straight)(tmp_path / "run" / "lora")
    assert not resumed.verify().training.exact_resume
    assert_alike(resumed, straight)


@pytest.mark.parametrize("stage", ["sft", life.by_the_dozen("dpo")])
def test_two_processes_one_and_two_again_are_one_training(tmp_path, stage):
    """One has all of the model, and reads and writes checkpoints in parts."""
    file = "pairs.jsonl" if stage == "dpo" else "rows.jsonl"
    how = {"stage": stage, "data__train": [{"path": str(life.TINY / file), "limit": 24}]}
    how |= {"optim__batch_size": 8, "optim__steps": 6, "launch__micro_batch_size": 2}
    how |= {"data__eval": {}, "evaluation": {}}
    how |= {"data__packing": False} if stage == "sft" else {}
    straight = life.pair(write(tmp_path / "straight", **how))
    path = write(tmp_path / "run", **how)
    assert {code for code, _ in life.ranks(path, hooks=(None, "term_in_step_2"))} == {143}
    alone = write(tmp_path / "run", **how, launch__processes=1)
    with pytest.raises(UserError, match="processes 2 there, 1 now"):
        life.command(alone)
    ends = life.ranks(alone, hooks=("term_in_step_4",), inexact=True)
    assert [code for code, _ in ends] == [143], ends
    for code, text in life.ranks(write(tmp_path / "run", **how), inexact=True):
        assert code == 0, text
    resumed = type(straight)(tmp_path / "run" / stage)
    assert not resumed.verify().training.exact_resume
    assert_alike(resumed, straight)


@pytest.mark.faults
def test_a_pretraining_goes_on_in_another_number_of_processes_and_back(tmp_path):
    """Two processes, three, and two again."""
    how = {"stage": "pretrain", "optim__batch_tokens": 384, "data__eval": {}, "evaluation": {}}
    how["architecture"] = TEXT["architecture"] | {"tied": False}  # 512 rows, and three processes
    straight = life.pair(write(tmp_path / "straight", **how))
    path = write(tmp_path / "run", **how)
    assert {code for code, _ in life.ranks(path, hooks=(None, "term_in_step_4"))} == {143}
    three = life.ranks(path, hooks=(None, None, "term_in_step_8"), inexact=True)
    assert {code for code, _ in three} == {143}, three
    for code, text in life.ranks(path, inexact=True):
        assert code == 0, text
    resumed = type(straight)(tmp_path / "run" / "pretrain")
    assert not resumed.verify().training.exact_resume
    assert_alike(resumed, straight)


@pytest.mark.faults
def test_another_number_of_processes_goes_on_where_that_is_allowed(tmp_path):
    """Three processes, by which no width divides, then two: other sums, and the same training
    within rounding."""
    rows = [{"path": str(life.TINY / "rows.jsonl"), "limit": 36}]  # in any order the same ones
    batch = {"optim__batch_size": 6, "data__train": rows, "data__packing": False}
    batch |= {"data__eval": {}, "evaluation": {}, "model": untied(tmp_path)}
    straight = life.pair(write(tmp_path / "straight", **batch))
    path = write(tmp_path / "run", **batch)
    three = life.ranks(path, hooks=(None, None, "term_in_step_5"))
    assert {code for code, _ in three} == {143}, three
    for code, text in life.ranks(path):
        assert code == 3 and "processes 3 there, 2 now" in text, text
    for code, text in life.ranks(path, inexact=True):
        assert code == 0, text
    resumed = type(straight)(tmp_path / "run" / "sft")
    assert not resumed.verify().training.exact_resume
    assert_alike(resumed, straight)


def test_weights_that_stayed_whole_are_no_training(tmp_path):
    """What looks at a model before the first step and does not put it back: an optimizer would
    hold the last weights as copies, and these would never learn."""
    for code, text in life.ranks(write(tmp_path / "run"), hooks=("never_in_parts_again",) * 2):
        assert code == 2, text
        assert "launch.strategy: fsdp" in text and "weights are not in parts" in text


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_auto_is_one_choice_of_all(tmp_path, stage):
    """Where one machine has less memory than the other, neither holds all of the model; also of one
    that is drawn."""
    path = write(tmp_path / "run", "auto", stage)
    for code, text in life.ranks(path, hooks=(None, "small_machine")):
        assert code == 0, text
    assert Artifact(tmp_path / "run" / stage).manifest().hardware["sharded"]
    assert "strategy: fsdp: " in (tmp_path / "run.0.out").read_text()


@pytest.mark.faults
def test_a_base_that_stayed_whole_is_no_base_in_parts(tmp_path):
    """An adapter on it learns as it should, in more memory than there may be."""
    path = write(tmp_path / "run", stage="lora", **ADAPTER)
    for code, text in life.ranks(path, hooks=("never_in_parts_again",) * 2):
        assert code == 2 and "of the frozen layers are not in parts" in text, text


@pytest.mark.faults
@pytest.mark.parametrize("hooks", [("another_part", None), (None, "another_part")])
def test_what_one_process_refuses_none_publishes(tmp_path, hooks):
    for code, text in life.ranks(write(tmp_path / "run", optim__steps=2), hooks=hooks):
        assert code == 3 and "is not the tensor that was trained" in text, text
    assert not (tmp_path / "run" / "sft" / "model").exists()


@pytest.mark.faults
@pytest.mark.parametrize("hooks", [("disk_full_in_parts_6", None), (None, "disk_full_in_parts_6")])
def test_a_disk_that_fills_up_under_one_part(tmp_path, straight, hooks):
    path = write(tmp_path / "run")
    for code, text in life.ranks(path, hooks=hooks):
        assert code == 5 and "No space left" in text, text
    assert life.essence(life.pair(path)) == life.essence(straight)


FULL = ("disk_full_in_publish", None)


@pytest.mark.faults
@pytest.mark.parametrize("how", [{}, ADAPTER], ids=["model", "adapter"])
def test_a_disk_that_is_full_under_the_process_that_publishes_ends_all(tmp_path, how):
    """The others gather with it to the end, and say what it says."""
    path = write(tmp_path / "run", optim__steps=2, **how)
    for code, text in life.ranks(path, hooks=FULL):
        assert code == 5 and "No space left" in text and "another process" not in text, text
    artifact = Artifact(tmp_path / "run" / "sft")
    assert not list(artifact.path.glob("*.staging")) and not artifact.finished
    assert life.pair(path).verify()


REFUSED = {
    "a quantized model is not put in parts": {"adapter": {}, "quantization": {"bits": 4}},
    "embeddings in parts do not learn": {"adapter": {"embeddings": "all"}},
    "adapter.dora reads weights that are whole": {"adapter": {"dora": True}},
    "adapter.init: pissa reads weights": {"adapter": {"init": "pissa"}},
    "adamw_8bit does not know parts": {"optim__optimizer": "adamw_8bit"},
    "paged_adamw does not know parts": {"optim__optimizer": "paged_adamw"},
    "no field of `trainer:`": {"trainer": {"neftune_noise_alpha": 5}},
    "layers in parts are not compiled": {"launch__compile": True},
    "all processes are on one machine": {"launch__strategy": "hsdp"},
}


NOT_OFFLOADED = {
    "launch.strategy is auto": {"launch__strategy": "auto"},
    "launch.strategy is ddp": {"launch__strategy": "ddp"},
    "one process alone has all of the model": {"launch__processes": 1},
    "not built beside an adapter": {"adapter": {}},
}


@pytest.mark.parametrize("words", NOT_OFFLOADED)
def test_what_is_not_offloaded_is_refused_with_its_line(tmp_path, words):
    changes = {"launch__processes": 2, "launch__strategy": "fsdp"} | OFFLOADED
    values = life.recipe(tmp_path / "run", **(SETTINGS | changes | NOT_OFFLOADED[words]))
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values, indent=1))
    lines = path.read_text().splitlines()
    number = next(number for number, line in enumerate(lines, 1) if '"offload"' in line)
    with pytest.raises(UserError) as refused:
        ahead.check([locate(path, schema("sft"))])
    assert refused.value.code == 2
    assert f"recipe.yaml:{number}: launch.offload: {words}" in str(refused.value)


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_obeyed_is_refused_with_its_line(tmp_path, words):
    changes = {"launch__processes": 2, "launch__strategy": "fsdp"} | REFUSED[words]
    values = life.recipe(tmp_path / "run", **(SETTINGS | changes))
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values, indent=1))
    number = next(
        number for number, line in enumerate(path.read_text().splitlines(), 1) if "sdp" in line
    )
    with pytest.raises(UserError) as refused:
        ahead.check([locate(path, schema("sft"))])
    text = str(refused.value)
    assert refused.value.code == 2
    asked = changes["launch__strategy"]
    assert f"recipe.yaml:{number}: launch.strategy: {asked}: " in text and words.strip() in text


@pytest.mark.faults
@pytest.mark.parametrize(("most", "sizes"), [(4, [1, 2, 4]), (2, [1, 2, 4, 2]), (1, [1, 2, 1])])
def test_a_micro_batch_grows_in_all_processes_together(tmp_path, most, sizes):
    """From the smallest, twice as much each time; and no trace is left of the tries."""
    changes = {"optim__batch_size": 8, "launch__activation_checkpointing": "auto"}
    path = write(tmp_path / "grown", **changes | {"launch__micro_batch_size": "auto"})
    for code, text in life.ranks(path, hooks=[f"memory_for_{most}"] * 2):
        assert code == 0, text
        assert [int(line.split()[1]) for line in text.splitlines() if "passing " in line] == sizes
    fixed = life.pair(write(tmp_path / "fixed", **changes | {"launch__micro_batch_size": most}))
    assert life.essence(Artifact(tmp_path / "grown" / "sft")) == life.essence(fixed)


@pytest.mark.faults
def test_parts_on_each_of_two_machines_and_a_copy_on_every_one(tmp_path):
    """Four processes as two and two, against one; and on from a checkpoint bit by bit."""
    changes = {"optim__batch_size": 8, "launch__micro_batch_size": 1}
    paths = [write(tmp_path / name, "hsdp", **changes) for name in ("straight", "stopped")]
    made = []
    for path in paths:
        hooks = ["two_machines"] * 4
        if path is paths[1]:
            hooks[2] = "two_machines_and_term_in_step_5"
            assert {code for code, _ in life.ranks(path, hooks=hooks)} == {143}
        for code, text in life.ranks(path, hooks=["two_machines"] * 4):
            assert code == 0, text
        made.append(Artifact(tmp_path / path.stem / "sft"))
    assert "2 copies, one a machine" in (tmp_path / "straight.0.out").read_text()
    assert life.essence(made[1]) == life.essence(made[0])
    assert made[0].verify().hardware["copies"] == 2
    alone = write(tmp_path / "alone", "auto", **changes | {"launch__micro_batch_size": 4})
    ((code, text),) = life.ranks(alone, hooks=[None])
    assert code == 0, text
    assert_alike(made[0], Artifact(tmp_path / "alone" / "sft"))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("kind", "words"),
    [({"embeddings": "all"}, "rows of embeddings"), ({"dora": True}, "dora beside its matrices")],
)
def test_an_adapter_that_has_more_than_matrices_is_refused(tmp_path, kind, words):
    """One that is trained on, whatever the recipe says of it."""
    begun = ADAPTER["adapter"] | kind
    life.command(write(tmp_path / "run", "ddp", "lora", adapter=begun, launch__processes=1))
    changes = {"model": "artifact:lora", "name": "on"}
    for code, text in life.ranks(write(tmp_path / "run", stage="lora", **changes)):
        assert code == 2 and "launch.strategy: fsdp" in text and words in text, text


@pytest.mark.faults
def test_tied_weights_that_do_not_divide_are_refused(tmp_path):
    """FSDP2 would compute with a head that never learns (512 rows, three processes): a published
    model is another one than the one that was trained, and nothing before says so."""
    path = write(tmp_path / "run", optim__batch_size=6)
    for code, text in life.ranks(path, hooks=(None, None, None)):
        assert code == 2 and "its 512 rows do not divide by 3 processes" in text, text


@pytest.mark.faults
def test_models_that_are_not_cut_or_would_have_to_grow_are_refused(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=rows(), n_positions=128, n_embd=32, n_layer=2, n_head=2)
    gpt2 = model_folder(tmp_path / "gpt2", GPT2LMHeadModel(config))
    few = LlamaConfig.from_pretrained(life.TINY / "model", vocab_size=rows() - 8)
    small = model_folder(tmp_path / "small", AutoModelForCausalLM.from_config(few))
    for folder, words in ((gpt2, "the layers of GPT2LMHeadModel"), (small, "does not grow")):
        for code, text in life.ranks(write(tmp_path / "run", model=str(folder), name=folder.name)):
            assert code == 2 and "launch.strategy: fsdp" in text and words in text, text
