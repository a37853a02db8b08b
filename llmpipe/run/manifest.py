"""What a manifest says: what was made, of what, by what, on what."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from llmpipe import __version__
from llmpipe.run.job import Job

# the libraries whose versions a manifest holds
VERSIONS = (
    "torch transformers trl peft accelerate datasets tokenizers bitsandbytes safetensors "
    "lm_eval math_verify rouge_score sacrebleu"
).split()

BASE = (
    "kind",
    "reference",
    "identity",
)  # what a manifest says of the model that was trained, or trained on

ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "NCCL_DEBUG",
    "PYTORCH_CUDA_ALLOC_CONF",
)


@dataclass
class Made:
    """What a stage's `train` says of what it made."""

    final: dict[str, Any]
    """The last metrics."""
    kind: str | None = None
    """Kind of the artifact, where it is another one than the stage's."""
    training: dict[str, Any] | None = None
    hardware: dict[str, Any] | None = None
    verified: dict[str, Any] | None = None
    """What was compared after reloading."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Of the rows and the tokenizer, see `PreparedRows.facts`."""
    merged: list[str] = field(default_factory=list)
    """Artifacts of the merged model, beside the adapter's."""

    def record(self) -> dict[str, Any]:
        named = ("final", "training", "hardware", "verified")
        values = {name: getattr(self, name) for name in named}
        return self.facts | {name: value for name, value in values.items() if value is not None}


def describe(job: Job, kind: str, made: Made, seconds: float) -> dict[str, Any]:
    """The manifest, less its file table: what was made, of what, by what, on what."""
    models = job.plan.models
    start = models.get("model")
    trained_on = start.base if start and start.is_adapter else start
    base = {name: getattr(trained_on, name) for name in BASE} if trained_on else {}
    return {
        "version": 1,
        "kind": made.kind or kind,
        "stage": job.recipe.stage,
        "name": job.artifact.name,
        "identity": job.plan.identity,
        "asked": job.plan.asked.model_dump(),
        "parents": list(
            {p["name"]: p for model in models.values() for p in model.parents}.values()
        ),
        "models": {
            at: {"reference": model.reference, **model.identity} for at, model in models.items()
        },
        **({"base": base} if base else {}),
        "seed": job.recipe.seed,
        **made.record(),
        "llmpipe": __version__,
        "git": git_commit(),
        "versions": {"python": platform.python_version(), **{n: installed(n) for n in VERSIONS}},
        "machine": {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "seconds": round(seconds, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Commit of the checkout that llmpipe runs from, with a + when it was changed; None when it is installed."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--abbrev=40",
        "--exclude=*",
        "--dirty=+",
    ]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
