"""Which server answers: that of transformers, of vLLM, or of llama-cpp-python."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from llmpipe.errors import UserError
from llmpipe.front import ahead
from llmpipe.front.serve.named import Served
from llmpipe.run.folders import BITSANDBYTES, quantized_by, reader_of
from llmpipe.run.interpreters import VLLM, environment_of, python_of
from llmpipe.run.machine import gpus

PACKAGES = {
    "transformers": ("fastapi", "openai", "uvicorn"),
    "llama-cpp": (
        *("llama_cpp", "fastapi", "pydantic_settings"),
        *("sse_starlette", "starlette_context"),
    ),
}
"""What a server needs that runs in this Python."""

EXTRAS = {"transformers": "llmpipe[serve]", "llama-cpp": "llmpipe[serve,gguf]"}


@dataclass(frozen=True)
class Engine:
    """A server's process."""

    name: str
    command: list[str]
    environment: dict[str, str]


def engine_for(model: Served, asked: str) -> Engine:
    """The engine that is `asked` for; `auto` is llama.cpp for a GGUF file, vLLM where it is
    installed and there is a GPU, else transformers: on a CPU vLLM takes minutes to begin, and
    refuses small heads. What bitsandbytes holds is transformers' everywhere.

    Raises UserError (2) for one that does not take the model, or is not installed.
    """
    name = _automatic(model) if asked == "auto" else asked
    if (name == "llama-cpp") != bool(model.gguf):
        takes = "a GGUF file alone" if name == "llama-cpp" else "no GGUF file"
        raise UserError(f"serve: --engine {name}: takes {takes}", "leave --engine out")
    if name == "vllm":
        return _vllm()
    reader = None if model.gguf else reader_of(model.folder)
    needed = dict.fromkeys(PACKAGES[name], EXTRAS[name])
    needed |= {reader: ahead.EXTRAS.get(reader, reader)} if reader else {}
    if missing := [package for package in needed if not find_spec(package)]:
        problem = f"serve: needs {', '.join(missing)}, which {'are' if missing[1:] else 'is'} not"
        extras = " ".join(f"'{extra}'" for extra in {needed[package]: 0 for package in missing})
        raise UserError(f"{problem} installed here", f"pip install {extras}")
    command = [sys.executable, "-m", "llmpipe.front.serve.host"]
    return Engine(name, command, dict(os.environ))


def _automatic(model: Served) -> str:
    if model.gguf:
        return "llama-cpp"
    is_tried = quantized_by(model.folder) != BITSANDBYTES  # which nobody has seen vLLM read
    return "vllm" if is_tried and gpus() and python_of(VLLM) else "transformers"


def _vllm() -> Engine:
    python = python_of(VLLM)
    if python is None:
        hint = "python -m venv vllm-env; vllm-env/bin/pip install vllm; PATH=$PATH:./vllm-env/bin"
        raise UserError("serve: --engine vllm: there is no command vllm on PATH", hint)
    # by its path: what lies beside it is not imported, since that would bring torch along
    script = Path(__file__).parents[2] / "upstream" / "vllm_server.py"
    return Engine("vllm", [python, str(script)], environment_of(python))
