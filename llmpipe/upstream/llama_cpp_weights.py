"""How llama.cpp lays out the weights of a file.

Where a processor has AMX (Intel's, since Sapphire Rapids), llama.cpp 0.3.36 lays quantized weights
out anew for it, and the first pass then ends the process with a fault: seen on a virtual machine,
with every file of q8_0 and q4_k_m.

Imported only where llama-cpp-python is installed: pip install 'llmpipe[gguf]'.
"""

from __future__ import annotations

from functools import cache, wraps
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp

PROCESSOR = Path("/proc/cpuinfo")


@cache
def leave_as_in_file() -> None:
    """Let models that are loaded from now on keep their weights as files have them, where the
    processor has AMX. It costs speed there, of long prompts above all."""
    if not PROCESSOR.exists() or "amx_tile" not in PROCESSOR.read_text():
        return
    original = llama_cpp.llama_model_default_params

    @wraps(original)
    def as_in_file() -> Any:
        params = original()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_model_default_params = as_in_file
