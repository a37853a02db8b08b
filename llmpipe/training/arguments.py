"""A recipe in the words of TRL's configurations, and in those of the experiment trackers."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from transformers import TrainingArguments

from llmpipe.errors import UserError
from llmpipe.files.writing import write_whole
from llmpipe.parallel import zero
from llmpipe.recipe import sections
from llmpipe.recipe.optimizers import OPTIMIZERS
from llmpipe.run.artifact import Artifact
from llmpipe.training.schedule import in_transformers_words
from llmpipe.training.training import Training


def arguments(
    config: type[TrainingArguments], training: Training[sections.Hosted], **of_the_stage: Any
) -> TrainingArguments:
    """The recipe as one of TRL's configurations, with the fields that are the stage's own.

    Raises UserError when `trainer:` holds what the configuration refuses.
    """
    recipe = training.recipe
    trackers(recipe, training.artifact)
    fields = {
        **_surroundings(training),
        **_optimizer(recipe),
        **in_transformers_words(recipe),
        **of_the_stage,
    }
    if training.hardware.zero:
        fields |= _under_zero(training)
    try:
        made = config(**fields, **recipe.trainer)
    except (TypeError, ValueError, ImportError) as error:
        problem = f"trainer: {str(error).strip().splitlines()[0]}"
        raise UserError(problem, f"see the fields of TRL's {config.__name__}") from error
    if training.hardware.zero:
        zero.hide()
    return made


def _surroundings(training: Training[sections.Hosted]) -> dict[str, Any]:
    """Files, seeds, batches and precision. When to save and evaluate is `hosted`'s to decide."""
    recipe, artifact, hardware = training.recipe, training.artifact, training.hardware
    return {
        "output_dir": str(artifact.path),
        "run_name": f"{artifact.run.name}-{artifact.name}",
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "num_train_epochs": recipe.optim.epochs,
        "max_steps": recipe.steps or -1,
        "per_device_train_batch_size": hardware.micro_batch_size,
        "per_device_eval_batch_size": hardware.micro_batch_size,
        "gradient_accumulation_steps": hardware.accumulation,
        "gradient_checkpointing": hardware.activation_checkpointing != "none",
        "average_tokens_across_devices": True,
        "bf16": hardware.bf16,
        "use_cpu": hardware.device == "cpu",
        "accelerator_config": {"non_blocking": hardware.device == "cuda"},
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": recipe.log.every,
        "logging_nan_inf_filter": False,
        "report_to": recipe.log.trackers or "none",
        "disable_tqdm": True,
    }


def _under_zero(training: Training[sections.Hosted]) -> dict[str, Any]:
    """What makes a trainer's engine DeepSpeed's, which is told nothing of bf16: torch casts."""
    hardware, clip = training.hardware, training.recipe.optim.max_grad_norm
    zero.begin(hardware.device)
    form = zero.Zero(hardware.zero, hardware.micro_batch_size, hardware.accumulation, clip)
    return {
        "deepspeed": form.config(),
        "bf16": False,
        "accelerator_config": {
            "non_blocking": hardware.device == "cuda",
            "use_configured_state": True,
        },
    }


def _optimizer(recipe: sections.Training) -> dict[str, Any]:
    optim = recipe.optim
    fields: dict[str, Any] = {
        "learning_rate": optim.learning_rate,
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.beta1,
        "adam_beta2": optim.beta2,
        "adam_epsilon": optim.epsilon,
        "max_grad_norm": optim.max_grad_norm,
    }
    if name := OPTIMIZERS[optim.optimizer].in_trainer:
        fields["optim"] = name
    return fields


def trackers(recipe: sections.Training, artifact: Artifact) -> None:
    """Point the experiment trackers at this artifact: a resumed run continues its tracker's run.

    Raises UserError when the recipe names one that is not installed.
    """
    names = recipe.log.trackers
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"log.trackers: {name} is not installed", f"pip install {name}")
    if not names:
        return
    home = artifact.run / ".trackers" / artifact.name
    home.mkdir(parents=True, exist_ok=True)
    token = home / "run_id"
    if not token.exists():
        write_whole(token, os.urandom(4).hex().encode())
    os.environ.setdefault("WANDB_RUN_ID", token.read_text())
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ.setdefault("WANDB_DIR", str(home))
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(home))
