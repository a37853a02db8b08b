"""Weights of 8 and 4 bits in the form of compressed-tensors, for vLLM, made by llm-compressor.

That asks for versions of torch and transformers that are not llmpipe's, and so it works in a
process of the Python that has it; the script there is `upstream/llm_compressor.py`. What it wrote
is read back here, by transformers with compressed-tensors:
pip install 'llmpipe[compressed-tensors]'.

Round to nearest in groups; GPTQ (Frantar et al. 2022, arXiv:2210.17323) and AWQ (Lin et al. 2023,
arXiv:2306.00978) look at rows that go through the layers.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmpipe import upstream
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.export.merged import write_merged
from llmpipe.export.readers.of_transformers import Loaded, named, predictions, same_head
from llmpipe.export.source import Source
from llmpipe.export.tensors import refuse, same_weights, weights_of
from llmpipe.models.pretrained import load_model, load_tokenizer
from llmpipe.run.interpreters import LLM_COMPRESSOR, environment_of, python_of
from llmpipe.ties import die_with_parent

SCRIPT = Path(upstream.__file__).with_name("llm_compressor.py")

GROUPS = (128, 64, 32)
"""Weights that share a scale of 4 bits: the most that divide the width of every layer, of those
that vLLM has kernels for."""

BESIDE = ("_scale", "_shape", "_zero_point", "_packed", "_g_idx")
"""What stands in the place of a weight, or beside it."""

LAST_LINES = 3
"""Of what llm-compressor printed, that are shown where it fails."""


@dataclass(frozen=True)
class Scheme:
    """How weights are rounded."""

    name: str
    """As recipes have it: `fp8`, `w4a16`, `w4a16_gptq`, `w4a16_awq`."""

    @property
    def bits(self) -> str:
        return self.name.partition("_")[0]

    @property
    def algorithm(self) -> str:
        """`rtn` rounds to the nearest."""
        return self.name.partition("_")[2] or "rtn"

    @property
    def moves_scales(self) -> bool:
        """Whether a layer's rows are scaled up and those of the next one's columns down."""
        return self.algorithm == "awq"


def write_compressed(
    source: Source, folder: Path, scheme: Scheme, rows: list[list[int]]
) -> list[str]:
    """Have llm-compressor write a folder; what is not quantized is in bf16.

    `rows`: tokens that go through the layers, for GPTQ and AWQ. Raises UserError (2) for a model
    without layers that can be quantized, and (3) where llm-compressor fails.
    """
    layers = linear_layers(source)
    group = group_of(layers) if scheme.bits == "w4a16" else None
    with tempfile.TemporaryDirectory(dir=folder) as place:
        whole, file = Path(place, "whole"), Path(place, "rows.jsonl")
        whole.mkdir()
        write_merged(source, whole, torch.bfloat16)
        file.write_text("".join(f"{json.dumps(ids)}\n" for ids in rows))
        order = {
            "model": str(whole),
            "into": str(folder),
            "scheme": scheme.bits,
            "algorithm": scheme.algorithm,
            "group": group,
            "ignored": [name for name, kept in _linear(source) if kept],
            "rows": str(file) if rows else None,
        }
        said = _by_llm_compressor(order)
    if said["layers"] != len(layers):
        refuse(f"llm-compressor quantized {said['layers']} of {len(layers)} layers")
    source.tokenizer.save_pretrained(folder)
    how = f"llm-compressor {said['version']}, {scheme.algorithm}: {len(layers)} layers"
    notes = [f"{how}{f' in groups of {group}' if group else ''}, all else in bf16"]
    if scheme.algorithm != "rtn":
        tokens = sum(map(len, rows))
        notes.append(f"{scheme.algorithm} has looked at {len(rows):,} rows, {tokens:,} tokens")
    return notes


def _linear(source: Source) -> list[tuple[str, bool]]:
    """Names of linear layers, and whether one is the head, which keeps its bits."""
    head = source.model.get_output_embeddings()
    modules = source.model.named_modules()
    return [(name, layer is head) for name, layer in modules if isinstance(layer, nn.Linear)]


def linear_layers(source: Source) -> dict[str, int]:
    """The width of what goes into each layer to be quantized, by its name. Raises UserError (2)
    where there is none."""
    names = [name for name, kept in _linear(source) if not kept]
    if not names:
        kind = source.model.config.model_type
        problem = f"formats.compressed_tensors: no layer of {kind} is a linear one"
        raise UserError(f"{problem}: nothing would be quantized", "take bitsandbytes: [int8]")
    modules = dict(source.model.named_modules())
    return {name: modules[name].in_features for name in names}


def group_of(layers: dict[str, int]) -> int:
    """How many weights share a scale. Raises UserError (2) where no group fits every layer."""
    for group in GROUPS:
        if not any(width % group for width in layers.values()):
            return group
    name, width = next((name, width) for name, width in layers.items() if width % GROUPS[-1])
    problem = f"formats.compressed_tensors: w4a16: {name} is {width} wide"
    hint = "take fp8, which has a scale for each row"
    raise UserError(f"{problem}, which no group of {GROUPS[-1]} weights divides", hint)


def _by_llm_compressor(order: dict[str, Any]) -> dict[str, Any]:
    """What it says of what it made. Raises UserError (3) with its last words where it fails."""
    python = python_of(LLM_COMPRESSOR)
    assert python, "which was looked at ahead"
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [python, "-I", str(SCRIPT)],
        input=json.dumps(order) + "\n",
        capture_output=True,
        text=True,
        errors="replace",
        env=environment_of(python) | threads,
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()][-LAST_LINES:]
        problem = f"llm-compressor ended with {done.returncode}:"
        hint = f"it is that of {python}; llmpipe is tested with llmcompressor 0.14"
        raise UserError("\n  ".join([problem, *lines]), hint, INTEGRITY)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def read_compressed(folder: Path, source: Source, scheme: Scheme) -> Loaded:
    """As transformers with compressed-tensors loads and computes it: where it asks for that, what
    goes through a layer is rounded as well. Raises UserError (3) where the weights are not the
    source's."""
    model = load_model(folder).eval()
    same_head(model, source)
    predictions(model, source.probe.asked[0].tokens)  # which unpacks the weights
    weights = weights_of(model)
    seen = {name: weight for name, weight in weights.items() if not name.endswith(BESIDE)}
    updates = source.updates if scheme.bits == "fp8" else {}
    tensors = same_weights(
        source.weights, seen, None, updates=updates, moves_scales=scheme.moves_scales
    )
    return Loaded(named("compressed-tensors"), model, load_tokenizer(folder), source, tensors)
