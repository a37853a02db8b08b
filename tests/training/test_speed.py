"""What makes training fast and must not change it: compiled layers, batches in few shapes, and a
device that is asked for a number once a step.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from llmpipe import upstream
from llmpipe.kernels import apart
from llmpipe.models.load import speed_up
from llmpipe.recipe.check import load
from llmpipe.run.artifact import Artifact
from llmpipe.stages import schema
from llmpipe.training.heldout import HeldOut
from llmpipe.training.hosted import Durable
from llmpipe.training.judged import JudgedTrainer
from llmpipe.upstream import layers
from tests import life
from tests.rl.reads import counted

COMPILER = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(
    COMPILER is None, reason="layers for a CPU are compiled by g++ or clang++"
)


def metric(artifact, name):
    lines = (artifact.path / "metrics.jsonl").read_text().splitlines()
    return [line[name] for line in map(json.loads, lines) if name in line]


def in_a_batch(query, key, value, ends, how):
    """Attention as on a GPU whose kernel for rows does not fit: no length is read."""
    return apart.attend_documents(query, key, value, ends, 64, how)


LORA = {"stage": "lora", "adapter__rank": 4}


@pytest.mark.parametrize(
    "of_stage",
    [{"data__packing": True}, {"data__packing": False}, LORA | {"data__packing": True}],
    ids=["packed", "unpacked", "lora"],
)
@pytest.mark.faults
@needs_compiler
def test_compiled_layers_learn_the_same_and_resume_to_the_bit(tmp_path, of_stage):
    def recipe(name, **changes):
        changes |= of_stage | {"optim__steps": 6, "log__every": 1}
        return life.write(tmp_path / name, **changes)

    stage = of_stage.get("stage", "sft")

    plain = life.command(recipe("plain"))
    straight = life.Trial(recipe("straight", launch__compile=True))
    assert straight.wait() == 0, straight.text()
    compiled = Artifact(tmp_path / "straight" / stage)
    assert metric(compiled, "loss") == pytest.approx(metric(plain, "loss"), abs=1e-4)
    counts = metric(compiled, "compilations")
    assert counts[-1] == counts[1]  # nothing is compiled after the first steps
    assert "compile: layers are compiled" in straight.text()

    path = recipe("killed", launch__compile=True)
    assert life.Trial(path, hook="kill_after_checkpoint_3").wait() != 0
    again = life.Trial(path)
    assert again.wait() == 0, again.text()
    resumed = Artifact(tmp_path / "killed" / stage)
    assert life.essence(resumed) == life.essence(compiled)
    assert resumed.manifest().training.exact_resume


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["dpo", "reward", "ppo"])
@needs_compiler
def test_other_stages_compile_too(tmp_path, stage):
    written = (life.TINY / f"{stage}.yaml").read_text()
    here = written.replace("artifact:sft", str(life.TINY / "model"))
    here = here.replace("./recipes/tiny", str(life.TINY))
    made = []
    for name, value in (("plain", "false"), ("compiled", "true")):
        path = tmp_path / f"{name}.yaml"
        path.write_text(here.replace("runs/tiny", str(tmp_path / name)))
        sets = [f"launch.compile={value}", "optim.steps=3", "log.every=1"]
        made.append(life.command(path, sets))
    plain, compiled = made
    assert metric(compiled, "loss") == pytest.approx(metric(plain, "loss"), abs=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own tracing, which fails
# one of them traces what is kept and what is computed again
@pytest.mark.parametrize("again", ["selective", *map(life.by_the_dozen, ("none", "full"))])
def test_traced_layers_learn_the_same(tmp_path, monkeypatch, again):
    """All of a compilation but the machine code, which takes a minute on a CPU; with attention as
    on a GPU, which a compiler sees through."""
    compile_layer = GradientCheckpointingLayer.compile
    monkeypatch.setattr(
        GradientCheckpointingLayer,
        "compile",
        lambda layer, dynamic: compile_layer(layer, backend="aot_eager", dynamic=dynamic),
    )
    monkeypatch.setattr(upstream.attention, "_on_the_host", in_a_batch)
    torch._dynamo.reset()
    left = layers.left_as_written()
    changes = {"data__packing": True, "optim__steps": 4, "log__every": 1}
    changes["launch__activation_checkpointing"] = again
    plain = life.command(life.write(tmp_path / "plain", **changes))
    traced = life.command(life.write(tmp_path / "traced", **changes, launch__compile=True))
    assert metric(traced, "loss") == pytest.approx(metric(plain, "loss"), abs=1e-5)
    # before, in and after the steps; afterwards recomputed layers are asked for a gradient as well
    evaluated, *learned, _ = metric(traced, "compilations")
    assert evaluated < learned[0] == learned[-1] and layers.left_as_written() == left


def test_layers_are_compiled_for_each_shape_where_these_are_few(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(upstream, "compile_layers", lambda _, dynamic: asked.append(dynamic))
    packed = life.write(tmp_path / "packed", data__packing=True)
    padded = life.write(tmp_path / "padded", data__packing=False)
    recipes = {
        "packed": load(packed, schema("sft")),
        "padded": load(padded, schema("sft")),
        "ppo": load(life.TINY / "ppo.yaml", schema("ppo")),  # whose passes have any length
    }
    hardware = SimpleNamespace(device="cpu", compiles=True)
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    dynamic = {}
    for name, recipe in recipes.items():
        for attention in ("sdpa", "eager"):
            model = LlamaForCausalLM._from_config(config, attn_implementation=attention)
            speed_up(model, SimpleNamespace(hardware=hardware, recipe=recipe))
            dynamic[name, attention] = asked.pop()
    assert [each for each, is_dynamic in dynamic.items() if not is_dynamic] == [("packed", "sdpa")]


def test_what_cannot_be_compiled_is_computed_as_it_is_written():
    @torch.library.custom_op("llmpipe_tests::unknown", mutates_args=())
    def unknown(value: torch.Tensor) -> torch.Tensor:
        return value + 1

    class Layer(GradientCheckpointingLayer):
        def forward(self, value):
            return unknown(value) * 2  # of whose shape a compiler is told nothing

    layer = Layer()
    assert layers.compile_layers(layer, dynamic=False) == 1
    before = layers.left_as_written()
    assert layer(torch.ones(2)).tolist() == [4, 4]
    count = layers.left_as_written()
    assert count > before
    with layers.interpreted(layer):
        assert layer(torch.ones(3)).tolist() == [4, 4, 4]
    layers.forget_compiled(layer)
    assert layer(torch.ones(3)).tolist() == [4, 4, 4]
    assert layers.left_as_written() == count


def read_in_steps(path, monkeypatch, sets=()):
    """What the host reads in the steps of a recipe, and of its held-out rows, by name.

    As on a GPU: attention of rows in a padded batch, and scores by the library's head, where the
    batch says that there are labels.
    """
    monkeypatch.setattr(upstream, "compile_layers", lambda *_, **__: 0)
    monkeypatch.setattr(upstream, "score_labels", lambda *_: None)
    monkeypatch.setattr(upstream.attention, "_on_the_host", in_a_batch)
    read = []

    def watched(function):
        def inside(*arguments, **options):
            with counted() as names:
                result = function(*arguments, **options)
            read.extend(names)
            return result

        return inside

    steps = [(Durable, "training_step"), (Durable, "_get_grad_norm")]
    beside = [(JudgedTrainer, "_mean_divergence"), (HeldOut, "_measured")]
    for owner, name in [*steps, *beside]:
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    life.command(path, sets)
    return read


@pytest.mark.parametrize("of_stage", [{}, LORA], ids=["sft", "lora"])
def test_a_step_of_sft_reads_the_device_once(tmp_path, monkeypatch, of_stage):
    changes = {"data__packing": True, "optim__steps": 4, "launch__compile": True}
    path = life.write(tmp_path / "run", **changes, **of_stage)
    assert read_in_steps(path, monkeypatch) == ["tolist"] * 4


RANK = ["adapter.rank=4"]


@pytest.mark.parametrize(
    ("stage", "adapter"),
    [  # each stage, and both kinds of a reference, in every run of the suite
        ("dpo", []),
        ("kto", RANK),
        ("reward", []),
        *(life.by_the_dozen(*case) for case in (("dpo", RANK), ("kto", []), ("reward", RANK))),
    ],
)
def test_a_step_of_preferences_reads_the_device_once(tmp_path, monkeypatch, stage, adapter):
    """However many micro-batches it has."""
    written = (life.TINY / f"{stage}.yaml").read_text()
    here = written.replace("artifact:sft", str(life.TINY / "model"))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        here.replace("./recipes/tiny", str(life.TINY)).replace("runs/tiny", str(tmp_path / "run"))
    )
    sets = ["optim.steps=4", "log.every=1", "launch.micro_batch_size=4", "launch.compile=true"]
    assert read_in_steps(path, monkeypatch, [*sets, *adapter]) == ["tolist"] * 4


@pytest.mark.parametrize("stage", ["dpo", "kto", "reward"])
def test_places_that_the_host_knows_are_learned_the_same(tmp_path, monkeypatch, stage):
    monkeypatch.setattr(upstream, "compile_layers", lambda *_, **__: 0)
    written = (life.TINY / f"{stage}.yaml").read_text()
    here = written.replace("artifact:sft", str(life.TINY / "model"))
    here = here.replace("./recipes/tiny", str(life.TINY))
    lines = []
    for name, value in (("plain", "false"), ("told", "true")):
        path = tmp_path / f"{name}.yaml"
        path.write_text(here.replace("runs/tiny", str(tmp_path / name)))
        sets = ["optim.steps=3", "log.every=1", f"launch.compile={value}"]
        lines.append(life.essence(life.command(path, sets))["metrics"])
    for told, plain in zip(*lines, strict=True):
        assert told == pytest.approx(plain, rel=1e-4, abs=1e-5)
