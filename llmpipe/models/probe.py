"""What PyTorch finds on this machine, and what `auto` becomes on it: for `llmpipe doctor`.

A process of its own (`python -m llmpipe.models.probe`), since a broken driver may hang or kill it:
every answer is a line `TITLE<tab>text` as soon as it is known, and `!TITLE<tab>text` where
something is wrong.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmpipe import noise
from llmpipe.errors import first_line
from llmpipe.files.tables import in_bytes
from llmpipe.kernels import cpu, cuda
from llmpipe.kernels.apart import Weighing
from llmpipe.recipe.sections import Launch
from llmpipe.run.machine import full_pass, gpus, thread_count

LENGTHS = [16, 32]
"""Tokens of the documents that are tried."""


def tell(title: str, text: str) -> None:
    print(f"{title}\t{text}", flush=True)


def main() -> None:
    tell("PyTorch", _build())
    usable = _look_at_cards()
    _compute("cuda" if usable else "cpu")
    if usable:
        _compile()
    _choose(usable)


def _build() -> str:
    """Which PyTorch this is."""
    if torch.version.cuda:
        made_for = f"CUDA {torch.version.cuda}"
    else:
        made_for = f"ROCm {torch.version.hip}" if torch.version.hip else "CPUs alone"
    return f"{torch.__version__}, made for {made_for}"


def _look_at_cards() -> bool:
    """Say which GPUs PyTorch can use; whether there are any."""
    if not torch.cuda.is_available():
        if gpus():
            why = "its build is for CPUs" if not torch.version.cuda else "the driver may be too old"
            tell("!CUDA", f"{gpus()} GPUs are here, and PyTorch can use none: {why}")
        else:
            tell("CUDA", "no GPU")
        return False
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        kind = f"compute capability {card.major}.{card.minor}"
        memory = f"{in_bytes(free)} of {in_bytes(total)} free"
        tell("CUDA", f"{number}: {card.name}, {kind}, {memory}")
    return True


def _compute(device: str) -> None:
    """Attend to two documents in one row, forward and backward, and compare with one at a time."""
    half = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if half else torch.float32
    torch.manual_seed(0)
    drawn = [torch.randn(1, 2, 48, 16, device=device, dtype=dtype) for _ in range(3)]
    rows = [tensor.requires_grad_() for tensor in drawn]
    try:
        attended = _attend(*rows)
        attended.sum().backward()
        parts = zip(*(row.split(LENGTHS, dim=2) for row in rows), strict=True)
        alone = [scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in parts]
        worst = (attended.transpose(1, 2) - torch.cat(alone, 2)).abs().max().item()
    except (RuntimeError, OSError) as error:
        tell("!kernels", f"attention failed on {device}: {first_line(error)}")
        return
    name = f"attention of packed rows on {device}, {str(dtype).removeprefix('torch.')}"
    if worst > 0.02:
        tell("!kernels", f"{name}: wrong by {worst:.2g}")
    else:
        tell("kernels", f"{name}: forward and backward are right")


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As training does it on this device."""
    if query.device.type == "cpu":
        return cpu.attend_documents(query, key, value, LENGTHS, Weighing())
    ends = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=query.device)
    return cuda.attend_documents(query, key, value, ends, max(LENGTHS), Weighing())


def _compile() -> None:
    """Say whether layers can be compiled."""
    if not find_spec("triton"):
        tell("!compile", "triton is not installed: set launch.compile: false")
    elif not any(map(shutil.which, ("cc", "gcc", "clang"))):
        tell("!compile", "no C compiler: install gcc, or set launch.compile: false")
    else:
        tell("compile", "triton and a C compiler are here")


def _choose(usable: bool) -> None:
    """Say what a recipe gets that leaves everything to `auto`, and why."""
    noise.silence()
    from llmpipe.models.hardware import detect, precision

    host = detect(Launch())
    processes = max(gpus(), 1) if usable else 1
    per = "one for each GPU, or fewer where they do not divide a batch"
    tell("auto", f"launch.processes: {processes} ({per if usable else 'no GPU'})")
    bf16, why = precision("auto", host)
    tell("auto", f"optim.precision: {'bf16' if bf16 else 'fp32'} ({why})")
    threads = thread_count(Launch(), processes)
    tell("auto", f"launch.threads: {threads} for each process (the cores that it may use)")
    if usable:
        size = "the most that fits, tried before the first step"
    else:
        size = f"as many sequences as have {full_pass(False):,} tokens"
    tell("auto", f"launch.micro_batch_size: {size}")
    compiled = "true (at the first step; not in ppo and grpo)" if usable else "false"
    tell("auto", f"launch.compile: {compiled}")
    again = "none where that fits, else selective, else full" if usable else "none"
    tell("auto", f"launch.activation_checkpointing: {again}")
    tell("auto", "launch.strategy: ddp where the model fits a device, else fsdp")


if __name__ == "__main__":
    main()
