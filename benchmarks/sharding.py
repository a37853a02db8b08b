"""Memory that a model in parts takes, of all processes together, to load it and to publish it.

    python benchmarks/sharding.py                    a model of 1.1 B weights in two processes
    python benchmarks/sharding.py --width 512 --layers 16 --vocabulary 2000     a small one

A model of Llama's kind with random weights, in TinyLlama's proportions, is written in bf16.
Processes on CPU (gloo) load it in parts, as a training does, and publish it, as its end does.
Printed, of each: the peak of all processes' memory over what they held before they loaded, in
models, and seconds.

One model is the bytes of all weights as they are held: 4 a weight, as weights that are trained are
held in fp32. Memory is PSS: a page that several processes share counts
once. Pages of files that are mapped stand apart: the system takes them back when it needs them.
What is freed is given back at once (MALLOC_MMAP_THRESHOLD_), as glibc would not do of small blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINY = Path(__file__).parent.parent / "recipes" / "tiny" / "model"
BASE = "base"
PERIOD = 0.02
"""Seconds between two looks at the processes' memory."""


@dataclass
class Phase:
    """What the processes did, and the most that they held together meanwhile."""

    name: str
    seconds: float
    heap: float
    """Models, over what was held before anything was loaded."""
    mapped: float
    """Models, of pages of files that are mapped."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--file-bytes", type=int, help="of a published file (default: llmpipe's)")
    parser.add_argument("--folder", type=Path, help="where models are kept (default: nowhere)")
    parser.add_argument("--part", choices=["make", "work"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        {"make": make, "work": work}[arguments.part](arguments)
        return
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = arguments.folder or Path(temporary)
        for phase in measure(arguments):
            line = f"{phase.heap:.2f} models, mapped files {phase.mapped:.2f}"
            print(f"{phase.name}: {line}, {phase.seconds:.1f} s", flush=True)


def measure(arguments: argparse.Namespace) -> list[Phase]:
    """What the processes of `work` hold, phase by phase."""
    subprocess.run(_command(arguments, "make"), check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(arguments.processes)
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": size}
    world |= {"LOCAL_WORLD_SIZE": size, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    world |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    processes = [
        subprocess.Popen(
            _command(arguments, "work"),
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(arguments.processes)
    ]
    try:
        return _watched(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _command(arguments: argparse.Namespace, part: str) -> list[str]:
    values = {**vars(arguments), "part": part}
    options = [(f"--{name.replace('_', '-')}", value) for name, value in values.items()]
    flat = [str(word) for pair in options if pair[1] is not None for word in pair]
    return [sys.executable, __file__, *flat]


def _watched(processes: list[subprocess.Popen[str]]) -> list[Phase]:
    """The phases that the first process tells of, each with the greatest of what was seen in it."""
    told = processes[0].stdout
    assert told is not None
    os.set_blocking(told.fileno(), False)
    phases: list[Phase] = []
    name, bytes_of_model = "", 1
    before = heap = mapped = 0
    began = time.perf_counter()
    while processes[0].poll() is None:
        now_heap, now_mapped = _memory(processes)
        heap, mapped = max(heap, now_heap), max(mapped, now_mapped)
        for line in iter(told.readline, ""):
            mark = json.loads(line)
            if not mark["begins"]:
                now = time.perf_counter() - began
                shares = (heap - before) / bytes_of_model, mapped / bytes_of_model
                phases.append(Phase(name, now, *shares))
            name, bytes_of_model = mark["name"], mark["bytes"]
            before, heap, mapped = before or _memory(processes)[0], 0, 0
            began = time.perf_counter()
        time.sleep(PERIOD)
    if processes[0].returncode:
        raise RuntimeError(f"rank 0 ended with {processes[0].returncode}")
    return phases


def _memory(processes: list[subprocess.Popen[str]]) -> tuple[int, int]:
    """PSS of processes together, in bytes: of pages that are no file's, and of those that are."""
    totals: Counter[str] = Counter()
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # at its end
            continue
        totals.update({line.split(":")[0]: int(line.split()[1]) for line in lines[1:]})
    return 1024 * (totals["Pss_Anon"] + totals["Pss_Shmem"]), 1024 * totals["Pss_File"]


def make(arguments: argparse.Namespace) -> None:
    """The model in bf16."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    base = arguments.folder / BASE
    if base.exists():
        return
    torch.manual_seed(0)
    width = arguments.width
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 512,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.save_pretrained(base)
    print(f"{model.num_parameters() / 1e9:.2f} B weights", flush=True)


def work(arguments: argparse.Namespace) -> None:
    """Load and publish, as one of the processes."""
    import gc

    import torch
    from accelerate import Accelerator

    from llmpipe import noise
    from llmpipe.models import publish
    from llmpipe.models.pretrained import load_model, load_tokenizer
    from llmpipe.parallel.parts import Spread
    from llmpipe.parallel.world import World
    from llmpipe.run.folders import tensors_of

    noise.silence()
    base = arguments.folder / BASE
    publish.SHARD = arguments.file_bytes or publish.SHARD
    world, spread = World(Accelerator(cpu=True)), Spread(arguments.processes, False)
    weights = sum(math.prod(tensor.shape) for tensor in tensors_of(base).values())
    tell = _Telling(world, weights * torch.float32.itemsize)
    tokenizer = load_tokenizer(base)

    def load(folder: Path) -> Any:
        model = load_model(folder, spread=spread).eval()
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        return model

    def published(model: Any, folder: str) -> None:
        place = arguments.folder / folder
        publish.publish_sharded(model, tokenizer, place, world, spread, lambda line: None)

    published(load(TINY), "warm")  # what is imported and made once is no part of a model
    gc.collect()
    with tell("load"):
        model = load(base)
    with tell("publish"):
        published(model, "published")


class _Telling:
    """Tells the process that watches when a phase begins and ends, in all processes at once."""

    def __init__(self, world: Any, of_model: int):
        self.world = world
        self.of_model = of_model

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._mark(name, begins=True)
        yield
        self._mark(name, begins=False)

    def _mark(self, name: str, *, begins: bool) -> None:
        self.world.wait()
        mark = {"name": name, "begins": begins, "bytes": self.of_model}
        print(json.dumps(mark), flush=self.world.is_first)
        time.sleep(10 * PERIOD)  # until it was looked
        self.world.wait()


if __name__ == "__main__":
    main()
