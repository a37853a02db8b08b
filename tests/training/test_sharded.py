"""`launch.strategy: fsdp`: a model in parts, on two gloo processes and against two whole ones."""

from __future__ import annotations

import json
import shutil
import signal

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

from llmpipe.errors import UserError
from llmpipe.front import ahead
from llmpipe.recipe.check import locate
from llmpipe.run import checkpoints
from llmpipe.stages import schema
from tests import life

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


def write(run, strategy="fsdp", **changes):
    return life.write(run, **(SETTINGS | changes), launch__strategy=strategy)


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
    for mine, theirs in zip(lines(one), lines(other), strict=True):
        for name in ("loss", "eval_loss", "grad_norm", "num_tokens"):
            near = pytest.approx(theirs.get(name, 0), abs=1e-5, rel=1e-5)
            assert mine.get(name, 0) == near, (mine, theirs)
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], atol=1e-4, rtol=0), name
    said = [(each.path / "samples.jsonl").read_text() for each in (one, other)]
    assert said[0] == said[1]
    assert {p.name for p in one.model.iterdir()} == {p.name for p in other.model.iterdir()}
    configs = [json.loads((each.model / "config.json").read_text()) for each in (one, other)]
    assert configs[0] == configs[1]


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


@pytest.mark.faults
def test_experts_that_files_hold_one_by_one(tmp_path):
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
    folder = model_folder(tmp_path / "model", AutoModelForCausalLM.from_config(config))
    changes = {**PACKED, "model": str(folder), "optim__steps": 4}
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


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return life.pair(write(tmp_path_factory.mktemp("straight") / "run"))


@pytest.mark.parametrize(
    ("hooks", "codes"),
    [
        pytest.param((None, "term_in_step_5"), {143}, id="term"),
        life.by_the_dozen(("kill_after_checkpoint_6", None), {-signal.SIGKILL, 1, 5}),
        life.by_the_dozen((None, "kill_after_checkpoint_6"), {-signal.SIGKILL, 1, 5}),
        life.by_the_dozen((None, "kill_after_checkpoint_12"), {-signal.SIGKILL, 1, 5}),
        life.by_the_dozen(("kill_in_save_6", None), {-signal.SIGKILL, 1, 5}),
        life.by_the_dozen((None, "kill_in_stream"), {-signal.SIGKILL, 1, 5}),
        life.by_the_dozen(("kill_in_stream", None), {-signal.SIGKILL, 1, 5}),
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
    part = next((artifact.checkpoints / "step-12" / checkpoints.SHARDED).iterdir())
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    assert checkpoints.verify(artifact.checkpoints / "step-12")


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


REFUSED = {
    "of all weights, not for reward yet": {"stage": "reward", "samples": None},
    "not for an adapter yet": {"adapter": {}},
    "adamw_8bit does not know parts": {"optim__optimizer": "adamw_8bit"},
    "paged_adamw does not know parts": {"optim__optimizer": "paged_adamw"},
    "no field of `trainer:`": {"trainer": {"neftune_noise_alpha": 5}},
    "layers in parts are not compiled": {"launch__compile": True},
    "what fits in memory is not measured": {"launch__micro_batch_size": "auto"},
    "what fits in memory is not measured ": {"launch__activation_checkpointing": "auto"},
    "1 process has nobody": {"launch__processes": 1},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_obeyed_is_refused_with_its_line(tmp_path, words):
    changes = {"launch__processes": 2, "launch__strategy": "fsdp"} | REFUSED[words]
    stage = changes.get("stage", "sft")
    if stage == "reward":
        changes["data__train"] = [{"path": str(life.TINY / "pairs.jsonl")}]
    values = life.recipe(tmp_path / "run", **(SETTINGS | changes))
    values = {name: value for name, value in values.items() if value is not None}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values, indent=1))
    number = next(
        number for number, line in enumerate(path.read_text().splitlines(), 1) if "fsdp" in line
    )
    with pytest.raises(UserError) as refused:
        ahead.check([locate(path, schema(stage))])
    text = str(refused.value)
    assert refused.value.code == 2
    assert f"recipe.yaml:{number}: launch.strategy: fsdp: " in text and words.strip() in text


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
