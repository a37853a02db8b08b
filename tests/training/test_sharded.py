"""`launch.strategy: fsdp`: a model in parts, on two gloo processes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from tests import life

SETTINGS = {
    "launch__processes": "auto",
    "launch__micro_batch_size": 1,
    "launch__activation_checkpointing": "none",
    "optim__optimizer": "adamw",
    "log__every": 1,
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
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def assert_alike(one, other):
    """Losses to 1e-5, weights to 1e-4, and the very same files."""
    for mine, theirs in zip(lines(one), lines(other), strict=True):
        for name in ("loss", "eval_loss", "grad_norm"):
            assert mine.get(name) == pytest.approx(theirs.get(name), abs=1e-5), (mine, theirs)
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], atol=1e-4, rtol=0), name
    assert {p.name for p in one.model.iterdir()} == {p.name for p in other.model.iterdir()}


@pytest.mark.parametrize("changes", [{}], ids=["padded"])
def test_two_processes_in_parts_are_two_whole_ones(tmp_path, changes):
    parts = life.pair(write(tmp_path / "parts", **changes))
    assert parts.manifest().hardware["sharded"] is True
    ddp = life.pair(write(tmp_path / "whole", "ddp", **changes))
    assert_alike(parts, ddp)
