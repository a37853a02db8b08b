"""What the tiny recipes make, as hashes: record them before a change that should change nothing,
and compare after it.

    python benchmarks/same_bytes.py record before.json          with this environment's llmpipe
    python benchmarks/same_bytes.py record before.json --python ../old/.venv/bin/python
    python benchmarks/same_bytes.py compare before.json after.json

Every stage that trains, one thread, fp32: pretrain, sft, packed sft, lora, its merge, qlora,
reward, dpo, ppo and grpo, each with all weights and with an adapter, and eval. Hashed: every file
in `model/`, samples, rejected rows, results, and metrics.jsonl less wall-clock figures. Equal on
one machine, or the change changed something.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WALL_CLOCK = {
    "tokens_per_second",
    "episodes_per_second",
    "rollout_share",
    "share_of_peak",
    "memory_gb",
    "seconds",
}
ROWS = [{"path": "./tiny/rows.jsonl"}]
PAIRS = [{"path": "./tiny/pairs.jsonl"}]
ADAPTER = {"rank": 4, "alpha": 8}


def stage(kind: str, name: str, train: list[dict[str, str]], **more: Any) -> dict[str, Any]:
    """A recipe of twelve steps, with what is the stage's own in `more`."""
    prompts = (
        {}
        if kind == "reward"
        else {"samples": {"prompts": ["What is 2 + 2?"], "max_new_tokens": 8}}
    )
    return {
        "stage": kind,
        "name": name,
        "model": "./tiny/model",
        "data": {"train": train, "eval": {"holdout": 0.1}, "max_length": 64},
        "optim": {"learning_rate": 1e-3, "batch_size": 4, "steps": 12, "precision": "fp32"},
        "evaluation": {"every": 5},
        "checkpoint": {"every": 5},
        "log": {"every": 2},
        "launch": {"processes": 1, "threads": 1, "micro_batch_size": 2},
        **prompts,
        **more,
    }


def scored(kind: str, name: str, **more: Any) -> dict[str, Any]:
    """A policy that learns from the reward model and from a function, six updates."""
    optim = {"learning_rate": 1e-3, "batch_size": 8, "steps": 6, "precision": "fp32"}
    return stage(
        kind,
        name,
        ROWS,
        model="artifact:sft",
        optim=optim | {"weight_decay": 0.0},
        reward=[{"model": "artifact:reward"}, {"function": "./tiny/rewards.py:brevity"}],
        rollout={"max_new_tokens": 8},
        algorithm={"epochs": 2, "minibatches": 2},
        evaluation={"every": 3},
        **more,
    )


def pipeline() -> dict[str, Any]:
    """Every stage, each with all weights and with an adapter where it takes one."""
    packed = {"train": ROWS, "eval": {"holdout": 0.1}, "max_length": 64, "packing": True}
    plain = packed | {"packing": False}
    blocks = {"train": [{"path": "./tiny/text.txt"}, *ROWS], "eval": {"holdout": 0.2}}
    blocks |= {"max_length": 32, "max_rejected": 0.2}
    tokens = {"learning_rate": 1e-3, "batch_tokens": 128, "tokens": 1536, "precision": "fp32"}
    shape = {"kind": "llama", "layers": 2, "width": 32, "heads": 4}
    tasks = [
        {"task": "perplexity", "data": ROWS, "window": 64, "stride": 32},
        {
            "task": "generate",
            "data": ROWS,
            "score": ["exact_match", "contains"],
            "max_new_tokens": 8,
        },
        {"task": "preference", "data": PAIRS},
    ]
    measured = {"base": "./tiny/model"}
    measured |= {name: f"artifact:{name}" for name in ("sft", "lora", "dpo", "ppo")}
    pretrain = stage("pretrain", "pretrain", [], data=blocks, optim=tokens | {"scheduler": "wsd"})
    del pretrain["model"]
    return {
        "run": "runs/same",
        "stages": [
            pretrain | {"architecture": shape, "tokenizer": "./tiny/model"},
            stage("sft", "sft", ROWS, data=plain),
            stage("sft", "packed", ROWS, data=packed, optim=decayed()),
            stage("lora", "lora", ROWS, adapter=ADAPTER | {"merge": True}, model="artifact:sft"),
            stage("qlora", "qlora", ROWS, adapter=ADAPTER, quantization={"bits": 4}),
            stage("reward", "reward", PAIRS, model="artifact:sft"),
            stage("reward", "reward-lora", PAIRS, model="artifact:sft", adapter=ADAPTER),
            stage("dpo", "dpo", PAIRS, model="artifact:sft"),
            stage("dpo", "dpo-lora", PAIRS, model="artifact:lora", adapter=ADAPTER),
            scored("ppo", "ppo"),
            scored("ppo", "ppo-lora", adapter=ADAPTER),
            scored("grpo", "grpo"),
            scored("grpo", "grpo-lora", adapter=ADAPTER),
            {
                "stage": "eval",
                "models": measured,
                "tasks": tasks,
                "precision": "fp32",
                "launch": {"threads": 1, "batch_size": 8},
            },
        ],
    }


def decayed() -> dict[str, Any]:
    """An optimizer with all its options: weight decay, a constant rate, accumulation."""
    return {
        "learning_rate": 1e-3,
        "batch_size": 4,
        "steps": 12,
        "precision": "fp32",
        "weight_decay": 0.1,
        "scheduler": "linear",
        "max_grad_norm": 0.5,
    }


def without_wall_clock(text: str) -> str:
    """metrics.jsonl less what differs from run to run."""
    lines = [json.loads(line) for line in text.splitlines()]
    kept = [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines]
    return "\n".join(json.dumps(line) for line in kept)


def hashes(run: Path) -> dict[str, str]:
    """{file: sha256} of what the artifacts of a run hold."""
    table = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if not path.is_file() or not is_result(name):
            continue
        content = path.read_bytes()
        if path.name == "metrics.jsonl":
            content = without_wall_clock(content.decode()).encode()
        table[name] = hashlib.sha256(content).hexdigest()
    return table


def is_result(name: str) -> bool:
    """Whether a file of a run is equal each time: no log, no checkpoint, nothing with a date."""
    parts = name.split("/")
    if name.startswith(".") or "checkpoints" in parts:
        return False
    return "model" in parts or name.endswith((".jsonl", ".safetensors", "results.json"))


def record(out: Path, python: str) -> None:
    """Run the pipeline with the llmpipe of `python` in a scratch folder, and write the hashes to
    `out`."""
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        shutil.copytree(ROOT / "recipes" / "tiny", home / "tiny")
        (home / "tiny" / "text.txt").write_text((ROOT / "LICENSE").read_text(encoding="utf-8"))
        (home / "same.yaml").write_text(json.dumps(pipeline(), indent=1))
        subprocess.run([python, "-m", "llmpipe", "run", "same.yaml"], cwd=home, check=True)
        out.write_text(json.dumps(hashes(home / "runs" / "same"), indent=1) + "\n")
    print(f"wrote {out}")


def compare(before: Path, after: Path) -> int:
    """Name every file that differs; the exit code."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    other = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    for name in other:
        print(f"differs: {name}")
    print(f"{len({*old, *new}) - len(other)} of {len({*old, *new})} files equal")
    return 1 if other else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--python", default=sys.executable, help="whose llmpipe is run")
    given = parser.parse_args()
    if given.action == "compare":
        return compare(*given.files)
    record(given.files[0].absolute(), given.python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
