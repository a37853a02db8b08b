"""A job as the file that a system takes: a template of this folder, and what fills it."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmpipe.errors import UserError, near
from llmpipe.front.submit.job import Job, SystemName

Options = dict[str, str | None]
"""What `--option` gives: a value, None for a word alone, "" for what is to be left out."""

_OPTION = re.compile(r"[a-z][a-z_-]*")

RESTARTS = 100
"""Times that a job goes back into SLURM's queue by itself: each has made some steps, or waited."""

SHUTDOWN = "120"
"""Seconds for a checkpoint, from SIGTERM on; torchrun would grant its processes 30."""

SAVED_EVERY = 300
"""Seconds between two copies of a run to its bucket."""


def read_options(given: list[str]) -> Options:
    """KEY=VALUE, or KEY, of each. Raises UserError for what is neither."""
    options: Options = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not _OPTION.fullmatch(key) or "\n" in value:
            hint = "such as --option partition=gpu, as the system itself calls it"
            raise UserError(f"--option {text}: expected KEY=VALUE, or KEY", hint)
        options[key] = value if equals else None
    return options


def render(system: SystemName, job: Job, options: Options, made_by: str) -> str:
    """The file. Raises UserError for an option that is not there, or is missing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"shell": lambda value: shlex.quote(str(value)), "json": json.dumps}
    filling = FILLINGS[system](job, options)
    text = templates.get_template(f"{system}.jinja").render(
        job=job,
        made_by=made_by,
        command=shlex.join(job.command),
        arguments=shlex.join(job.command[1:]),
        **filling,
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def _slurm(job: Job, options: Options) -> dict[str, Any]:
    """Every option is one of sbatch."""
    sbatch: Options = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.processes_per_node),
        "gpus-per-node": str(job.gpus) if job.gpus else "",
        "cpus-per-task": "8",
        "time": "24:00:00",
        "output": f"{job.run}/slurm-%j.log",
        "open-mode": "append",
        "signal": f"TERM@{SHUTDOWN}",
        "requeue": None,
    }
    return {
        "sbatch": _without_empty(sbatch | options),
        "folder": os.getcwd(),
        "programs": os.path.dirname(sys.executable),
        "restarts": RESTARTS,
    }


def _sky(job: Job, options: Options) -> dict[str, Any]:
    """`bucket`, `volume` and `image` are ours, every other one is a field of `resources:`."""
    machine: Options = {"accelerators": f"H100:{job.gpus}"} if job.gpus else {"cpus": "8+"}
    resources: Options = machine | {"use_spot": "true"} | options
    volume, image = resources.pop("volume", None), resources.pop("image", None)
    bucket = resources.pop("bucket", None) or f"llmpipe-{job.name}"
    if job.nodes > 1 and not volume:
        problem = "sky: on several machines the run is on the first one's disk, and gone with that"
        raise UserError(problem, "--option volume=NAME, one that `sky volumes apply` has made")
    if image:
        resources["image_id"] = image if ":" in image.split("/")[0] else f"docker:{image}"
    return {
        "resources": {field: _typed(value) for field, value in _without_empty(resources).items()},
        "volume": volume,
        "bucket": bucket,
        "image": image,
        "seconds": SAVED_EVERY,
        "shutdown": SHUTDOWN,
    }


def _kubeflow(job: Job, options: Options) -> dict[str, Any]:
    known = {
        "image": "",
        "namespace": "default",
        "claim": "llmpipe",
        "runtime": "torch-distributed",
        "cpu": str(8 * job.processes_per_node),
        "memory": f"{64 * job.processes_per_node}Gi",
    }
    for key in options.keys() - known.keys():
        hint = f"there are: {', '.join(known)}"
        raise UserError(f"--option {key}: kubeflow has none of it{near(key, known)}", hint)
    values = known | {key: value or "" for key, value in options.items()}
    if not values["image"]:
        raise UserError("kubeflow: no image named", "--option image=REGISTRY/llmpipe:TAG")
    return values | {"shutdown": SHUTDOWN}


def _docker(job: Job, options: Options) -> dict[str, Any]:
    """`image` is ours, every other one is an option of `docker run`."""
    flags: Options = {
        "name": job.name,
        "gpus": str(job.gpus) if job.gpus else "",
        "shm-size": "8g",
        "stop-timeout": SHUTDOWN,
    }
    flags |= options
    image = flags.pop("image", None) or "llmpipe"
    shutdown = flags["stop-timeout"] or SHUTDOWN
    return {"flags": _without_empty(flags), "image": image, "shutdown": shutdown}


def _without_empty(options: Options) -> Options:
    return {key: value for key, value in options.items() if value != ""}


def _typed(value: str | None) -> Any:
    """A field of YAML: a word alone is true."""
    if value is None or value in ("true", "false"):
        return value != "false"
    return int(value) if value.isdecimal() else value


FILLINGS: dict[SystemName, Callable[[Job, Options], dict[str, Any]]] = {
    "slurm": _slurm,
    "sky": _sky,
    "kubeflow": _kubeflow,
    "docker": _docker,
}
