"""`llmpipe init --from THEIR.yaml`: a config of Axolotl or LLaMA-Factory as a recipe.

Each key of theirs is either carried over, to the field that is printed beside it, or named with the
reason why not. The tables below are all that is known of the two tools; what is in none of them is
named as unknown.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llmpipe.errors import Say, UserError
from llmpipe.files.json import read_json
from llmpipe.files.writing import write_whole
from llmpipe.recipe.check import AXOLOTL, LLAMA_FACTORY, tool_of, validate
from llmpipe.recipe.sections import TEMPLATES, is_local
from llmpipe.recipe.yaml import Where, dump, parse, read
from llmpipe.stages import schema

# --- the tables -----------------------------------------------------------------------------------


class Field(NamedTuple):
    """Where a value goes, and what becomes of it."""

    path: str
    """Dotted."""
    become: Callable[[Any], Any] = lambda value: value
    """What it is in a recipe; None where it is left to its default."""


def _one_of(names: dict[str, str]) -> Callable[[Any], Any]:
    return lambda value: names.get(str(value))


OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamw_hf", "adamw_torch", "adamw_torch_fused"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "paged_adamw"),
    "paged_adamw_8bit": "paged_adamw_8bit",
}

SCHEDULERS = ("cosine", "linear", "constant")
OBJECTIVES = ("sigmoid", "hinge", "ipo", "simpo", "orpo")
"""Of `dpo`, that are called the same there."""

_SCHEDULER = Field("optim.scheduler", _one_of({name: name for name in SCHEDULERS}))
_OPTIMIZER = Field("optim.optimizer", _one_of(OPTIMIZERS))
_PRECISION = Field("optim.precision", _one_of({"True": "bf16", "true": "bf16", "auto": "auto"}))
_AGAIN = Field("launch.activation_checkpointing", lambda value: "full" if value else "none")
_TEMPLATE = Field("data.template", _one_of({name: name for name in TEMPLATES}))
_TARGETS = Field("adapter.targets", lambda value: "all-linear" if value == "all" else _names(value))

BOTH: dict[str, Field] = {
    "output_dir": Field("run"),
    "seed": Field("seed"),
    "learning_rate": Field("optim.learning_rate", lambda value: float(value)),
    "max_steps": Field("optim.steps", lambda value: value if int(value) > 0 else None),
    "weight_decay": Field("optim.weight_decay", lambda value: float(value)),
    "max_grad_norm": Field("optim.max_grad_norm", lambda value: float(value)),
    "adam_beta1": Field("optim.beta1"),
    "adam_beta2": Field("optim.beta2"),
    "adam_epsilon": Field("optim.epsilon", lambda value: float(value)),
    "warmup_ratio": Field("optim.warmup"),
    "warmup_steps": Field("optim.warmup"),
    "bf16": _PRECISION,
    "gradient_checkpointing": _AGAIN,
    "logging_steps": Field("log.every"),
    "save_steps": Field("checkpoint.every"),
    "eval_steps": Field("evaluation.every"),
    "save_total_limit": Field("checkpoint.keep", lambda value: max(2, value)),
    "lora_alpha": Field("adapter.alpha"),
    "lora_dropout": Field("adapter.dropout"),
    "neftune_noise_alpha": Field("trainer.neftune_noise_alpha"),
}

FIELDS: dict[str, dict[str, Field]] = {
    AXOLOTL: BOTH
    | {
        "base_model": Field("model"),
        "sequence_len": Field("data.max_length"),
        "sample_packing": Field("data.packing"),
        "val_set_size": Field("data.eval.holdout"),
        "train_on_inputs": Field("data.loss", lambda value: "all" if value else None),
        "chat_template": _TEMPLATE,
        "num_epochs": Field("optim.epochs"),
        "micro_batch_size": Field("launch.micro_batch_size"),
        "optimizer": _OPTIMIZER,
        "lr_scheduler": _SCHEDULER,
        "lora_r": Field("adapter.rank"),
        "lora_target_modules": _TARGETS,
        "lora_target_linear": Field("adapter.targets", _one_of({"True": "all-linear"})),
        "peft_use_dora": Field("adapter.dora"),
        "peft_use_rslora": Field("adapter.rslora"),
        "dpo_beta": Field("beta"),
        "rl_beta": Field("beta"),
        "orpo_alpha": Field("beta"),
        "simpo_gamma": Field("gamma"),
    },
    LLAMA_FACTORY: BOTH
    | {
        "model_name_or_path": Field("model"),
        "cutoff_len": Field("data.max_length"),
        "packing": Field("data.packing"),
        "val_size": Field("data.eval.holdout"),
        "train_on_prompt": Field("data.loss", lambda value: "all" if value else None),
        "template": _TEMPLATE,
        "num_train_epochs": Field("optim.epochs"),
        "per_device_train_batch_size": Field("launch.micro_batch_size"),
        "optim": _OPTIMIZER,
        "lr_scheduler_type": _SCHEDULER,
        "lora_rank": Field("adapter.rank"),
        "lora_target": _TARGETS,
        "use_dora": Field("adapter.dora"),
        "use_rslora": Field("adapter.rslora"),
        "quantization_bit": Field("quantization.bits"),
        "pref_beta": Field("beta"),
        "pref_loss": Field("objective", _one_of({name: name for name in OBJECTIVES})),
        "simpo_gamma": Field("gamma"),
        "preprocessing_num_workers": Field("data.processes"),
    },
}

WHY_NOT: dict[str, str] = {
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "fsdp_version"),
        "how a model is spread is launch.strategy, which is chosen for this machine",
    ),
    **dict.fromkeys(
        ("flash_attention", "flash_attn", "xformers_attention", "attn_implementation"),
        "llmpipe chooses the attention, and says which and why",
    ),
    **dict.fromkeys(("fp16", "tf32"), "optim.precision knows auto, fp32 and bf16"),
    **dict.fromkeys(
        ("resume_from_checkpoint", "auto_resume_from_checkpoints", "overwrite_output_dir"),
        "the same command goes on from the newest checkpoint that verifies; --fresh begins anew",
    ),
    "trust_remote_code": "llmpipe runs no code of a model's folder",
    **dict.fromkeys(
        ("pad_to_sequence_len", "group_by_length", "dataloader_num_workers"),
        "rows lie end to end, ready on the disk: nothing to pad, to sort or to wait for",
    ),
    "saves_per_epoch": "say it in steps: checkpoint.every",
    "evals_per_epoch": "say it in steps: evaluation.every",
    **dict.fromkeys(
        ("dataset_prepared_path", "overwrite_cache", "tokenized_path"),
        "prepared rows are kept in the run by their content",
    ),
    **dict.fromkeys(
        ("model_type", "tokenizer_type", "tokenizer_config", "is_llama_derived_model"),
        "the model's folder says it",
    ),
    **dict.fromkeys(
        ("per_device_eval_batch_size", "eval_batch_size", "eval_strategy", "do_eval"),
        "held-out rows are measured whenever there are some",
    ),
    "special_tokens": "the tokenizer's own are kept, and those that the template needs are added",
    "strict": "a recipe is always closed",
    "plot_loss": "`llmpipe report` has the curves",
    "save_only_model": "a checkpoint can always be gone on from",
}
"""Keys that have no field, and why."""

USED = {
    "datasets", "test_datasets", "dataset", "dataset_dir", "eval_dataset", "max_samples", "adapter",
    "finetuning_type", "stage", "rl", "reward_model", "load_in_4bit", "load_in_8bit", "report_to",
    "gradient_accumulation_steps", "use_wandb", "do_train",
}  # fmt: skip
"""Keys that `_Reader` reads by itself."""

DEFAULTS: dict[str, dict[str, Any]] = {
    AXOLOTL: {"data.max_length": 512, "data.packing": False},
    LLAMA_FACTORY: {
        "data.max_length": 2048,
        "data.packing": False,
        "optim.learning_rate": 5e-5,
        "optim.epochs": 3,
        "optim.scheduler": "linear",
        "optim.warmup": 0,
    },
}
"""What the tools take where nothing is said, and llmpipe does not."""

ORDER = "stage run model data adapter quantization optim objective beta gamma".split()
"""Of the sections of a recipe; what is not named comes behind."""

AXOLOTL_FORMATS = {
    "alpaca": "alpaca",
    "completion": "text",
    "sharegpt": "sharegpt",
    "chat_template": "messages",
}

ROLES = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "messages": "conversations",
    "system": "system",
    "tools": "tools",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "label",
}
"""LLaMA-Factory's names of columns, and the formats' here."""


# --- the translation ------------------------------------------------------------------------------


def translate(path: Path, say: Say) -> Path:
    """Write STEM-llmpipe.yaml in this folder, and say what became of each key.

    Raises UserError for a file that is of none of the tools, and where something is still to be
    filled in: the recipe is written then.
    """
    values, where = read(path)
    tool = tool_of(values)
    if tool is None:
        problem = f"{path}:1: no config of {AXOLOTL} or {LLAMA_FACTORY} that is known"
        raise UserError(problem, "these name base_model and datasets, or model_name_or_path")
    target = Path(f"{path.stem}-llmpipe.yaml")
    if os.path.lexists(target):
        raise UserError(f"{target}: is there already", "move it away; nothing was written")
    reader = _Reader(tool, values, where, path)
    recipe = reader.recipe()
    text = f"# llmpipe {recipe['stage']} {target}\n#\n# From {path.name}, a config of {tool}.\n"
    left = [f"# Not carried over: {line}\n" for line in reader.left]
    text += "".join(left) + dump(recipe)
    write_whole(target, text.encode())
    for line in reader.carried:
        say(f"  {line}")
    for line in reader.left:
        say(f"not carried over: {line}")
    say(f"wrote {target}, for `llmpipe {recipe['stage']}`")
    again, lines = parse(text, str(target))
    validate(again, lines, schema(recipe["stage"]), str(target))
    say(f"next: llmpipe prepare {target} --show-rows 3   (the rows as the model will see them)")
    return target


@dataclass
class _Reader:
    """Reads a config of a tool, key by key."""

    tool: str
    theirs: dict[str, Any]
    where: Where
    path: Path
    carried: list[str] = field(default_factory=list)
    """What went where, in words."""
    left: list[str] = field(default_factory=list)
    """What did not, and why."""
    values: dict[str, Any] = field(default_factory=dict)
    """The recipe's, nested."""

    def recipe(self) -> dict[str, Any]:
        """A recipe with all that could be carried over."""
        stage = self._stage()
        self.put("run", f"runs/{self.path.stem}")
        self.put("data.train", list(self._sources()))
        for key, value in self.theirs.items():
            if value is not None and key not in USED:
                self._carry(key, value)
        self._batch()
        self._trackers()
        self._defaults()
        data = self.values["data"]
        if self.values.get("evaluation") and not data.get("eval"):
            del self.values["evaluation"]
            self.left.append("evaluation.every: no rows are held out")
        if stage not in ("sft", "lora", "qlora"):  # pairs are not packed
            self.values["data"] = {k: v for k, v in data.items() if k not in ("packing", "loss")}
        return {key: self.values[key] for key in sorted(self.values, key=_place)}

    def _defaults(self) -> None:
        """Say what is said nowhere, and would be another thing here."""
        defaults = dict(DEFAULTS[self.tool])
        adapter = self.values.get("adapter")
        if adapter is not None and self.tool == LLAMA_FACTORY:
            rank = adapter.get("rank", 8)
            defaults |= {"adapter.rank": rank, "adapter.alpha": 2 * rank}
        for path, value in defaults.items():
            section, _, name = path.partition(".")
            if name not in self.values.get(section, {}):
                self.put(path, value)
                self.carried.append(f"not set -> {path}: {value} (as {self.tool} has it)")

    def put(self, path: str, value: Any, key: str | None = None) -> None:
        """Set a field of the recipe, and say so of a key of theirs."""
        target = self.values
        *above, last = path.split(".")
        for name in above:
            target = target.setdefault(name, {})
        target[last] = value
        if key:
            self.carried.append(f"{key} -> {path}: {value}")

    def leave(self, key: str, why: str) -> None:
        self.left.append(f"{self.where.get((key,), self.path)}: {key}: {why}")

    def _carry(self, key: str, value: Any) -> None:
        """One key, to its field."""
        known = FIELDS[self.tool].get(key)
        prefix = key.partition("_")[0]
        if known is None:
            default = "llmpipe has no such field" if prefix != "wandb" else "wandb reads WANDB_*"
            self.leave(key, WHY_NOT.get(key, default))
            return
        try:
            became = known.become(value)
        except (TypeError, ValueError):
            self.leave(key, f"{value!r:.60} is not understood")
            return
        if became is None:
            self.leave(key, f"{value!r:.60}: {known.path} is left to its default")
            return
        self.put(known.path, became, key)

    def _stage(self) -> str:
        """Which stage this is, with its adapter."""
        theirs = self.theirs
        if self.tool == AXOLOTL:
            kind = theirs.get("adapter")
            named = theirs.get("rl") or ("rm" if theirs.get("reward_model") else "sft")
            bits = 4 if theirs.get("load_in_4bit") else 8 if theirs.get("load_in_8bit") else None
        else:
            kind = theirs.get("finetuning_type", "lora")
            named, bits = theirs.get("stage", "sft"), None
        stage = {"rm": "reward", "pt": "sft"}.get(named, "dpo" if named in OBJECTIVES else named)
        if stage not in ("sft", "reward", "dpo", "kto"):
            line = self.where.get(("stage",), self.where.get(("rl",), f"{self.path}:1"))
            problem = f"{line}: {stage}: is not translated"
            raise UserError(problem, "recipes/ppo.yaml is one to begin with; nothing was written")
        if named in OBJECTIVES:
            self.put("objective", named, "rl")
        if kind in ("lora", "qlora"):
            bits = bits or theirs.get("quantization_bit") or (4 if kind == "qlora" else None)
            self.put("adapter", {})
            stage = ("qlora" if bits else "lora") if stage == "sft" else stage
        if bits and kind in ("lora", "qlora"):
            self.put("quantization.bits", bits)
        self.put("stage", stage, "what it does")
        return stage

    def _batch(self) -> None:
        """`optim.batch_size`, which is that of all GPUs together."""
        size = self.values.get("launch", {}).get("micro_batch_size", 1)
        steps = self.theirs.get("gradient_accumulation_steps", 1)
        if isinstance(size, int) and isinstance(steps, int):
            self.put("optim.batch_size", size * steps, "micro-batch x accumulation")
            self.carried[-1] += " (of one GPU: multiply it by how many there were)"

    def _trackers(self) -> None:
        named = self.theirs.get("report_to")
        names = [named] if isinstance(named, str) else named or []
        if self.theirs.get("wandb_project") or self.theirs.get("use_wandb"):
            names = [*names, "wandb"]
        known = [name for name in names if name in ("tensorboard", "wandb", "mlflow", "trackio")]
        if known:
            self.put("log.trackers", list(dict.fromkeys(known)), "report_to")

    def _sources(self) -> Iterator[dict[str, Any]]:
        """The rows to train on."""
        key = "datasets" if self.tool == AXOLOTL else "dataset"
        named = self.theirs.get(key) or []
        for each in [named] if isinstance(named, dict) else _names(named):
            read = self._of_axolotl if self.tool == AXOLOTL else self._of_factory
            for source in read(each):
                self.carried.append(f"{key} -> data.train: {source}")
                yield source
        for other in ("test_datasets", "eval_dataset"):
            if self.theirs.get(other):
                self.leave(other, "write them into data.eval.sources")

    def _of_axolotl(self, theirs: Any) -> Iterator[dict[str, Any]]:
        """One of `datasets`, or several files of it."""
        if not isinstance(theirs, dict):
            theirs = {"path": theirs}
        files = theirs.get("data_files")
        kind = theirs.get("type")
        name = str(kind).partition(".")[0] if isinstance(kind, str) else ""
        format = AXOLOTL_FORMATS.get(name, "auto")
        if format == "messages" and theirs.get("field_messages") == "conversations":
            format = "sharegpt"
        if format == "auto" or self.values.get("objective") or self.theirs.get("rl"):
            format = "auto"
            self.leave("datasets", f"type {kind!r:.60}: format is found by the columns")
        for path in _names(files) if files else [theirs.get("path")]:
            source = {"path": _local(str(path), Path()), "format": format}
            yield source | _given(theirs, {"name": "subset", "split": "split"})

    def _of_factory(self, name: Any) -> Iterator[dict[str, Any]]:
        """A data set by its name in dataset_info.json, which says where it lies."""
        folder = Path(str(self.theirs.get("dataset_dir", "data")))
        known = read_json(folder / "dataset_info.json")
        about = known.get(str(name)) if isinstance(known, dict) else None
        limit = {"limit": self.theirs["max_samples"]} if "max_samples" in self.theirs else {}
        if not isinstance(about, dict):
            self.leave("dataset", f"{name}: not in {folder}/dataset_info.json: see its path")
            yield {"path": _local(f"{name}.json", folder)} | limit
            return
        of_hub = about.get("hf_hub_url")
        path = of_hub or _local(str(about.get("file_name", f"{name}.json")), folder)
        source: dict[str, Any] = {"path": path} | limit
        pairs = {yours: ROLES.get(theirs) for theirs, yours in about.get("columns", {}).items()}
        columns = {yours: ours for yours, ours in pairs.items() if ours and ours != yours}
        if columns:
            source["columns"] = columns
        yield source | _given(about, {"subset": "subset", "split": "split"})


def _place(key: str) -> int:
    return ORDER.index(key) if key in ORDER else len(ORDER)


def _given(theirs: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """What is set of these keys, under our names."""
    return {ours: theirs[name] for name, ours in names.items() if theirs.get(name)}


def _local(path: str, folder: Path) -> str:
    """A path as a recipe has it: what lies in `folder` begins with ./; else a name of the Hub."""
    here = folder / path
    is_file = here.exists() or is_local(path)
    return path if is_local(path) and path[0] in "./~" else f"./{here}" if is_file else path


def _names(value: Any) -> list[Any]:
    """A list, also of `a, b`."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return value if isinstance(value, list) else [value]
