"""`llmpipe sft`: supervised fine-tuning. Learn to answer from examples, loss on the assistant's turns.

Inputs: a causal language model and rows (text, alpaca, sharegpt, messages or prompt-completion). Makes: a `model`.
The story is `train`, top to bottom; the trainer underneath is TRL's SFTTrainer on rows that llmpipe prepared.
"""

from __future__ import annotations

import shutil
from typing import Any, ClassVar, Literal

from llmpipe import rundir
from llmpipe.recipe import Training
from llmpipe.stages import Job

ACCEPTS = ("model",)
MAKES = "model"
PROGRESS = "checkpoints/step-*"


class Schema(Training):
    stage: Literal["sft"] = "sft"
    """Supervised fine-tuning."""

    trainer_config: ClassVar[tuple[str, str, str]] = ("trl", "trainer.sft_config", "SFTConfig")
    trainer_owned: ClassVar[dict[str, str]] = {
        # what llmpipe sets itself -> the recipe's name for it
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
        "activation_checkpointing": "launch.activation_checkpointing",
        "max_length": "data.max_length",
        "packing": "data.packing",
        "packing_strategy": "data.packing",
        "eval_packing": "data.packing",
        "padding_free": "data.packing",
        "truncation_mode": "data.max_length",
        "chat_template_path": "data.template",
        "assistant_only_loss": "data.loss",
        "completion_only_loss": "data.loss",
        "dataset_text_field": "data.train.N.columns",
        "dataset_kwargs": "data",
        "dataset_num_proc": "data.processes",
        "shuffle_dataset": "data",
        "remove_unused_columns": "",
        "eos_token": "data.template",
        "pad_token": "",
        "model_init_kwargs": "model",
        "trust_remote_code": "",
        "eval_strategy": "evaluation.every",
        "eval_steps": "evaluation.every",
        "eval_on_start": "evaluation",
        "do_train": "",
        "do_eval": "",
        "do_predict": "",
        "save_strategy": "checkpoint.every",
        "save_steps": "checkpoint.every",
        "save_total_limit": "checkpoint.keep",
        "save_only_model": "checkpoint",
        "save_on_each_node": "checkpoint",
        "load_best_model_at_end": "evaluation.keep_best",
        "metric_for_best_model": "evaluation.keep_best",
        "greater_is_better": "evaluation.keep_best",
        "resume_from_checkpoint": "",
        "restore_callback_states_from_checkpoint": "",
        "ignore_data_skip": "",
        "enable_jit_checkpoint": "checkpoint",
        "auto_find_batch_size": "launch.micro_batch_size",
        "logging_steps": "log.every",
        "logging_strategy": "log.every",
        "logging_first_step": "log.every",
        "logging_nan_inf_filter": "",
        "log_level": "",
        "report_to": "log.trackers",
        "disable_tqdm": "",
        "push_to_hub": "",
        "hub_token": "",
        "hub_model_id": "",
        "average_tokens_across_devices": "",
        "local_rank": "launch",
        "deepspeed": "",
        "fsdp": "",
        "fsdp_config": "",
        "accelerator_config": "launch",
        "parallelism_config": "launch",
        "label_smoothing_factor": "",
        # of the loops that llmpipe has its own of
        "train_sampling_strategy": "",
        "length_column_name": "",
        "eval_delay": "",
        "eval_accumulation_steps": "",
        "prediction_loss_only": "",
        "include_for_metrics": "",
        "batch_eval_metrics": "",
        "hub_strategy": "",
        "hub_private_repo": "",
        "hub_always_push": "",
        "hub_revision": "",
        "use_liger_kernel": "",
    }


def prepare(job: Job) -> dict[str, Any]:
    """Rows -> tokens. Returns what the trainer and the manifest need to know of them."""
    from llmpipe.data.prepare import prepare as tokenize

    recipe = job.recipe
    folder = tokenize(
        recipe.data, job.model, job.prepared, seed=recipe.seed, say=job.say, pinned=job.plan["asked"]["content"]
    )
    return {"data": folder.name, **rundir.read_json(folder / "prepared.json")}


def train(job: Job, prepared: dict[str, Any]) -> dict[str, Any]:
    """Train, publish `model/` and return what the manifest says of it."""
    from llmpipe.data.prepare import facts
    from llmpipe.engine import upstream

    upstream.silence()
    from trl import SFTTrainer

    from llmpipe.engine import models, training, verify
    from llmpipe.engine.generate import answer_samples

    recipe, artifact, say = job.recipe, job.artifact, job.say
    rows = job.prepared / prepared["data"]
    hardware = models.hardware(recipe, say)
    tokenizer = models.load_tokenizer(rows / "tokenizer")
    model = models.load(
        job.model, tokenizer, hardware, stop=prepared["stop_tokens"], packed=recipe.data.packing, say=say
    )

    arguments = training.sft_arguments(recipe, artifact, hardware)
    trainer = training.durable(SFTTrainer)(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=training.dataset(rows / "train.arrow"),
        eval_dataset=training.dataset(rows / "eval.arrow") if prepared["rows"]["eval"] else None,
    )
    identity = f"{job.plan['identity']}:{prepared['content_digest']}"  # of the recipe, and of the very tokens
    trainer.attach(job.artifact, recipe, identity, hardware, job.signals, say, inexact=job.inexact)

    kwargs = recipe.data.chat_template_kwargs
    answer_samples(trainer, tokenizer, recipe.samples, artifact.path / "samples.jsonl", "before", kwargs)
    final = trainer.fit()
    answer_samples(trainer, tokenizer, recipe.samples, artifact.path / "samples.jsonl", "after", kwargs)

    verified = verify.publish(trainer, tokenizer, artifact.model, say)
    if trainer.is_world_process_zero():
        for name in ("rejected.jsonl", "seen.safetensors"):
            shutil.copyfile(rows / name, artifact.path / name)
    made = {"final": final, "verified": verified, "training": trainer.facts(), "hardware": hardware.describe()}
    return facts(prepared) | made
