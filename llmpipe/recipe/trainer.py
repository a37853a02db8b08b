"""`trainer:`: fields of the configuration underneath, checked by name without importing it."""

from __future__ import annotations

import ast
import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

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

_COMPILED = (
    "launch.compile compiles the layers; a whole model would be compiled anew for rows of every "
    "length, and a resumed run would not end in the same bytes"
)
_WORKERS = "rows lie prepared in memory: workers would have nothing to do, and read a stream twice"
_LAUNCH = "llmpipe starts the processes itself"
_UNTRIED = "llmpipe is not tested with it"
_COUNTED = "metrics.jsonl has it already"
_HELD_OUT = "llmpipe measures held-out rows itself"

# Fields that would break what llmpipe promises, or that nothing would read; each with the reason.
REFUSED: dict[str, str] = {
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "dataloader_drop_last": "rows would be left out, and no count would say so",
    "dataloader_num_workers": _WORKERS,
    "dataloader_persistent_workers": _WORKERS,
    "dataloader_prefetch_factor": _WORKERS,
    "dataloader_multiprocessing_context": _WORKERS,
    "dataloader_in_order": _WORKERS,
    "label_names": "llmpipe names the columns itself",
    "pad_to_multiple_of": "rows are laid end to end, not padded",
    "activation_offloading": _UNTRIED,
    "liger_kernel_config": "Liger's kernels are not used",
    "optim_args": "no optimizer that may be named reads it",
    "optim_target_modules": "no optimizer that may be named reads it",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs is what is read",
    "use_cache": "training has no use for a cache",
    "ddp_backend": _LAUNCH,
    "ddp_timeout": _LAUNCH,
    "log_on_each_node": _LAUNCH,
    "log_level_replica": _LAUNCH,
    "include_num_input_tokens_seen": _COUNTED,
    "skip_memory_metrics": _COUNTED,
    "eval_do_concat_batches": _HELD_OUT,
    "eval_use_gather_object": _HELD_OUT,
    "trackio_bucket_id": _UNTRIED,
    "trackio_static_space_id": _UNTRIED,
}


class Kind(NamedTuple):
    """The values that a field may have."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _only(key: str, holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a section with this key alone."""
    return lambda value: isinstance(value, dict) and list(value) == [key] and holds(value[key])


def one_of(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda value: value in names)


YES_NO = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("text", lambda value: isinstance(value, str) and bool(value.strip()))
WHOLE = Kind("a whole number above 0", _whole)

OF_BITSANDBYTES = ("lion_32bit", "lion_8bit", "ademamix", "ademamix_8bit")
"""Optimizers that may be named and need a package of their own."""

# Fields that a recipe may set, and to what; tests/training/test_trainer.py tries each of them.
FREE: dict[str, Kind] = {
    "optim": one_of("adafactor", "sgd", "adagrad", "rmsprop", *OF_BITSANDBYTES),
    "lr_scheduler_kwargs": Kind(
        "{num_cycles: NUMBER}, of scheduler: cosine",
        _only("num_cycles", lambda value: _is_number(value) and 0 < value < 1000),
    ),
    "gradient_checkpointing_kwargs": Kind(
        "{use_reentrant: true} or {use_reentrant: false}",
        _only("use_reentrant", YES_NO.holds),
    ),
    "neftune_noise_alpha": Kind(
        "a number above 0", lambda value: _is_number(value) and 0 < value < 1e6
    ),
    "router_aux_loss_coef": Kind(
        "a number of at least 0", lambda value: _is_number(value) and 0 <= value < 1e6
    ),
    "loss_type": one_of("nll", "dft"),
    "discopop_tau": Kind("a number above 0", lambda value: _is_number(value) and 0 < value < 1e6),
    "torch_empty_cache_steps": WHOLE,
    "full_determinism": YES_NO,
    "debug": one_of("underflow_overflow"),
    "dataloader_pin_memory": YES_NO,
    "ddp_find_unused_parameters": YES_NO,
    "ddp_bucket_cap_mb": WHOLE,
    "ddp_broadcast_buffers": YES_NO,
    "ddp_static_graph": YES_NO,
    "project": TEXT,
    "trackio_space_id": TEXT,
}


class TrainerConfig(NamedTuple):
    """The configuration class of a library's trainer, and which fields llmpipe sets itself."""

    package: str
    module: str
    name: str
    owned: dict[str, str | None]
    """Field -> the recipe's name for it, if it has one; beside those that all trainers have."""

    def problems(self, trainer: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """What is wrong with a recipe's `trainer:`: keys, each with the reason."""
        for key, value in trainer.items():
            if problem := self._problem(key, value):
                yield key, problem

    def _problem(self, key: str, value: Any) -> str | None:
        fields = config_fields(self.package, self.module, self.name)
        owned = OWNED | self.owned
        if key in owned:
            return "llmpipe sets this itself" + _instead("; use ", owned[key])
        if key in REFUSED:
            return f"is refused: {REFUSED[key]}"
        if fields and key not in fields:
            hint = near(key[:100], [name for name in fields if name in FREE])
            if not hint and (name := nearest(key[:100], [*owned, *REFUSED])):
                hint = f"; '{name}': {self._problem(name, None)}"
            return f"{self.name} has no such field{hint}"
        if key not in FREE:  # of a version of the library that is not this one
            return f"is refused: {_UNTRIED}"
        kind = FREE[key]
        return None if kind.holds(value) else f"is {kind.words}, not {value!r:.60}"


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
