"""`trainer:`: fields of the configuration underneath, checked by name without importing it."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from llmpipe.errors import near
from llmpipe.recipe.sections import Recipe

# Fields of transformers' TrainingArguments that llmpipe sets itself, each with the recipe's name for it, if it has one.
_OWNED = """
    output_dir=run run_name=name seed=seed data_seed=seed learning_rate=optim.learning_rate
    per_device_train_batch_size=optim.batch_size+launch.micro_batch_size
    per_device_eval_batch_size=launch.micro_batch_size
    gradient_accumulation_steps=optim.batch_size+launch.micro_batch_size num_train_epochs=optim.epochs
    max_steps=optim.steps lr_scheduler_type=optim.scheduler warmup_steps=optim.warmup weight_decay=optim.weight_decay
    adam_beta1=optim.beta1 adam_beta2=optim.beta2 adam_epsilon=optim.epsilon max_grad_norm=optim.max_grad_norm
    bf16=optim.precision fp16=optim.precision bf16_full_eval=optim.precision fp16_full_eval=optim.precision
    tf32=optim.precision use_cpu=launch gradient_checkpointing=launch.activation_checkpointing dataset_kwargs=data
    dataset_num_proc=data.processes remove_unused_columns= pad_token= model_init_kwargs=model trust_remote_code=
    eval_strategy=evaluation.every eval_steps=evaluation.every eval_on_start=evaluation do_train= do_eval=
    do_predict= save_strategy=checkpoint.every save_steps=checkpoint.every save_total_limit=checkpoint.keep
    save_only_model=checkpoint save_on_each_node=checkpoint load_best_model_at_end=evaluation.keep_best
    metric_for_best_model=evaluation.keep_best greater_is_better=evaluation.keep_best resume_from_checkpoint=
    restore_callback_states_from_checkpoint= ignore_data_skip= enable_jit_checkpoint=checkpoint
    auto_find_batch_size=launch.micro_batch_size logging_steps=log.every logging_strategy=log.every
    logging_first_step=log.every logging_nan_inf_filter= log_level= report_to=log.trackers disable_tqdm= push_to_hub=
    hub_token= hub_model_id= average_tokens_across_devices= local_rank=launch deepspeed= fsdp= fsdp_config=
    accelerator_config=launch parallelism_config=launch label_smoothing_factor= train_sampling_strategy=
    length_column_name= eval_delay= eval_accumulation_steps= prediction_loss_only= include_for_metrics=
    batch_eval_metrics= hub_strategy= hub_private_repo= hub_always_push= hub_revision= use_liger_kernel=
"""


def owned(text: str) -> dict[str, str]:
    """`field=name` pairs of a stage's own trainer, and those that all trainers have; a + stands for `and`."""
    pairs = (pair.partition("=") for pair in (_OWNED + text).split())
    return {field: name.replace("+", " and ") for field, _, name in pairs}


@cache
def config_fields(package: str, module: str, name: str) -> dict[str, str]:
    """Field -> annotation of a config dataclass and its bases, read from the installed source without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return {}
    path = Path(spec.submodule_search_locations[0], *module.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    fields: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for base in node.bases:
                base_name = ast.unparse(base)
                if base_name == "TrainingArguments":
                    fields |= config_fields("transformers", "training_args", "TrainingArguments")
                elif base_name == "_BaseConfig":
                    fields |= config_fields("trl", "trainer.base_config", "_BaseConfig")
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    fields[item.target.id] = ast.unparse(item.annotation)
    return fields


def trainer_problems(trainer: dict[str, Any], schema: type[Recipe]) -> dict[str, str]:
    """What is wrong with the keys of `trainer:`, by key. A schema names its config and what llmpipe owns of it."""
    config: tuple[str, str, str] | None = getattr(schema, "trainer_config", None)
    if config is None:
        return {}
    owned: dict[str, str] = getattr(schema, "trainer_owned", {})
    fields = config_fields(*config)
    problems = {}
    for key in trainer:
        if key in owned:
            problems[key] = f"llmpipe sets this itself{f'; use {owned[key]}' if owned[key] else ''}"
        elif fields and key not in fields:
            free = [name for name in fields if name not in owned]
            hint = near(key, free)
            if not hint and (match := difflib.get_close_matches(key, list(owned), n=1, cutoff=0.6)):
                hint = f"; '{match[0]}' is set by llmpipe" + (
                    f": use {owned[match[0]]}" if owned[match[0]] else ""
                )
            problems[key] = f"{config[2]} has no such field{hint}"
    return problems
