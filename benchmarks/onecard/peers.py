"""Bare TRL, as its documentation has it, in a process of its own.

    python benchmarks/onecard/peers.py < told.json

Measured are the ends of its steps, in seconds since the process was asked for, once the card has
done what it was given; what was trained on by then; and the peak of the card's memory. That is the
last line printed.
"""

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
)

CUDA = torch.cuda.is_available()


class Clock(TrainerCallback):
    """When each step had ended."""

    def __init__(self, asked: float):
        self.asked = asked
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.ends.append(time.time() - self.asked)


def rows_of(path: str) -> Dataset:
    return Dataset.from_list([json.loads(line) for line in Path(path).read_text().splitlines()])


def lora(told: dict) -> LoraConfig | None:
    """Of every linear layer but the head."""
    if not told.get("rank"):
        return None
    rank = told["rank"]
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def policy(told: dict) -> AutoModelForCausalLM:
    """Weights in fp32 where they are trained, else in the precision of the arithmetic."""
    half = torch.bfloat16 if told["bf16"] else torch.float32
    how: dict[str, Any] = {"dtype": half if told.get("rank") else torch.float32}
    if told.get("bits") == 4:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=half,
        )
    return AutoModelForCausalLM.from_pretrained(told["model"], **how)


def common(told: dict, out: str) -> dict[str, Any]:
    """What every trainer of TRL's is told; activations are kept, which is its faster way."""
    return {
        "output_dir": out,
        "bf16": told["bf16"],
        "use_cpu": not CUDA,
        "per_device_train_batch_size": told["micro_batch"],
        "learning_rate": 1e-5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }


def trained(told: dict, clock: Clock, out: str) -> list[float]:
    """SFTTrainer or DPOTrainer; the tokens that it counted by the end of each step."""
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    settings = common(told, out) | {
        "max_length": told["length"],
        "gradient_accumulation_steps": told["batch"] // told["micro_batch"],
        "max_steps": told["steps"],
    }
    named = {
        "model": policy(told),
        "train_dataset": rows_of(told["rows"]),
        "processing_class": AutoTokenizer.from_pretrained(told["model"]),
        "callbacks": [clock],
        "peft_config": lora(told),
    }
    if told["kind"] == "dpo":
        trainer = DPOTrainer(args=DPOConfig(**settings), **named)
    else:
        trainer = SFTTrainer(args=SFTConfig(**settings, packing=told["packing"]), **named)
    trainer.train()
    return [line["num_tokens"] for line in trainer.state.log_history if "num_tokens" in line]


def reinforced(told: dict, clock: Clock, out: str) -> list[float]:
    """PPOTrainer of trl 1.12, the last one that had it; the episodes by the end of each update."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(told["model"], padding_side="left")
    prompts = [
        tokenizer.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, return_dict=False
        )
        for row in rows_of(told["rows"])
    ]
    prompts = Dataset.from_dict({"input_ids": prompts})
    ranker = AutoModelForSequenceClassification.from_pretrained
    frozen = {"dtype": torch.bfloat16 if told["bf16"] else torch.float32}
    settings = common(told, out) | {
        "gradient_accumulation_steps": told["batch"] // told["micro_batch"],
        "num_ppo_epochs": told["epochs"],
        "num_mini_batches": told["minibatches"],
        "total_episodes": told["batch"] * told["steps"],
        "local_rollout_forward_batch_size": told["batch"],
        "response_length": told["answer_tokens"],
        "temperature": 1.0,
        "stop_token": "eos",
        "num_sample_generations": 0,
    }
    trainer = PPOTrainer(
        args=PPOConfig(**settings),
        processing_class=tokenizer,
        model=policy(told),
        ref_model=AutoModelForCausalLM.from_pretrained(told["model"], **frozen),
        reward_model=ranker(told["ranker"], **frozen),
        value_model=ranker(told["ranker"], dtype=torch.float32),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(2)),
        callbacks=[clock],
    )
    trainer.train()
    return list(itertools.accumulate([told["batch"]] * len(clock.ends)))


def main() -> None:
    told = json.load(sys.stdin)
    clock = Clock(told["asked"])
    with tempfile.TemporaryDirectory() as out:
        work = reinforced if told["kind"] == "ppo" else trained
        counted = work(told, clock, out)
    gib = torch.cuda.max_memory_allocated() / 2**30 if CUDA else None
    print(json.dumps({"ends": clock.ends, "counted": counted, "gib": gib}))


if __name__ == "__main__":
    main()
