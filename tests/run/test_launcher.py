"""A launcher's FSDP, in the words in which Accelerate hands it on."""

import os
from argparse import Namespace

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from llmpipe.errors import UserError
from llmpipe.recipe.check import load
from llmpipe.run import launcher
from llmpipe.stages import schema
from tests import life


def launched(monkeypatch, *flags):
    """What `accelerate launch` sets with these flags."""
    given: Namespace = launch_command_parser().parse_args([*flags, "--num_processes", "2", "x"])
    given.dynamo_backend, given.mixed_precision, given.num_machines = "no", "no", 1
    for name, value in prepare_multi_gpu_env(given).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def recipe(tmp_path):
    return load(life.write(tmp_path / "run"), schema("sft"))


def test_fsdp_is_a_strategy(monkeypatch, recipe):
    assert launcher.obeyed(recipe) is recipe
    launched(monkeypatch, "--use_fsdp", "--fsdp_version", "2")
    assert launcher.obeyed(recipe).launch.strategy == "fsdp"
    launcher.take_out()
    assert not [name for name in os.environ if "FSDP" in name]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--fsdp_reshard_after_forward", "false"], "FSDP_RESHARD_AFTER_FORWARD=false"),
        (["--fsdp_sharding_strategy", "SHARD_GRAD_OP"], "FSDP_SHARDING_STRATEGY=SHARD_GRAD_OP: pa"),
        (["--fsdp_activation_checkpointing", "true"], "launch.activation_checkpointing: full"),
        (["--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP"], "FSDP_AUTO_WRAP_POLICY=SIZE_BASED_WRAP"),
    ],
)
def test_what_is_not_there_is_refused_by_name(monkeypatch, recipe, flags, problem):
    launched(monkeypatch, "--use_fsdp", *flags)
    with pytest.raises(UserError, match=problem):
        launcher.obeyed(recipe)


@pytest.mark.parametrize(
    ("asked", "flags", "strategy"),
    [
        ("auto", ["HYBRID_SHARD"], "hsdp"),
        ("hsdp", ["HYBRID_SHARD"], "hsdp"),
        ("hsdp", ["4"], "hsdp"),
        ("hsdp", ["FULL_SHARD"], "hsdp"),  # which is what it says that was asked for none
        ("fsdp", ["1"], "fsdp"),
        ("fsdp", ["HYBRID_SHARD"], None),
    ],
)
def test_a_copy_on_each_machine_is_one_however_it_is_asked_for(
    monkeypatch, recipe, asked, flags, strategy
):
    launch = recipe.launch.model_copy(update={"strategy": asked})
    recipe = recipe.model_copy(update={"launch": launch})
    launched(monkeypatch, "--use_fsdp", "--fsdp_sharding_strategy", *flags)
    if strategy:
        assert launcher.obeyed(recipe).launch.strategy == strategy
        return
    with pytest.raises(UserError, match=r"HYBRID_SHARD, and the recipe has .*: fsdp: take one"):
        launcher.obeyed(recipe)


@pytest.mark.parametrize("asked", ["true", "false"])
def test_parts_in_the_hosts_memory_are_asked_for_here_or_there(monkeypatch, recipe, asked):
    launched(monkeypatch, "--use_fsdp", "--fsdp_offload_params", asked)
    assert launcher.obeyed(recipe).launch.offload is (asked == "true")
    launch = recipe.launch.model_copy(update={"offload": True})
    assert launcher.obeyed(recipe.model_copy(update={"launch": launch})).launch.offload


def test_all_of_it_is_said_at_once(monkeypatch, recipe):
    launch = recipe.launch.model_copy(update={"strategy": "ddp"})
    launched(monkeypatch, "--use_fsdp", "--fsdp_activation_checkpointing", "true")
    with pytest.raises(UserError, match=r"(?s)take one of them.*FSDP_ACTIVATION_CHECKPOINTING"):
        launcher.obeyed(recipe.model_copy(update={"launch": launch}))
