"""Memory that publishing an adapter takes, and merging it, beyond what training held.

    python benchmarks/publish.py --layers 12                     with this environment's llmpipe
    PYTHONPATH=../old python benchmarks/publish.py --layers 12   with another checkout's

A model of Llama's kind with random weights, 0.04 B of them a layer and 0.13 B beside, is written in
bf16; an adapter on it is published, as training would, and merged, each in a process of its own.
Printed: the peak of resident memory over what was resident before, without pages of files (which
the system takes back when it needs them), beside the size of the model in fp32, and seconds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

TINY = Path(__file__).parent.parent / "recipes" / "tiny" / "model"
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="where the models are kept (default: nowhere)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--part", choices=["make", "publish", "merge"])
    arguments = parser.parse_args()
    if arguments.part:
        PARTS[arguments.part](arguments.folder, arguments.layers, arguments.dtype)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for part in PARTS:
            options = ["--layers", str(arguments.layers), "--dtype", arguments.dtype]
            command = [sys.executable, __file__, "--part", part, "--folder", str(folder), *options]
            subprocess.run(command, check=True)


def make(folder: Path, layers: int, dtype: str) -> None:
    """The base."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if (folder / "base").exists():
        return
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, **SHAPE)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder / "base")
    print(f"{model.num_parameters() / 1e9:.2f} B weights", flush=True)


def publish(folder: Path, layers: int, dtype: str) -> None:
    """An adapter on the base, held in `dtype`."""
    import torch

    from llmpipe.models import adapters
    from llmpipe.models.pretrained import load_tokenizer
    from llmpipe.models.publish import publish_adapter
    from llmpipe.recipe.sections import Adapter

    tokenizer = load_tokenizer(folder / "base")
    held = getattr(torch, dtype)
    base = adapters.load_frozen(folder / "base", None, held)
    base.generation_config.eos_token_id = tokenizer.eos_token_id
    model = adapters.begin(base, Adapter(rank=8, alpha=16), [], seed=0)
    adapters.forget_base(model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.01)
    kept = adapters.Base(folder / "base", "base", None, None, held)
    with Peak(f"publish, held in {dtype}"):
        publish_adapter(model, tokenizer, folder / "adapter", kept, lambda line: print(line))


def merge(folder: Path, layers: int, dtype: str) -> None:
    """The adapter in its base."""
    from llmpipe.models import publish

    with Peak("merge"):
        publish.merge(folder / "base", folder / "adapter", folder / "merged")


PARTS = {"make": make, "publish": publish, "merge": merge}


class Peak:
    """Prints the peak of resident memory over what was resident before, and seconds."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        self.before = self.peak = resident()
        self.began = time.perf_counter()
        self.ended = threading.Event()
        self.watch = threading.Thread(target=self._watch)
        self.watch.start()

    def _watch(self) -> None:
        while not self.ended.wait(0.01):
            self.peak = max(self.peak, resident())

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.watch.join()
        seconds = time.perf_counter() - self.began
        more = (self.peak - self.before) / 2**30
        print(
            f"{self.name}: {more:.2f} GiB over {self.before / 2**30:.2f}, {seconds:.1f} s",
            flush=True,
        )


def resident() -> int:
    """Bytes of this process in memory that are no file's."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
