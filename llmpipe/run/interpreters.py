"""Other Pythons of this machine: engines whose versions of torch and transformers are not ours live
in an environment of their own, and are known by the command that they install.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

VLLM = "vllm"
LLM_COMPRESSOR = "llmcompressor.trace"
"""Commands that tell where a package is installed."""


def python_of(command: str) -> str | None:
    """The Python that a command belongs to, which lies beside this Python or on PATH; None where
    there is none.

    With PATH=$PATH:./vllm-env/bin what is installed in the environment ./vllm-env is known.
    """
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    place = shutil.which(command, path=places)
    if place is None:
        return None
    file = Path(place).resolve()
    beside = file.with_name("python")
    if os.access(beside, os.X_OK):
        return str(beside)
    with file.open("rb") as script:
        first = script.readline().decode(errors="replace").strip()
    return _named_in(first)


def _named_in(first: str) -> str | None:
    """The Python that a script's first line names, where it can be run."""
    program, *given = first.removeprefix("#!").split() or [""]
    if Path(program).name == "env":
        program = next((word for word in given if not word.startswith("-")), "")
    is_python = first.startswith("#!") and Path(program).name.startswith("python")
    return shutil.which(program) if is_python else None


def environment_of(python: str) -> dict[str, str]:
    """The environment for a process of another Python: none of this one's packages, and the Hub is
    asked for nothing."""
    is_ours = Path(python).parent == Path(sys.executable).parent
    ours = () if is_ours else ("PYTHONPATH", "PYTHONHOME")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
