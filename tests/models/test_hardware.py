"""What is decided of a recipe on a host, without the host."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from llmpipe.errors import UserError
from llmpipe.front import launch
from llmpipe.models import hardware
from llmpipe.models.hardware import Hardware, Host, announce, decide
from llmpipe.recipe.check import load
from llmpipe.stages import schema
from tests import life

LAPTOP = Host(device="cpu", processes=1, threads=4, has_bf16=False, has_flash_attention=False)
GPUS = Host(device="cuda", processes=2, threads=8, has_bf16=True, has_flash_attention=True)


class OldModel:
    """Of the days before flash-attention and sdpa."""

    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_sdpa = False


class Sinking:
    """It attends by more than documents, as flash-attention knows, and a compiler's attention."""

    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_sdpa = False


def recipe(tmp_path, **changes):
    return load(life.write(tmp_path / "run", **changes), schema("sft"))


def test_an_attention_is_chosen_for_every_device_with_a_reason(tmp_path):
    for device in ("cpu", "cuda", "mps"):
        for packed in (True, False):
            asked = recipe(tmp_path, data__packing=packed)
            for flash in (True, False):
                host = replace(LAPTOP, device=device, has_flash_attention=flash)
                hardware = decide(asked, host, None)
                assert hardware.attention == "sdpa" and hardware.reasons.attention
    packed = recipe(tmp_path, data__packing=True)
    old = decide(packed, GPUS, OldModel, by_document=False)
    assert old.attention == "eager" and "one dense mask" in old.reasons.attention


@pytest.mark.parametrize(
    ("changes", "host", "attention"),
    [
        ({}, GPUS, "flash_attention_2"),
        ({"optim__precision": "fp32"}, GPUS, "flex_attention"),  # flash-attention has none
        ({}, replace(GPUS, has_flash_attention=False), "flex_attention"),
        ({"data__packing": False}, GPUS, "eager"),
        ({}, LAPTOP, "eager"),
    ],
)
def test_an_attention_for_what_attends_by_more_than_documents(tmp_path, changes, host, attention):
    asked = recipe(tmp_path, **{"data__packing": True, "optim__precision": "bf16"} | changes)
    assert decide(asked, host, Sinking, by_document=False).attention == attention


@pytest.mark.parametrize(
    ("asked", "device", "by_document", "compiles"),
    [
        ("auto", "cuda", True, True),
        ("auto", "cuda", False, False),
        ("auto", "cpu", True, False),
        (True, "cpu", True, True),
        (False, "cuda", True, False),
    ],
)
def test_when_layers_are_compiled(tmp_path, asked, device, by_document, compiles):
    host = replace(GPUS, device=device)
    hardware = decide(recipe(tmp_path, launch__compile=asked), host, OldModel, by_document)
    assert hardware.compiles is compiles
    said = []
    announce(hardware, recipe(tmp_path), said.append)
    assert any(line.startswith("compile:") for line in said) is compiles


@pytest.mark.parametrize(
    ("asked", "has_bf16", "bf16", "reason"),
    [
        ("auto", True, True, "the hardware has it"),
        ("auto", False, False, "the hardware has no fast bf16"),
        ("fp32", True, False, "the recipe asks for it"),
        ("bf16", False, True, "the recipe asks for it"),  # on a CPU it is slow, no more
    ],
)
def test_precision(tmp_path, asked, has_bf16, bf16, reason):
    host = replace(LAPTOP, has_bf16=has_bf16)
    hardware = decide(recipe(tmp_path, optim__precision=asked), host, None)
    assert hardware.bf16 is bf16 and hardware.reasons.precision == reason


class Peers:
    """This process, and another one that says the same but for some of it."""

    def __init__(self, **host):
        self.host = host
        self.rest = {"local": host.pop("local", 1), "before": host.pop("before", {})}

    def turn(self):
        return "a turn"

    def gather(self, key, text):
        mine = json.loads(text)
        other = mine | self.rest | {"host": mine["host"] | self.host}
        return [json.dumps(other), text]  # which is rank 0


def test_all_processes_decide_by_the_least_that_one_finds(tmp_path, monkeypatch):
    def with_other(**other):
        monkeypatch.setattr(hardware, "meet", lambda: Peers(**other))
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}.items():
            monkeypatch.setenv(name, value)
        return hardware.agreed(replace(GPUS, memory=8e9), {"sharded": True})

    less = {"has_bf16": False, "has_flash_attention": False, "memory": 4e9, "threads": 99}
    host, before = with_other(**less, before={"copies": 2})
    assert (host.has_bf16, host.has_flash_attention, host.memory) == (False, False, 4e9)
    assert host.threads == GPUS.threads, "which are each machine's own"
    assert before == {"copies": 2}, "as rank 0 reads it"
    assert with_other(memory=math.inf)[0] == replace(GPUS, memory=8e9)
    with pytest.raises(UserError, match="not all processes have a GPU: rank 0 cpu, rank 1 cuda"):
        with_other(device="cpu")
    uneven, _ = with_other(local=2)
    asked = recipe(tmp_path, launch__strategy="hsdp", optim__batch_size=8)
    with pytest.raises(UserError, match="unequal numbers of processes"):
        decide(asked, uneven, None)
    assert decide(asked, with_other()[0], None).copies == 2
    assert hardware.agreed(LAPTOP, {"a": 1}) == (LAPTOP, {"a": 1}), "asks nobody"


def test_a_strategy_is_said_by_its_name(tmp_path):
    said, asked = [], recipe(tmp_path)
    before = {"sharded": True, "copies": 2}
    announce(decide(asked, GPUS, None, before=before), asked, said.append)
    assert "strategy: hsdp: as its checkpoints are" in said


def test_a_gpu_without_bf16_refuses_it(tmp_path):
    host = replace(GPUS, has_bf16=False)
    with pytest.raises(UserError, match="this GPU has no bf16"):
        decide(recipe(tmp_path, optim__precision="bf16"), host, None)


def test_accumulation_makes_up_the_batch(tmp_path):
    asked = recipe(tmp_path, optim__batch_size=8, launch__micro_batch_size=2)
    hardware = decide(asked, GPUS, None)
    parts = (hardware.micro_batch_size, hardware.accumulation, hardware.processes)
    assert parts == (2, 2, 2)
    said = []
    announce(hardware, asked, said.append)
    assert said[0] == "hardware: 2 x cuda, 8 threads each; batch 8 = 2 x 2 accumulated x 2"
    announce(hardware, recipe(tmp_path, launch__micro_batch_size="auto"), said.append)
    assert "hardware: 2 x cuda, 8 threads each" in said, "by memory, which is not known yet"


def test_kernels_of_the_hub_are_left_alone_and_it_is_said(tmp_path, monkeypatch):
    """A package `kernels` that is installed is imported by nobody; transformers, TRL and
    bitsandbytes take it for missing."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("open('CANARY', 'w')\n")
    code = (
        "import llmpipe.front.worker\n"
        "from importlib.util import find_spec\n"
        "assert find_spec('kernels') is None\n"
        "try:\n    from kernels import get_kernel\n"
        "except ModuleNotFoundError:\n    print('not here')\n"
    )
    path = os.pathsep.join([str(tmp_path), str(life.ROOT)])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "not here\n", done.stderr
    assert not (tmp_path / "CANARY").exists()
    assert launch.library_environment("train")["USE_HUB_KERNELS"] == "0"

    said = []
    asked = recipe(tmp_path)
    hardware = decide(asked, LAPTOP, None)
    announce(hardware, asked, said.append)
    assert not any(line.startswith("kernels") for line in said)
    monkeypatch.syspath_prepend(tmp_path)
    announce(hardware, asked, said.append)
    assert any(line.startswith("kernels: the package is installed, and not used") for line in said)


def test_reasons_are_no_part_of_what_is_recorded():
    hardware = Hardware("cpu", 1, 2, 4, 3, False, "sdpa")
    key = {
        "device": "cpu",
        "processes": 1,
        "threads": 2,
        "micro_batch_size": 4,
        "bf16": False,
        "attention": "sdpa",
    }
    assert hardware.resume_key() == key
    compiled = {"compiles": True, "activation_checkpointing": "none"}
    assert replace(hardware, compiles=True).resume_key() == key | compiled
    described = hardware.describe()
    assert described.pop("device_name")
    assert described == {**key, **compiled, "accumulation": 3, "compiles": False}


@pytest.mark.parametrize(
    ("asked", "before", "kind"),
    [
        ("auto", {}, "none"),
        ("auto", {"activation_checkpointing": "selective"}, "selective"),
        ("auto", {"activation_checkpointing": True}, "full"),  # as ppo writes it
        ("auto", {"activation_checkpointing": False}, "none"),
        ("none", {"activation_checkpointing": "selective"}, "none"),
        (True, {}, "full"),
        (False, {}, "none"),
        ("selective", {}, "selective"),
    ],
)
def test_which_activations_are_computed_again(tmp_path, asked, before, kind):
    recipe_ = recipe(tmp_path, launch__activation_checkpointing=asked)
    assert decide(recipe_, LAPTOP, None, before=before).activation_checkpointing == kind


@pytest.mark.parametrize(
    ("asked", "before", "size"),
    [
        ("auto", {"micro_batch_size": 2}, 2),
        ("auto", {"micro_batch_size": 3}, 4),  # which does not divide a step
        ("auto", {"micro_batch_size": "auto (8,192 tokens)"}, 4),  # ppo's
        (1, {"micro_batch_size": 2}, 1),
    ],
)
def test_a_checkpoint_says_how_a_batch_was_cut(tmp_path, asked, before, size):
    changes = {"optim__batch_size": 4, "launch__micro_batch_size": asked}
    assert decide(recipe(tmp_path, **changes), LAPTOP, None, before=before).micro_batch_size == size
