"""By what and on what an artifact was made: versions, commit, machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from llmpipe import __version__
from llmpipe.run.job import Job
from llmpipe.run.made import Made
from llmpipe.run.manifest import Document, Manifest
from llmpipe.run.reference import Model

LIBRARIES = (
    "torch transformers trl peft accelerate datasets tokenizers bitsandbytes safetensors "
    "lm_eval math_verify rouge_score sacrebleu"
).split()
"""Whose versions a manifest holds."""

ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "NCCL_DEBUG",
    "PYTORCH_CUDA_ALLOC_CONF",
)
"""Variables that a manifest holds."""


def describe(job: Job[Any], kind: str, made: Made, seconds: float) -> Manifest:
    """The manifest, less its file table, of what `job` made in so many seconds.

    `kind` is the stage's, unless it made another one.
    """
    models = job.plan.models
    named = models | job.plan.datasets
    parents = {parent.name: asdict(parent) for m in named.values() for parent in m.parents}
    document: Document = {
        "version": 1,
        "kind": made.kind or kind,
        "stage": job.recipe.stage,
        "name": job.artifact.name,
        "identity": job.plan.identity,
        "asked": asdict(job.plan.asked),
        "parents": list(parents.values()),
        "models": {
            field: {"reference": model.reference} | model.identity for field, model in named.items()
        },
        "seed": job.recipe.seed,
        "llmpipe": __version__,
        "git": git_commit(),
        "versions": versions(),
        "machine": {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "seconds": round(seconds, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if document["kind"] != "dataset" and (trained_on := _trained_on(models.get("model"))):
        document["base"] = {
            "kind": trained_on.kind,
            "reference": trained_on.reference,
            "identity": trained_on.identity,
            "folder": trained_on.seen_from(job.artifact.path),
        }
    return Manifest.of(document | made.record())


def versions() -> dict[str, str | None]:
    """Of Python and the libraries; None where one is not installed."""
    return {"python": platform.python_version()} | {name: installed(name) for name in LIBRARIES}


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Commit of the checkout that llmpipe runs from, with a + when it was changed.

    None when it is installed.
    """
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    describing = "describe --always --abbrev=40 --exclude=* --dirty=+".split()
    command = ["git", "-C", str(root), *describing]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def _trained_on(start: Model | None) -> Model | None:
    """The model whose weights were trained, or lay frozen under the adapter."""
    return start.base if start and start.is_adapter else start
