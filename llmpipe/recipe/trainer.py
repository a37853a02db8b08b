"""`trainer:`: fields of the configuration underneath, checked by name without importing it."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from llmpipe.errors import near, nearest

# Fields of transformers' TrainingArguments that llmpipe sets itself; each with the recipe's name
# for it, if it has one.
OWNED: dict[str, str | None] = {
    "output_dir": "run",
    "run_name": "name",
    "seed": "seed",
    "data_seed": "seed",
    "learning_rate": "optim.learning_rate",
    "per_device_train_batch_size": "optim.batch_size and launch.micro_batch_size",
    "per_device_eval_batch_size": "launch.micro_batch_size",
    "gradient_accumulation_steps": "optim.batch_size and launch.micro_batch_size",
    "num_train_epochs": "optim.epochs",
    "max_steps": "optim.steps",
    "lr_scheduler_type": "optim.scheduler",
    "warmup_steps": "optim.warmup",
    "weight_decay": "optim.weight_decay",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.epsilon",
    "max_grad_norm": "optim.max_grad_norm",
    "bf16": "optim.precision",
    "fp16": "optim.precision",
    "bf16_full_eval": "optim.precision",
    "fp16_full_eval": "optim.precision",
    "tf32": "optim.precision",
    "use_cpu": "launch",
    "gradient_checkpointing": "launch.activation_checkpointing",
    "dataset_kwargs": "data",
    "dataset_num_proc": "data.processes",
    "remove_unused_columns": None,
    "pad_token": None,
    "model_init_kwargs": "model",
    "trust_remote_code": None,
    "eval_strategy": "evaluation.every",
    "eval_steps": "evaluation.every",
    "eval_on_start": "evaluation",
    "do_train": None,
    "do_eval": None,
    "do_predict": None,
    "save_strategy": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "save_only_model": "checkpoint",
    "save_on_each_node": "checkpoint",
    "load_best_model_at_end": "evaluation.keep_best",
    "metric_for_best_model": "evaluation.keep_best",
    "greater_is_better": "evaluation.keep_best",
    "resume_from_checkpoint": None,
    "restore_callback_states_from_checkpoint": None,
    "ignore_data_skip": None,
    "enable_jit_checkpoint": "checkpoint",
    "auto_find_batch_size": "launch.micro_batch_size",
    "logging_steps": "log.every",
    "logging_strategy": "log.every",
    "logging_first_step": "log.every",
    "logging_nan_inf_filter": None,
    "log_level": None,
    "report_to": "log.trackers",
    "disable_tqdm": None,
    "push_to_hub": None,
    "hub_token": None,
    "hub_model_id": None,
    "average_tokens_across_devices": None,
    "local_rank": "launch",
    "deepspeed": None,
    "fsdp": None,
    "fsdp_config": None,
    "accelerator_config": "launch",
    "parallelism_config": "launch",
    "label_smoothing_factor": None,
    "train_sampling_strategy": None,
    "length_column_name": None,
    "eval_delay": None,
    "eval_accumulation_steps": None,
    "prediction_loss_only": None,
    "include_for_metrics": None,
    "batch_eval_metrics": None,
    "hub_strategy": None,
    "hub_private_repo": None,
    "hub_always_push": None,
    "hub_revision": None,
    "use_liger_kernel": None,
}


class TrainerConfig(NamedTuple):
    """The configuration class of a library's trainer, and which fields llmpipe sets itself."""

    package: str
    module: str
    name: str
    owned: dict[str, str | None]
    """Field -> the recipe's name for it, if it has one; beside those that all trainers have."""

    def problems(self, trainer: Iterable[str]) -> dict[str, str]:
        """What is wrong with the keys of a recipe's `trainer:`, by key."""
        fields = config_fields(self.package, self.module, self.name)
        owned = OWNED | self.owned
        problems = {}
        for key in trainer:
            if key in owned:
                problems[key] = "llmpipe sets this itself" + _instead("; use ", owned[key])
            elif fields and key not in fields:
                free = [name for name in fields if name not in owned]
                hint = near(key, free)
                if not hint and (name := nearest(key, owned)):
                    hint = f"; '{name}' is set by llmpipe" + _instead(": use ", owned[name])
                problems[key] = f"{self.name} has no such field{hint}"
        return problems


def _instead(words: str, name: str | None) -> str:
    return f"{words}{name}" if name else ""


# Where the bases of those classes are written down: package and module.
_BASES = {
    "TrainingArguments": ("transformers", "training_args"),
    "_BaseConfig": ("trl", "trainer.base_config"),
}


@cache
def config_fields(package: str, module: str, name: str) -> frozenset[str]:
    """Fields of a config dataclass and its bases, read from the installed source, not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    path = Path(spec.submodule_search_locations[0], *module.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    fields: frozenset[str] = frozenset()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            fields |= _declared(node)
            for base in map(ast.unparse, node.bases):
                if base in _BASES:
                    fields |= config_fields(*_BASES[base], base)
    return fields


def _declared(node: ast.ClassDef) -> set[str]:
    """Names that are annotated in the body of a class."""
    return {
        item.target.id
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
