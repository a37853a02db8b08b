"""`launch.strategy: zero2` and `zero3`: DeepSpeed on gloo processes, against one process without.

Where it is not installed, what asks for it is refused, and no more is tested.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from llmpipe import noise
from llmpipe.errors import LOST, UserError
from llmpipe.front import ahead
from llmpipe.parallel import zero
from llmpipe.recipe.check import locate
from llmpipe.run import checkpoints, launcher, strategy
from llmpipe.run.artifact import Artifact
from llmpipe.stages import schema
from tests import life
from tests.training.test_sharded import (
    ADAPTER,
    PACKED,
    PAIRS,
    SETTINGS,
    assert_alike,
    experts,
    lines,
    untied,
    write,
)
from tests.training.test_sharded import weights as tensors_of

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)

ADAPTERS = [
    {"adapter": ADAPTER["adapter"] | more}
    for more in ({"embeddings": "all"}, {"dora": True}, {"init": "pissa"})
]
STREAMED = {"data__stream": True, "data__eval": {}, "evaluation": {}}
ALIKE = [
    pytest.param("sft", 3, PACKED, id="sft"),
    pytest.param("dpo", 2, {"optim__steps": 3}, id="dpo"),
    life.by_the_dozen("sft", 2, PACKED),
    life.by_the_dozen("sft", 3, {"launch__activation_checkpointing": "selective"}),
    life.by_the_dozen("pretrain", 2, {}),
    life.by_the_dozen("pretrain", 3, {}),
    life.by_the_dozen("reward", 2, {}),
    life.by_the_dozen("reward", 3, {}),
    life.by_the_dozen("dpo", 3, {"optim__steps": 3}),
    life.by_the_dozen("kto", 2, {"optim__steps": 3}),
    life.by_the_dozen("kto", 3, {"optim__steps": 3}),
    life.by_the_dozen("lora", 2, {"optim__steps": 3}),
    life.by_the_dozen("dpo", 2, {"optim__steps": 3, **ADAPTER}),
    *(life.by_the_dozen("lora", 2, adapter | {"optim__steps": 3}) for adapter in ADAPTERS),
    life.by_the_dozen("pretrain", 3, STREAMED),
]


def made(run, stage, zero, processes=2, **changes):
    """What so many processes make under ZeRO."""
    path = write(run, f"zero{zero}", stage, **changes)
    for code, text in life.ranks(path, hooks=(None,) * processes):
        assert code == 0, f"exit code {code}:\n{text}"
    artifact = Artifact(run / stage)
    manifest = artifact.verify()
    assert manifest.hardware["zero"] == zero and manifest.hardware["processes"] == processes
    return artifact


def differs_by(artifact):
    """How far the logits of what was reloaded are from those of what was trained."""
    return artifact.manifest().verified["max_logit_difference"]


@needs_deepspeed
@pytest.mark.parametrize(("stage", "zero", "changes"), ALIKE)
def test_two_processes_under_zero_are_one_without(tmp_path, stage, zero, changes):
    """Held-out rows are measured and prompts answered before the first step; in none of the stages
    do rows divide by processes and micro-batches.
    """
    parts = made(tmp_path / "parts", stage, zero, **changes)
    path = write(tmp_path / "alone", "ddp", stage, **changes, launch__processes=1)
    alone = life.command(path)
    assert_alike(parts, alone)
    # a base that an adapter was taken out of gives it back but for rounding
    assert differs_by(parts) < 1e-5 and (differs_by(parts) > 0) == (differs_by(alone) > 0)
    assert parts.manifest().final.get("reference") == alone.manifest().final.get("reference")


@needs_deepspeed
@pytest.mark.faults
@pytest.mark.parametrize("kind", [untied, experts])
def test_other_models_in_parts(tmp_path, kind):
    """A head of its own is read and never runs; of the experts not all see a token."""
    model = {"model": kind(tmp_path), "optim__steps": 3}
    alone = life.command(write(tmp_path / "alone", "ddp", **model, launch__processes=1))
    parts = made(tmp_path / "parts", "sft", 3, **model)
    assert_alike(parts, alone)
    assert differs_by(parts) == 0


@needs_deepspeed
@pytest.mark.faults
@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_arithmetic_in_bf16(tmp_path, stage, zero):
    """It is autocast's, as under DDP, and weights stay in fp32."""
    changes = {"optim__precision": "bf16", "optim__steps": 3}
    parts = made(tmp_path / "parts", stage, zero, **changes)
    whole = life.pair(write(tmp_path / "whole", "ddp", stage, **changes))
    for mine, theirs in zip(lines(parts), lines(whole), strict=True):
        for name in ("loss", "eval_loss"):
            assert mine.get(name, 0) == pytest.approx(theirs.get(name, 0), abs=1e-4)
    assert {tensor.dtype for tensor in tensors_of(parts).values()} == {torch.float32}


@needs_deepspeed
@pytest.mark.faults
@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_leaves_no_trace(tmp_path, zero, processes):
    """Between two checkpoints, after one, and where nothing but publishing was left."""
    straight = made(tmp_path / "straight", "sft", zero, processes)
    path = write(tmp_path / "run", f"zero{zero}")
    for hook, codes in {
        "term_in_step_2": {143},
        "kill_after_checkpoint_6": {-signal.SIGKILL, 1, LOST},
        "kill_after_checkpoint_12": {-signal.SIGKILL, 1, LOST},
    }.items():
        ends = life.ranks(path, hooks=(*[None] * (processes - 1), hook))
        assert {code for code, _ in ends} <= codes, ends
    resumed = made(tmp_path / "run", "sft", zero, processes)
    assert "resuming from step-" in path.with_suffix(".0.out").read_text()
    assert life.essence(resumed) == life.essence(straight)
    assert resumed.manifest().training.exact_resume


@needs_deepspeed
@pytest.mark.faults
@pytest.mark.parametrize("zero", [2, 3])
def test_the_best_step_is_kept_and_other_numbers_of_processes_go_on(tmp_path, zero):
    """What a checkpoint holds does not depend on who wrote it, or at which stage."""
    best = {"evaluation": {"every": 3, "keep_best": True}, "optim__learning_rate": 3e-2}
    straight = life.command(write(tmp_path / "alone", "ddp", **best, launch__processes=1))
    assert straight.manifest().training.published_step < 12
    run = tmp_path / "run"
    path = write(run, f"zero{zero}", **best)
    assert {code for code, _ in life.ranks(path, hooks=(None, "term_in_step_5"))} == {143}
    ((code, text),) = life.ranks(path, hooks=(None,))
    assert code == 3 and "processes 2 there, 1 now" in text
    path = write(run, f"zero{5 - zero}", **best)
    ((code, text),) = life.ranks(path, hooks=(None,), inexact=True)
    assert code == 0, text
    artifact = Artifact(run / "sft")
    training = artifact.verify().training
    assert not training.exact_resume
    assert training.published_step == straight.manifest().training.published_step
    mine, theirs = map(tensors_of, (artifact, straight))
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], atol=1e-3, rtol=0), name


@needs_deepspeed
def test_a_process_holds_its_part_and_saves_it_without_a_pickle(tmp_path):
    path = write(tmp_path / "run", "zero3", optim__steps=3)
    for code, text in life.ranks(path, hooks=["says_what_zero_holds"] * 2):
        assert code == 0, text
        said = [line.split() for line in text.splitlines() if line.startswith("of ")][-1]
        numbers, held, moments, processes = int(said[1]), int(said[3]), int(said[5]), said[7]
        assert processes == "2"
        assert numbers <= 2 * held < 1.02 * numbers and numbers <= moments < 1.02 * numbers
        layers = [line.removeprefix("by ") for line in text.splitlines() if line.startswith("by ")]
        assert set(layers[:-1]) == {"zero3_linear_wrap"} and layers[-1] == "linear"
    step = Artifact(tmp_path / "run" / "sft").checkpoints / "step-3"
    files = checkpoints.Sums.read(step).files
    parts = [name for name in files if name.startswith("sharded/")]
    assert parts == [f"sharded/shard-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert not [name for name in files if name.endswith((".pt", ".bin", ".py"))]
    assert checkpoints.verify(step) == []


@needs_deepspeed
def test_another_engine_than_the_one_asked_for_is_no_training(tmp_path):
    for code, text in life.ranks(write(tmp_path / "run", "zero2"), hooks=["another_stage_of_zero"]):
        assert code == 2 and "launch.strategy: zero2: DeepSpeed's engine is not in effect" in text
        assert "stage 1, 1 processes" in text


@needs_deepspeed
@pytest.mark.faults
@pytest.mark.parametrize("hooks", [("disk_full_in_parts_6", None), (None, "disk_full_in_parts_6")])
def test_a_disk_that_fills_up_under_one_part(tmp_path, hooks):
    for code, text in life.ranks(write(tmp_path / "run", "zero2"), hooks=hooks):
        assert code == 5 and "No space left" in text, text


@needs_deepspeed
@pytest.mark.faults
def test_nan_stops_and_publishes_nothing(tmp_path):
    path = write(tmp_path / "run", "zero2", optim__learning_rate=1e30, optim__warmup=0)
    for code, text in life.ranks(path):
        assert code == 4 and "; stopped" in text and "before the optimizer" not in text, text
    assert not (tmp_path / "run" / "sft" / "model").exists()


@needs_deepspeed
@pytest.mark.faults
@pytest.mark.parametrize(("one", "other"), [("zero3", "ddp"), ("ddp", "zero2"), ("fsdp", "zero2")])
def test_another_strategy_does_not_go_on(tmp_path, one, other):
    stopped = life.ranks(write(tmp_path / "run", one), hooks=(None, "term_in_step_5"))
    assert {code for code, _ in stopped} == {143}, stopped
    for code, text in life.ranks(write(tmp_path / "run", other), inexact=True):
        assert code == 3 and f"were written with launch.strategy: {one}" in text, text


@needs_deepspeed
@pytest.mark.faults
def test_stages_of_one_launch_have_each_their_own_strategy(tmp_path):
    """An outside launcher's process makes one after the other, and ZeRO leaves nothing behind: not
    to a stage that is no trainer's, nor to one after it.
    """
    run = tmp_path / "run"
    text = {"task": "perplexity", "data": [{"path": str(life.TINY / "rows.jsonl"), "limit": 8}]}
    stages = [
        asked(run, "first", str(life.TINY / "model"), "zero2"),
        {"stage": "eval", "models": {"first": "artifact:first"}, "tasks": [text]},
        asked(run, "second", "artifact:first", "zero3"),
        asked(run, "third", "artifact:second", "auto"),
    ]
    path = tmp_path / "pipeline.yaml"
    path.write_text(json.dumps({"run": str(run), "stages": stages}))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "-m", "llmpipe", "run", str(path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = [Artifact(run / name).verify().hardware for name in ("first", "second", "third")]
    assert [hardware.get("zero") for hardware in made] == [2, 3, None]


def asked(run, name, model, strategy):
    """A stage of a pipeline, of two steps."""
    changes = {"optim__steps": 2, "launch__processes": "auto", "launch__strategy": strategy}
    stage = life.recipe(run, **changes, name=name, model=model)
    del stage["run"]
    return stage


# --- what only a GPU meets ---


def test_on_a_gpu_nobody_looks_for_a_compiler(monkeypatch):
    """DeepSpeed asks compilers and cards for its table of what it could build, once it is read."""
    logger = SimpleNamespace(setLevel=lambda level: None)
    double = SimpleNamespace(ops=SimpleNamespace(), utils=SimpleNamespace(logger=logger))
    monkeypatch.setitem(sys.modules, "deepspeed", double)
    monkeypatch.setitem(sys.modules, "deepspeed.utils", double.utils)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    zero._import_quietly("cuda")


@needs_deepspeed
def test_a_reference_rounds_inside_an_engine_that_stops_a_cards_autocast(monkeypatch):
    """As held-out pairs are measured: there only a card's autocast is asked for, and it says so."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    zero._import_quietly("cpu")
    from deepspeed.runtime import torch_autocast

    noise.silence()
    said = []
    monkeypatch.setattr(torch_autocast, "dist", SimpleNamespace(get_rank=lambda: 0))
    monkeypatch.setattr(torch_autocast.logger, "handle", said.append)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: True)
    engine = SimpleNamespace(torch_autocast_enabled=lambda: False)
    plain, reference = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    autocast = torch.autocast("cpu", torch.bfloat16)
    zero.computing(reference, autocast)
    with autocast, torch_autocast.autocast_if_enabled(engine):
        assert plain(torch.ones(4)).dtype == torch.float32, "the engine has stopped it"
        given = reference(torch.ones(4))
        with autocast:
            rounded = reference.plain_forward(torch.ones(4))
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(given, rounded.float()) and given.dtype == torch.float32
    records = [record for record in said if torch_autocast.logger.filter(record)]
    assert said and not records


# --- refused at the door ---

REFUSED = {
    "a quantized model is not put in parts": {"adapter": {}, "quantization": {"bits": 4}},
    "beside an adapter, DeepSpeed does not gather": {"adapter": {}, "launch__strategy": "zero3"},
    "adamw_8bit is not tried with it": {"optim__optimizer": "adamw_8bit"},
    "no field of `trainer:`": {"trainer": {"neftune_noise_alpha": 5}},
    "layers are not compiled under an engine": {"launch__compile": True},
    "precompute: true has an engine of its own": {"stage": "dpo", **PAIRS, "precompute": True},
}


def refusal(tmp_path, **changes):
    """What is said of a recipe, whose line with the strategy is called HERE."""
    changes = SETTINGS | {"launch__processes": 2, "launch__strategy": "zero2"} | changes
    values = life.recipe(tmp_path / "run", **changes)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values, indent=1))
    texts = path.read_text().splitlines()
    number = next(number for number, text in enumerate(texts, 1) if '"strategy"' in text)
    with pytest.raises(UserError) as refused:
        ahead.check([locate(path, schema(values["stage"]))])
    assert refused.value.code == 2
    return str(refused.value).replace(f"{path}:{number}: ", "HERE: ")


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_obeyed_is_refused_with_its_line(tmp_path, words):
    asked = REFUSED[words].get("launch__strategy", "zero2")
    assert f"HERE: launch.strategy: {asked}: {words}" in refusal(tmp_path, **REFUSED[words])


def test_without_deepspeed_it_is_named(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepspeed" else found(name)
    )
    text = refusal(tmp_path)
    assert "HERE: launch.strategy: deepspeed is not installed" in text
    assert "pip install 'llmpipe[zero]'" in text


def test_on_a_gpu_the_micro_batch_is_named(tmp_path, monkeypatch):
    """What fits is measured by a pass, which no engine makes before the training."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    text = refusal(tmp_path, launch__micro_batch_size="auto")
    assert "zero2: what fits in a GPU's memory is not measured with it" in text


def test_what_is_offloaded_is_another_strategys(tmp_path):
    text = refusal(tmp_path, launch__offload=True)
    assert "launch.offload: launch.strategy is zero2" in text


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_what_draws_has_a_loop_of_its_own(stage):
    path = life.ROOT / "recipes" / f"{stage}.yaml"
    located = locate(path, schema(stage), ["launch.strategy=zero2"])
    ((problem, remedy),) = strategy.against_zero(located.recipe, 2)
    assert problem.startswith(f"not built in {stage}") and "fsdp" in remedy


def test_a_launchers_fsdp_is_another_strategy(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    path = life.ROOT / "recipes" / "alpaca.yaml"
    located = locate(path, schema("sft"), ["launch.strategy=zero3"])
    with pytest.raises(UserError, match=r"launch\.strategy: zero3: take one of them"):
        launcher.obeyed(located.recipe)
