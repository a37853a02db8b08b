"""Accelerate, with the recipe's experiment trackers begun."""

from __future__ import annotations

import os

from accelerate import Accelerator

from llmpipe.files.json import flat
from llmpipe.models.hardware import Hardware
from llmpipe.parallel import group
from llmpipe.recipe.places import portable_paths, with_values
from llmpipe.recipe.sections import Training
from llmpipe.run.job import Job
from llmpipe.training.arguments import trackers


def accelerator(job: Job[Training], hardware: Hardware) -> Accelerator:
    """The processes of a run; its trackers show the recipe, as transformers does for other
    stages."""
    trackers(job.recipe, job.artifact)
    names = job.recipe.log.trackers
    accelerator = group.accelerator(
        hardware.device,
        log_with=names or None,
        project_dir=os.environ.get("TENSORBOARD_LOGGING_DIR"),
    )
    if names:
        project = os.environ.get("WANDB_PROJECT", "huggingface")  # as transformers calls it
        name = f"{job.artifact.run.name}-{job.artifact.name}"
        options = {
            "wandb": {"name": name},
            "mlflow": {"run_name": name},
            "trackio": {"name": name, "resume": "allow"},
        }
        values = job.recipe.model_dump(mode="json", by_alias=True)
        recipe = flat(
            with_values(values, portable_paths(job.recipe) | {"run": job.artifact.run.name})
        )
        shown = {
            field: value if isinstance(value, bool | int | float) else str(value)
            for field, value in recipe.items()
        }
        accelerator.init_trackers(project, shown, options)
    return accelerator
