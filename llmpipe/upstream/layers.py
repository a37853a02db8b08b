"""The layers of a model, compiled where they stand: one kernel for what lies between two products.

All layers of a kind share what is compiled for a shape, so that it is done once. A checkpoint and a
saved model know nothing of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers.modeling_layers import GradientCheckpointingLayer

MOST = 64
"""Forms of a layer: of a shape, with and without a gradient, with each of PPO's adapters."""


def compile_layers(model: nn.Module, *, dynamic: bool) -> int:
    """Let the layers of `model` be compiled when they are first called; returns how many there are.

    `dynamic`: once for all numbers of tokens; else once for each, and a little faster. What is
    compiled is not chosen by its time, and else depends on the shape alone, so that a resumed
    training computes the same bits; where it is `dynamic`, a compiler may take the first shape for
    the usual one. What it does not know is computed as it is written, see `left_as_written`.
    """
    torch._dynamo.config.recompile_limit = MOST
    torch._dynamo.config.accumulated_recompile_limit = 16 * MOST
    torch._dynamo.config.suppress_errors = True
    torch._logging.set_logs(dynamo=logging.ERROR)  # which tells of each, with a traceback
    torch._inductor.config.deterministic = True
    if any(parameter.is_cuda for parameter in model.parameters()):
        # no kernel is for the CPU: what its compiler knows is found out in 5 to 15 s, in each run
        torch._inductor.config.cpp.vec_isa_ok = True
    layers = list(_layers(model))
    for layer in layers:
        layer.compile(dynamic=dynamic)
    return len(layers)


def compile_anew() -> None:
    """Forget what layers were compiled for so far; they are compiled when they are called again."""
    torch._dynamo.reset()


def compilations() -> int:
    """Graphs that this process has compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def left_as_written() -> int:
    """Functions that this process could not compile so far."""
    frames = counters["frames"]
    return int(frames["total"] - frames["ok"])


def forget_compiled(model: nn.Module) -> None:
    """Let the layers of `model` be computed as they are written, from now on."""
    for layer in _layers(model):
        layer._compiled_call_impl = None


@contextmanager
def interpreted(model: nn.Module) -> Iterator[None]:
    """Compute the layers of `model` as they are written meanwhile: with a cache, whose length grows
    with each token, and in shapes that do not come again.
    """
    compiled = {layer: layer._compiled_call_impl for layer in _layers(model)}
    forget_compiled(model)
    try:
        yield
    finally:
        for layer, call in compiled.items():
            layer._compiled_call_impl = call


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer))
