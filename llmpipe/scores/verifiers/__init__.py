"""The verifiers of answers, each in a file of this folder that defines its `CHECK`, and no more.

The file's name is what a recipe calls it: as a score of `eval` and as a reward of `ppo` and `grpo`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmpipe.files.paths import modules_in
from llmpipe.scores.check import Check

VERIFIERS: dict[str, Check] = {
    name: import_module(f"{__name__}.{name}").CHECK for name in modules_in(Path(__file__).parent)
}

if TYPE_CHECKING:
    Verifier = str
else:
    Verifier = Literal[tuple(VERIFIERS)]
