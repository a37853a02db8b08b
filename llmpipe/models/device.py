"""The device that this process computes on, and the memory that it holds."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from pathlib import Path

import torch

from llmpipe.errors import UserError
from llmpipe.run import machine


def take_device() -> None:
    """Let `cuda` be this process's GPU, where there are any; before anything is loaded to it.

    Raises UserError (2) where this process has none of its own.
    """
    if not torch.cuda.is_available():
        return
    count = torch.cuda.device_count()
    if count == 1 and machine.is_task():  # srun --gpus-per-task 1: each sees its own, as the first
        os.environ["LOCAL_RANK"] = "0"
    if machine.local_rank() >= count:
        problem = f"there are more processes on this machine than GPUs that they see ({count})"
        raise UserError(problem, "start one process for each GPU")
    torch.cuda.set_device(machine.local_rank())


def make_exact() -> None:
    """Let a GPU compute the same bits each time, where it has a way to.

    What stays fp32 beside bf16 stays so: it is small, and tensor cores would round it to 19 bits.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def has_bf16() -> bool:
    """bf16 matrix products in hardware (a GPU's, AVX-512 BF16 or AMX); elsewhere they are slower
    than fp32.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def device_name(device: str) -> str:
    """What computes: which card, or which CPU and the instructions that PyTorch uses of it."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {capability}" if names else str(capability)


def memory_gb() -> float:
    """Peak memory so far: of the GPU when there is one, else resident memory of this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def keep_imports() -> None:
    """Take everything that is in memory now, the libraries above all, out of later collections.

    Each checkpoint asks for one, and nine tenths of its time went into modules that stay anyway.
    """
    gc.collect()
    gc.freeze()


def release_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps the pages of small tensors, a gigabyte of them in training.
    """
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
