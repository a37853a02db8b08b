"""What a training takes by a model's shape, and which strategy `auto` is."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from llmpipe.recipe.check import load
from llmpipe.run import machine, strategy
from llmpipe.run.folders import tensors_of
from llmpipe.run.footprint import HEAD, Held, Pass, Shape, of_llama
from llmpipe.stages import schema
from tests import life

RECIPES = life.ROOT / "recipes"
GPU = strategy.Room(processes=8, memory=80 * 2**30, on_gpu=True, bf16=True)


def config_of(name):
    return json.loads((RECIPES / "shapes" / name).read_text())


def shape_of(name):
    config = config_of(name)
    return Shape.of(config, of_llama(config))


def recipe(**launch):
    asked = load(RECIPES / "llama-8b-fsdp.yaml", schema("sft"))
    return asked.model_copy(update={"launch": asked.launch.model_copy(update=launch)})


@pytest.mark.parametrize(
    ("name", "weights"), [("llama-3.1-8b.json", 8_030_261_248), ("qwen3-32b.json", 32_762_123_264)]
)
def test_a_shape_has_as_many_weights_as_its_makers_say(name, weights):
    assert shape_of(name).weights == weights


def test_a_shape_by_its_configuration_is_the_one_in_its_files():
    folder = life.TINY / "model"
    config = json.loads((folder / "config.json").read_text())
    written = {name: tensor.shape for name, tensor in tensors_of(folder).items()}
    assert of_llama(config) == written
    assert Shape.of_folder(folder) == Shape.of(config, written)


def test_other_kinds_of_models_are_not_guessed_at():
    with pytest.raises(ValueError, match="the tensors of gpt2 are not known"):
        of_llama({"model_type": "gpt2"})
    assert Shape.of({"model_type": "odd"}, {"a": (2, 2)}) is None


def test_whole_and_in_parts():
    """16 bytes a weight, and of a model in parts an eighth of each."""
    shape, longest = shape_of("llama-3.1-8b.json"), Pass(1024, bf16=True, kind="full")
    one, whole, parts = (Held.of(shape, recipe(), longest, *n) for n in ((1,), (8,), (8, 8)))
    weights = shape.weights
    assert (whole.weights, whole.gradients, whole.moments) == (
        4 * weights,
        4 * weights,
        8 * weights,
    )
    assert whole.copies == 6 * weights and one.copies == 2 * weights, "buckets and bf16"
    assert parts.weights + parts.gradients + parts.moments == pytest.approx(2 * weights)
    layer = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 2 * 4096
    outside = 2 * 128256 * 4096 + 4096
    assert (shape.layer, shape.outside) == (layer, outside)
    assert parts.copies == 2 * (2 * layer + outside) + 4 * (layer + outside)
    # a layer keeps its input in fp32; one of them is computed again
    again = 2 * 4096 * 10 + 2 * 2 * (4096 + 1024) + 4 * 2 * 14336
    assert parts.activations == whole.activations == HEAD + 1024 * (32 * 4 * 4096 + again)


def test_parts_in_the_hosts_memory():
    """All but what is computed with; of a model that is whole, nothing."""
    shape, longest = shape_of("llama-3.1-8b.json"), Pass(1024, bf16=True, kind="full")
    parts = Held.of(shape, recipe(), longest, 8, 8)
    offloaded = Held.of(shape, recipe(offload=True), longest, 8, 8)
    assert offloaded.host == parts.weights + parts.gradients + parts.moments == 2 * shape.weights
    assert offloaded.total == parts.total - offloaded.host == parts.copies + parts.activations
    whole = Held.of(shape, recipe(), longest, 8)
    assert Held.of(shape, recipe(offload=True), longest, 8) == whole and whole.host == 0


def test_a_checkpoint_is_copied_with_its_moments():
    """12 bytes of each number that learns, which an adapter has few of; none where it is written
    at once."""
    shape, longest = shape_of("llama-3.1-8b.json"), Pass(1024, bf16=True, kind="full")
    whole, parts = (Held.of(shape, recipe(), longest, 8, count) for count in (1, 8))
    assert (whole.checkpoint, parts.checkpoint) == (12 * shape.weights, 12 * shape.weights / 8)
    assert Held.under_zero(shape, recipe(strategy="zero2"), longest, 8).checkpoint == (
        parts.checkpoint
    )
    at_once = recipe()
    at_once = at_once.model_copy(
        update={"checkpoint": at_once.checkpoint.model_copy(update={"asynchronous": False})}
    )
    assert Held.of(shape, at_once, longest, 8).checkpoint == 0
    asked = recipe()
    optim = asked.optim.model_copy(update={"optimizer": "paged_adamw_8bit"})
    eight = Held.of(shape, asked.model_copy(update={"optim": optim}), longest, 8)
    assert eight.checkpoint == (4 + 2) * shape.weights and eight.moments == 0


@pytest.mark.parametrize(("stage", "weights"), [(2, 4 + 4 / 8), (3, 4 / 8)])
def test_parts_under_zero(stage, weights):
    """Gradients and moments, with stage 3 weights; with stage 2 a part of these is there twice."""
    shape, longest = shape_of("llama-3.1-8b.json"), Pass(1024, bf16=True, kind="full")
    held = Held.under_zero(shape, recipe(strategy=f"zero{stage}"), longest, 8)
    assert held.weights == weights * shape.weights
    assert (held.gradients, held.moments) == (shape.weights / 2, shape.weights)
    of_weights = shape.weights if stage == 2 else 2 * shape.layer + shape.outside
    in_bf16, gathered = 2 * of_weights, 4 * of_weights * (stage == 3)
    assert held.copies == 2 * 4 * 500_000_000 + in_bf16 + gathered
    assert held.activations == Held.of(shape, recipe(), longest, 8).activations


def test_an_adapter_on_what_lies_in_four_bits():
    asked = load(RECIPES / "qwen-32b-qlora.yaml", schema("qlora"))
    shape = shape_of("qwen3-32b.json")
    held = Held.of(shape, asked, Pass(1, bf16=True, kind="full"), 1)
    sides = 64 * ((5120 + 8192) * 2 + 2 * (5120 + 1024) + 3 * (5120 + 25600))
    assert shape.sides == sides
    assert held.gradients == 4 * 32 * sides and held.moments == 8 * 32 * sides
    frozen = held.weights - 4 * 32 * sides
    layers = shape.weights - shape.outside
    assert frozen == pytest.approx(layers * 4.13 / 8 + 4 * shape.outside), "as PEFT makes them"


def compared(stage, **changes):
    asked = load(RECIPES / "tiny" / f"{stage}.yaml", schema(stage))
    launch = asked.launch.model_copy(update={"micro_batch_size": 1})
    return asked.model_copy(update={"launch": launch, **changes})


def test_what_learns_from_pairs_passes_two_and_holds_a_reference():
    """Which is loaded in fp32, and not at all where it has said all beforehand."""
    shape = shape_of("llama-3.1-8b.json")
    longest = Pass(1, bf16=True, kind="full")
    for stage, references, sequences in (("dpo", 1, 2), ("kto", 1, 1), ("reward", 0, 2)):
        asked = compared(stage)
        held = Held.of(shape, asked, longest, 1)
        assert held.weights == (1 + references) * 4 * shape.weights
        one = replace(GPU, processes=1)
        assert strategy.longest_pass(asked, one).tokens == sequences * asked.longest
    beforehand = Held.of(shape, compared("dpo", precompute=True), longest, 1)
    assert beforehand.weights == 4 * shape.weights


def test_ppo_holds_its_actors_and_is_whole_while_it_draws():
    shape, longest = shape_of("llama-3.1-8b.json"), Pass(1, bf16=True, kind="full")
    asked = load(RECIPES / "tiny" / "ppo.yaml", schema("ppo"))
    scored = [each.model_copy(update={"model": "some/model"}) for each in asked.reward * 2]
    asked = asked.model_copy(update={"reward": [*asked.reward, *scored]})
    trunk = asked.model_copy(update={"critic": asked.critic.model_copy(update={"start": "trunk"})})
    weights, outside = shape.weights, shape.outside
    whole, parts = (Held.of(shape, asked, longest, 8, n) for n in (1, 8))
    reference = 2 * (weights - outside) + 4 * outside
    assert whole.weights == 2 * 4 * weights + reference + 2 * 2 * weights
    assert whole.moments == 2 * 8 * weights
    assert Held.of(shape, trunk, longest, 8).moments == 8 * weights
    assert parts.weights == (3 * 4 * weights + 2 * 2 * weights) / 8
    assert parts.copies == 2 * weights, "in bf16, of which no process has more than one at a time"
    many = asked.launch.model_copy(update={"rollout_batch_size": 10**4})
    drawing = Held.of(shape, asked.model_copy(update={"launch": many}), longest, 8)
    assert drawing.activations == 2 * 2 * 1024 * 32 * 10**4 * asked.longest


def test_grpo_holds_a_policy_and_a_reference_where_there_is_one():
    shape, longest = shape_of("llama-3.1-8b.json"), Pass(1, bf16=True, kind="full")
    held = load(RECIPES / "tiny" / "grpo.yaml", schema("grpo"))
    none = held.reference.model_copy(update={"coefficient": 0.0})
    free = held.model_copy(update={"reference": none})
    weights, outside = shape.weights, shape.outside
    alone, beside = (Held.of(shape, asked, longest, 1) for asked in (free, held))
    assert alone.weights == 4 * weights and alone.moments == beside.moments == 8 * weights
    assert beside.weights == alone.weights + 2 * (weights - outside) + 4 * outside


# --- auto -----------------------------------------------------------------------------------------


@pytest.fixture
def one_machine(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_what_does_not_fit_whole_is_put_in_parts(one_machine):
    shape, asked = shape_of("llama-3.1-8b.json"), recipe(strategy="auto")
    sharded, why = strategy.choose(asked, GPU, shape, {})
    assert sharded
    assert why == "179.9 GiB a process under ddp, 80.0 GiB a device; 37.8 GiB in parts of 8"
    ample = replace(GPU, memory=200 * 2**30)
    assert strategy.choose(asked, ample, shape, {}) == (
        False,
        "179.9 GiB a process under ddp, 200.0 GiB a device",
    )
    tight = replace(GPU, memory=199 * 2**30)
    assert strategy.choose(asked, tight, shape, {}).sharded, "a tenth of a device is left"


def test_auto_keeps_to_what_is_refused_and_to_its_checkpoint(one_machine):
    shape = shape_of("llama-3.1-8b.json")
    compiled = recipe(strategy="auto", compile=True)
    sharded, why = strategy.choose(compiled, GPU, shape, {})
    assert not sharded and why.endswith("80.0 GiB a device; fsdp: layers in parts are not compiled")
    auto = recipe(strategy="auto")
    assert strategy.choose(auto, GPU, shape, {"sharded": False, "device": "cuda"}).sharded is False
    ample = replace(GPU, memory=math.inf)
    assert strategy.choose(auto, ample, shape, {"sharded": True}).sharded
    assert not strategy.choose(auto, replace(GPU, processes=1), shape, {}).sharded
    assert not strategy.choose(auto, GPU, None, {}).sharded
    for asked in ("ddp", "fsdp"):
        named = strategy.choose(recipe(strategy=asked), GPU, shape, {})
        assert named == (asked == "fsdp", "")


def test_ppo_says_what_does_not_fit(one_machine):
    shape, asked = shape_of("llama-3.1-8b.json"), load(RECIPES / "tiny" / "ppo.yaml", schema("ppo"))
    launch = {"processes": 8, "micro_batch_size": 1, "strategy": "auto"}
    launch = asked.launch.model_copy(update=launch | {"activation_checkpointing": "full"})
    optim = asked.optim.model_copy(update={"batch_size": 8})
    asked = asked.model_copy(update={"launch": launch, "optim": optim})
    sharded, why = strategy.choose(asked, GPU, shape, {})
    assert not sharded and why.endswith("by launch.strategy: fsdp, which auto is not in ppo")


def test_a_control_group_bounds_the_memory(tmp_path, monkeypatch):
    most = machine.memory()
    assert most > 2**28
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "job" / "memory.max").write_text("1048576\n")
    (tmp_path / "job" / "step" / "memory.max").write_text("2097152\n")
    (tmp_path / "cgroup").write_text("1:name=systemd:/other\n0::/job/step\n")
    assert machine.memory(tmp_path / "cgroup", tmp_path) == 2**20
    assert machine.memory(tmp_path / "absent", tmp_path) >= most


def test_what_is_free_counts_what_the_system_gives_back(tmp_path):
    """Of the machine, and of a control group: pages of files go when others are asked for."""
    system = tmp_path / "meminfo"
    system.write_text("MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 3000 kB\nHugePages: 0\n")
    (tmp_path / "cgroup").write_text("0::/job\n")
    group = tmp_path / "job"
    group.mkdir()
    assert machine.free_memory(tmp_path / "cgroup", tmp_path, system) == 3000 << 10
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 200000\nactive_file 300000\ninactive_file 50000\n")
    assert machine.free_memory(tmp_path / "cgroup", tmp_path, system) == 450_000
    (group / "memory.current").write_text("1400000\n")
    assert machine.free_memory(tmp_path / "cgroup", tmp_path, system) == 0
    most = machine.memory(tmp_path / "cgroup", tmp_path)
    assert machine.free_memory(tmp_path / "cgroup", tmp_path, tmp_path / "none") == most
