"""The losses of TRL's GRPOTrainer beside the papers' equations, for the record.

    python benchmarks/conformance.py

tests/rl/test_conformance.py holds llmpipe's engine to loops over plain numbers, to 1e-6 and however
a batch is cut. This asks the trainer of this environment the same: one optimizer step on 16 ragged
answers of 4 groups, in micro-batches of 1, 2, 8 and 16, and a second one on the other half of what
was drawn. What is printed is how far the gradient is from the equation's, by the largest number of
that. The advantages are given: no answers are drawn. Its policy is a table of logits by the token
before, in double precision.
"""

import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.rl import test_conformance as equations  # noqa: E402

TINY = ROOT / "recipes" / "tiny" / "model"
SIZES = (1, 2, 8, 16)
LOSSES = {
    "sequence (Shao 2024)": ({"loss_type": "grpo"}, {"algorithm__loss": "sequence"}),
    "token (DAPO)": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"algorithm__clip_high": 0.28}),
    "constant (Dr. GRPO)": ({"loss_type": "dr_grpo"}, {"algorithm__loss": "constant"}),
    "sequence, its ratios, too (GSPO)": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"algorithm__loss": "sequence", "algorithm__ratio": "sequence"},
    ),
}


class OfTable(GRPOTrainer):
    """TRL's, whose batches are given and whose policy is a table."""

    table: nn.Parameter

    def _prepare_inputs(self, generation_batch):
        return generation_batch

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, **_
    ):
        log_p = self.table.log_softmax(-1)[input_ids[:, :-1]]
        of_next = log_p.gather(2, input_ids[:, 1:, None])[..., 0]
        entropies = -(log_p.exp() * log_p).sum(-1)
        return of_next[:, -logits_to_keep:], entropies[:, -logits_to_keep:], None


def trainer_of(how: dict, size: int, steps: int, folder: str) -> OfTable:
    """One whose optimizer step has 16 answers, of which `steps` are made of what is drawn."""
    made = OfTable(
        model=AutoModelForCausalLM.from_pretrained(TINY),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=equations.BATCH // size,
            steps_per_generation=steps * equations.BATCH // size,
            num_generations=equations.GROUP,
            max_completion_length=equations.MOST,
            beta=equations.BETA,
            use_bias_correction_kl=False,  # on by default: k3 times the ratio, another equation
            **how,
        ),
        processing_class=AutoTokenizer.from_pretrained(TINY, padding_side="left"),
        train_dataset=Dataset.from_dict({"prompt": ["What is 2 + 2?"] * equations.BATCH}),
    )
    made.current_gradient_accumulation_steps = equations.BATCH // size
    return made


def batch(tables, places, advantages, tokens: int) -> dict:
    """A micro-batch as TRL has it; `tokens`: of all that was drawn."""
    samples = [tables.samples[i] for i in places]

    def padded(rows):
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

    return {
        "prompt_ids": torch.tensor([[sample.prompt] for sample in samples]),
        "prompt_mask": torch.ones(len(samples), 1, dtype=torch.long),
        "completion_ids": padded([sample.response for sample in samples]),
        "completion_mask": padded([[1] * len(sample.response) for sample in samples]),
        "advantages": torch.tensor([advantages[i] for i in places]),
        "old_per_token_logps": padded([equations.log_probs(tables.old, s) for s in samples]),
        "ref_per_token_logps": padded([equations.log_probs(tables.parent, s) for s in samples]),
        "num_items_in_batch": torch.tensor(tokens),
    }


def gradient(trainer: OfTable, tables, advantages, size: int, tokens: int) -> torch.Tensor:
    trainer.table = nn.Parameter(torch.tensor(tables.logits))
    trainer.model.train()
    for first in range(0, equations.BATCH, size):
        given = batch(tables, range(first, first + size), advantages, tokens)
        trainer.training_step(trainer.model, given, None)
    return trainer.table.grad


def error(how: dict, settings: dict, size: int, steps: int) -> float:
    """How far the gradient of one optimizer step is from the equation's, by its largest number."""
    tables, others = (equations.Tables.drawn(seed) for seed in (7, 8))
    samples = tables.samples
    scores = [sample.score for sample in samples]
    advantages: list[float] = []
    for first in range(0, equations.BATCH, equations.GROUP):
        of_group = scores[first : first + equations.GROUP]
        advantages += equations.group_advantages(of_group, "group", "std")
    asked = equations.asked_of(settings)

    def loss(logits):
        old, parent = tables.old, tables.parent
        return equations.grpo_loss(logits, old, parent, samples, advantages, asked)

    right = torch.tensor(equations.gradient(loss, tables.logits))
    drawn = [*samples, *(others.samples if steps == 2 else [])]
    tokens = sum(len(sample.response) for sample in drawn)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(how, size, steps, folder)
        given = gradient(trainer, tables, advantages, size, tokens)
    return float((given - right).abs().max() / right.abs().max())


def main() -> None:
    torch.set_default_dtype(torch.float64)
    print(f"{'':34}{'one step a rollout':>36}{'two':>10}")
    print(f"{'micro-batch of':34}" + "".join(f"{size:>9}" for size in SIZES) + f"{8:>10}")
    for name, (how, settings) in LOSSES.items():
        errors = [error(how, settings, size, 1) for size in SIZES]
        second = error(how, settings, 8, 2)
        print(f"{name:34}" + "".join(f"{each:9.1e}" for each in errors) + f"{second:10.1e}")


if __name__ == "__main__":
    main()
