"""What every format of an export has kept of a model, as the reader of that format says it.

    python benchmarks/exports.py --shapes --home /tmp/exports
    python benchmarks/exports.py runs/quickstart/sft runs/quickstart/ppo --rows held-out.jsonl

`--shapes` makes small random models of each architecture that is exported, teaches each a LoRA for
some steps, and exports that. Otherwise the artifacts that are named are exported. Both go through
the command line; the table is read from exports.jsonl. The formats of fewer bits are measured and
refused by none (`accept.otherwise: warn`).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml

RECIPES = Path(__file__).parent.parent / "recipes"
TINY = RECIPES / "tiny"
FORMATS = {
    "merged": ["bf16"],
    "gguf": ["f16", "q8_0", "q4_k_m"],
    "torchao": ["int8", "int4"],
    "bitsandbytes": ["int8", "nf4"],
}
HEAD = (
    "| model | format | reader | MB | mean KL | perplexity | equal answers | tok/s |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)

SIZE = {
    "vocab_size": 512,
    "hidden_size": 256,  # q4_k_m packs 256 weights of a row together
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.05,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def shapes() -> dict:
    """A small configuration of each architecture, with what is peculiar to it."""
    from transformers import (
        Gemma2Config,
        Gemma3TextConfig,
        GPT2Config,
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
        Qwen3Config,
    )

    gemma = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32}
    return {
        "gpt2": GPT2Config(
            vocab_size=512,
            n_embd=256,
            n_layer=3,
            n_head=4,
            n_positions=512,
            bos_token_id=2,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.05,
        ),
        "qwen2": Qwen2Config(**SIZE, tie_word_embeddings=True),
        "qwen3": Qwen3Config(**SIZE, head_dim=32, tie_word_embeddings=True),
        "qwen3-untied": Qwen3Config(**SIZE, head_dim=32, tie_word_embeddings=False),
        "gemma2": Gemma2Config(**SIZE, **gemma),
        "gemma3": Gemma3TextConfig(**SIZE, **gemma),
        "mistral": MistralConfig(**SIZE, sliding_window=None),
        "llama3": LlamaConfig(**SIZE, attention_bias=True, rope_parameters=LLAMA3),
    }


def make(label: str, config: object, home: Path) -> Path:
    """A random model with the tokenizer of recipes/tiny/model. No weight of it is one or zero, so
    that none can be lost unseen."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data += 0.2 * torch.randn_like(weight)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    folder = home / "shapes" / label
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "model").save_pretrained(folder)
    return folder


def run(recipe: dict, home: Path) -> str:
    """What is refused, in a line, if anything is. Its log lies beside its recipe."""
    path = home / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = [sys.executable, "-m", "llmpipe", recipe["stage"], str(path)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    path.with_suffix(".log").write_text(ran.stdout)
    if not ran.returncode:
        return ""
    errors = [line for line in ran.stdout.splitlines() if line.startswith("error: ")]
    return errors[-1] if errors else f"failed: see {path.with_suffix('.log')}"


def teach(label: str, model: Path, home: Path) -> Path:
    """An artifact: a LoRA of every linear layer, after thirty steps."""
    recipe = {
        "stage": "lora",
        "name": label,
        "run": str(home / "run"),
        "model": str(model),
        "data": {"train": [{"path": str(TINY / "rows.jsonl")}], "max_length": 128},
        "adapter": {"rank": 8},
        "optim": {"learning_rate": 5e-3, "batch_size": 8, "steps": 30, "precision": "fp32"},
        "launch": {"processes": 1, "threads": 1},
    }
    if failed := run(recipe, home):
        sys.exit(failed)
    return home / "run" / label


def export(artifact: Path, rows: Path, home: Path, formats: dict) -> None:
    """Export it, and print its rows of the table."""
    label = f"export-{artifact.parent.name}-{artifact.name}"
    adapter = (artifact / "model" / "adapter_config.json").exists()
    recipe = {
        "stage": "export",
        "name": label,
        "run": str(home / "exports"),
        "model": str(artifact.resolve()),
        "formats": {**formats, "adapter": adapter},
        "held_out": [{"path": str(rows.resolve())}],
        "accept": {"otherwise": "warn"},
    }
    refused = run(recipe, home)
    lines = home / "exports" / label / "exports.jsonl"
    for line in lines.read_text().splitlines() if lines.exists() else ():
        print(row(artifact.name, json.loads(line)), flush=True)
    if refused:
        print(f"{artifact.name}: {refused}", flush=True)


def row(label: str, line: dict) -> str:
    far, same = line["measured"], line["agreement"]
    ratio = far["perplexity"] / far["perplexity_of_source"]
    cells = [
        label,
        line["format"],
        line["reader"],
        f"{line['size'] / 1e6:.1f}",
        f"{far['mean_kl']:.2g}",
        f"x {ratio:.4f}",
        f"{same['equal_answers']} of {same['answers']}",
        f"{line['tokens_per_second']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifacts", nargs="*", type=Path)
    parser.add_argument("--shapes", action="store_true", help="random models of each architecture")
    parser.add_argument("--rows", type=Path, default=TINY / "rows.jsonl", help="to measure on")
    parser.add_argument("--home", type=Path, default=Path("runs/benchmark-exports"))
    for name, default in FORMATS.items():
        parser.add_argument(f"--{name}", nargs="*", default=default)
    asked = parser.parse_args()
    asked.home.mkdir(parents=True, exist_ok=True)
    formats = {name: getattr(asked, name) for name in FORMATS}
    print(HEAD, flush=True)
    for artifact in asked.artifacts:
        export(artifact, asked.rows, asked.home, formats)
    for label, config in shapes().items() if asked.shapes else ():
        artifact = teach(label, make(label, config, asked.home), asked.home)
        # no layer of GPT-2's is a linear one to torchao
        fitting = formats | {"torchao": []} if label == "gpt2" else formats
        export(artifact, asked.rows, asked.home, fitting)


if __name__ == "__main__":
    main()
