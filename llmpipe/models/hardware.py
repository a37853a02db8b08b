"""What a process trains on, and how the recipe's `auto`s are decided."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
)

from llmpipe import upstream
from llmpipe.errors import Say, UserError
from llmpipe.models.pretrained import model_class
from llmpipe.recipe.sections import Adapter, Training
from llmpipe.run import machine
from llmpipe.run.machine import thread_count

PEAK = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "4090": 165,
}


@dataclass(frozen=True)
class Hardware:
    """What this process trains on, and how the recipe's `auto`s were decided."""

    device: str
    processes: int
    threads: int
    micro_batch_size: int
    accumulation: int
    bf16: bool
    attention: str

    def frozen_dtype(self, adapter: Adapter) -> torch.dtype:
        """Of weights that are not trained. What an adapter is taken out of is not rounded, or it would not fit back."""
        return torch.bfloat16 if self.bf16 and not adapter.rewrites else torch.float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)

    def describe(self) -> dict[str, Any]:
        name = (
            torch.cuda.get_device_name()
            if self.device == "cuda"
            else torch.backends.cpu.get_cpu_capability()
        )
        return {**vars(self), "device_name": name}

    def resume_key(self) -> dict[str, Any]:
        """What must be equal for a resumed run to be bitwise the straight one."""
        return {k: v for k, v in vars(self).items() if k != "accumulation"}


def choose(recipe: Training, say: Say, folder: Path | None = None) -> Hardware:
    """Decide device, precision, attention and micro-batch, and say why. `folder`: of the model, or of its base."""
    keep_imports()
    on_gpu = torch.cuda.is_available()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or thread_count(recipe.launch, processes)
    torch.set_num_threads(threads)
    wanted = recipe.optim.precision
    fast = has_bf16()
    if wanted == "bf16" and not fast and on_gpu:
        raise UserError("optim.precision: bf16: this GPU has no bf16", "set optim.precision: fp32")
    bf16 = wanted == "bf16" or (wanted == "auto" and fast)
    why = (
        "the recipe asks for it"
        if wanted != "auto"
        else f"the hardware has {'it' if bf16 else 'no fast bf16'}"
    )
    attention, attention_why = upstream.choose_attention(
        "cuda" if on_gpu else "cpu", recipe.data.packing
    )
    kind = model_class(folder) if folder else None
    if (known := upstream.supported_attention(kind, attention)) != attention:
        attention, attention_why = known, f"{kind.__name__} has no {attention}"
    micro = machine.micro_batch_size(recipe, processes, on_gpu)
    found = Hardware(
        device="cuda" if on_gpu else "cpu",
        processes=processes,
        threads=threads,
        micro_batch_size=micro,
        accumulation=recipe.batch_size // (micro * processes),
        bf16=bf16,
        attention=attention,
    )
    cut = f"; batch {recipe.batch_size} = {micro} x {found.accumulation} accumulated x {processes}"
    say(
        f"hardware: {processes} x {found.device}, {threads} threads each{cut * (recipe.stage != 'ppo')}"
    )
    say(f"precision: {'bf16 arithmetic' if bf16 else 'fp32'}, fp32 master weights ({why})")
    say(f"attention: {attention} ({attention_why})")
    if recipe.optim.optimizer.startswith("paged") and not on_gpu:
        say(
            f"optimizer: {recipe.optim.optimizer}: a CPU has nothing to page to, the moments stay where they are"
        )
    return found


def has_bf16() -> bool:
    """bf16 matrix products in hardware (a GPU's, AVX-512 BF16 or AMX); elsewhere they are slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def keep_imports() -> None:
    """Take everything that is in memory now, the libraries above all, out of later collections. Each checkpoint asks
    for one, and nine tenths of its time went into modules that stay to the end."""
    gc.collect()
    gc.freeze()


def release_memory() -> None:
    """Give freed memory back to the system: glibc keeps the pages of small tensors, a gigabyte of them in training."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def flops_per_token(model: PreTrainedModel, context: int) -> float:
    """Operations that a token costs in training (Chowdhery 2022, appendix B): 2 per weight forward, 2 for the gradient
    of what it multiplies, 2 for its own where it is trained, and 12 x layers x width x context for the attention."""
    embeddings, head, config = (
        model.get_input_embeddings(),
        model.get_output_embeddings(),
        model.config.get_text_config(),
    )
    looked_up = (
        0 if head and embeddings.weight is head.weight else embeddings.weight.numel()
    )  # it multiplies nothing
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    attention = 12 * config.num_hidden_layers * config.hidden_size * context
    return 4 * (model.num_parameters() - looked_up) + 2 * trained + attention


def peak_flops() -> float | None:
    """Dense bf16 operations per second of this GPU by its maker's data sheet, where it is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((1e12 * peak for part, peak in PEAK.items() if part in name), None)


def memory_gb() -> float:
    """Peak memory so far: of the GPU when there is one, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
