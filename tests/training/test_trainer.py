"""`trainer:`: every field of the configurations underneath is set by llmpipe, refused with a
reason, or free; and what is free trains."""

import dataclasses
import importlib
import random

import pytest
import yaml

from llmpipe.errors import UserError
from llmpipe.recipe.sections import Hosted
from llmpipe.recipe.trainer import FREE, OF_BITSANDBYTES, OWNED, REFUSED
from llmpipe.stages import STAGES, schema
from tests import attempts, life, mutants

HOSTED = [name for name in STAGES if issubclass(schema(name), Hosted)]
VALUES = {
    "optim": ["adafactor", "sgd", "adagrad", "rmsprop", *OF_BITSANDBYTES],
    "lr_scheduler_kwargs": [{"num_cycles": 0.4}],
    "gradient_checkpointing_kwargs": [{"use_reentrant": True}, {"use_reentrant": False}],
    "neftune_noise_alpha": [5],
    "router_aux_loss_coef": [0.1],  # of a mixture of experts, which the tiny model is not
    "loss_type": ["dft"],
    "discopop_tau": [0.1],
    "torch_empty_cache_steps": [1],
    "full_determinism": [True],
    "debug": ["underflow_overflow"],
    "dataloader_pin_memory": [False],
    "ddp_find_unused_parameters": [True],
    "ddp_bucket_cap_mb": [1],
    "ddp_broadcast_buffers": [True],
    "ddp_static_graph": [True],
    "project": ["x"],
    "trackio_space_id": ["x"],
}
ODD = [None, "", "x", -1, 0, 1e300, float("nan"), [], {}, {"x": 1}, {"num_cycles": "a"}, 10**30]


def fields_of(stage: str) -> set[str]:
    """Every field that the configuration of a stage's trainer takes."""
    config = schema(stage).trainer_config
    module = importlib.import_module(f"{config.package}.{config.module}")
    return {field.name for field in dataclasses.fields(getattr(module, config.name)) if field.init}


@pytest.mark.parametrize("stage", HOSTED)
def test_every_field_of_a_trainer_is_decided(stage):
    owned = OWNED | schema(stage).trainer_config.owned
    undecided = fields_of(stage) - {*owned, *REFUSED, *FREE}
    assert not undecided
    assert VALUES.keys() == FREE.keys() and not FREE.keys() & REFUSED.keys()


def case(stage, name, value, until=""):
    values = mutants.valid(stage, random.Random(0))
    values["trainer"] = {name: value}
    values["optim"]["steps"] = 2
    values["launch"]["activation_checkpointing"] = name == "gradient_checkpointing_kwargs"
    files = mutants.FILES | {"recipe.yaml": yaml.safe_dump(values).encode()}
    title = f"{stage}: {name}: {value!r}"
    return attempts.Case(
        title, [stage, "recipe.yaml"], files, until=until, culprit=f"trainer|{name}"
    )


def test_reentrant_checkpointing_keeps_no_products(tmp_path):
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    path = life.write(
        tmp_path / "run", trainer=options, launch__activation_checkpointing="selective"
    )
    with pytest.raises(UserError, match="use_reentrant: true computes whole layers again"):
        life.command(path)


def free_of(stage: str) -> list[str]:
    owned = OWNED | schema(stage).trainer_config.owned
    return [name for name in FREE if name in fields_of(stage) and name not in owned]


@pytest.mark.faults
@pytest.mark.parametrize("stage", HOSTED)
def test_what_is_free_trains(stage, tmp_path):
    """Or, where that depends on the model, is refused in a line."""
    cases = [case(stage, name, value) for name in free_of(stage) for value in VALUES[name]]
    ends = attempts.attempts(cases, tmp_path, 60)
    assert not attempts.problems(ends)
    refused = [end.name for end in ends if end.code]
    assert all("router_aux_loss_coef" in name for name in refused), refused


@pytest.mark.faults
def test_what_is_free_is_refused_with_another_value(tmp_path):
    cases = [case("sft", name, value, "prepare") for name in free_of("sft") for value in ODD]
    ends = attempts.attempts(cases, tmp_path)
    assert not attempts.problems(ends)
    taken = {end.name for end in ends if not end.code}
    assert taken <= {"sft: project: 'x'", "sft: trackio_space_id: 'x'"} | {
        f"sft: router_aux_loss_coef: {value}" for value in (0, -1)
    }


@pytest.mark.parametrize("name", ["torch_compile", "dataloader_drop_last", "fsdp", "push_to_hub"])
def test_what_breaks_a_promise_is_refused(tmp_path, name):
    asked = case("sft", name, True, "prepare")
    lines = asked.files["recipe.yaml"].decode().splitlines()
    (line,) = (number for number, text in enumerate(lines, 1) if f"{name}:" in text)
    (end,) = attempts.attempts([asked], tmp_path)
    assert end.code == 2 and f"recipe.yaml:{line}: trainer.{name}: " in end.text
