"""GRPO beside TRL's GRPOTrainer of this environment, without vLLM: answers per second, and memory.

    python benchmarks/grpo.py --model DIR --pairs 4 [--lora]

Both sides get the same prompts, model, group, reward function, precision, loss (over all tokens,
DAPO's), KL coefficient and lengths, one optimizer step for each rollout, and keep their
activations. Each measurement is a fresh process, the sides alternate, the first update is left out,
and what counts is the ratio within a pair. Memory is the peak above the bare imports. `--rows`:
lines of conversations, whose first turns are asked as plain text.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BARE = (
    "import torch, transformers, trl, peft, resource; "
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
)
REWARD = """
def brevity(prompts, completions, **_):
    return [-len(text) / 100 for text in completions]
"""


def peer(told: dict) -> None:
    """One training by TRL; the last line printed is what was seen."""
    import torch
    from clock import Clock
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(told["threads"])
    set_seed(0)
    lengths: list[float] = []

    def note(logs):
        if "completions/mean_length" in logs:
            lengths.append(logs["completions/mean_length"])

    clock = Clock(note)

    def brevity(completions, **_):
        return [-len(text) / 100 for text in completions]

    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as out:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(told["model"], dtype=torch.float32),
            reward_funcs=brevity,
            args=GRPOConfig(
                output_dir=out,
                use_cpu=True,
                bf16=told["bf16"],
                report_to="none",
                save_strategy="no",
                per_device_train_batch_size=told["batch"],
                num_generations=told["group"],
                max_completion_length=told["tokens"],
                max_steps=told["updates"],
                learning_rate=told["rate"],
                beta=told["kl"],
                gradient_checkpointing=False,
                logging_steps=1,
                disable_tqdm=True,
            ),
            processing_class=AutoTokenizer.from_pretrained(told["model"], padding_side="left"),
            train_dataset=Dataset.from_dict({"prompt": told["prompts"]}),
            peft_config=lora if told["lora"] else None,
            callbacks=[clock],
        )
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": clock.seconds, "peak": peak, "lengths": lengths}))


def own(told: dict, home: Path) -> dict:
    """The same by `llmpipe grpo`, the whole command."""
    rows = home / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in told["prompts"]))
    (home / "rewards.py").write_text(REWARD)
    recipe = {
        "stage": "grpo",
        "run": str(home / "run"),
        "model": told["model"],
        "data": {"train": [{"path": str(rows)}], "max_length": 256},
        "reward": [{"function": f"{home}/rewards.py:brevity"}],
        "reference": {"coefficient": told["kl"]},
        "rollout": {"group": told["group"], "max_new_tokens": told["tokens"]},
        "optim": {
            "learning_rate": told["rate"],
            "batch_size": told["batch"],
            "steps": told["updates"],
            "warmup": 0,
            "precision": "bf16" if told["bf16"] else "fp32",
        },
        "log": {"every": 1},
        "checkpoint": {"every": 10**6},
        "launch": {"processes": 1, "threads": told["threads"]},
    } | ({"adapter": {"rank": 8, "alpha": 16}} if told["lora"] else {})
    path = home / "grpo.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    command = [sys.executable, "-m", "llmpipe", "grpo", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"llmpipe failed:\n{done.stdout}{done.stderr}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    metrics = (home / "run" / "grpo" / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, metrics) if "objective/scores" in line]
    return {
        "seconds": [told["batch"] / line["episodes_per_second"] for line in lines],
        "peak": peak,
        "lengths": [line["answers/tokens"] for line in lines],
    }


def fresh(side: str, told: dict) -> dict:
    """This script in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, side], input=json.dumps(told), capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def speed(args) -> None:
    """Pairs of TRL and llmpipe, one after the other."""
    from training import lower_bound

    bare = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True).stdout
    prompts = args.batch // args.group * args.updates
    lines = Path(args.rows).read_text().splitlines()[:prompts]
    told = {
        "model": args.model,
        "prompts": [json.loads(line)["messages"][0]["content"] for line in lines],
        "batch": args.batch,
        "group": args.group,
        "tokens": args.tokens,
        "updates": args.updates,
        "rate": 1e-5 if args.lora else 1e-6,
        "kl": args.kl,
        "lora": args.lora,
        "bf16": args.precision == "bf16",
        "threads": os.cpu_count(),
    }
    ratios, memory = [], []
    for pair in range(args.pairs):
        seen = {side: fresh(side, told) for side in ("peer", "own")}
        rate = {
            side: args.batch * (args.updates - 1) / sum(found["seconds"][1:])
            for side, found in seen.items()
        }
        peak = {side: (found["peak"] - int(bare) * 1024) / 2**30 for side, found in seen.items()}
        length = {side: statistics.mean(found["lengths"]) for side, found in seen.items()}
        ratios.append(rate["own"] / rate["peer"])
        memory.append(peak["own"] / peak["peer"])
        print(
            f"pair {pair + 1}: answers/s trl {rate['peer']:.3f}, llmpipe {rate['own']:.3f}, "
            f"ratio {ratios[-1]:.2f}; GiB trl {peak['peer']:.2f}, llmpipe {peak['own']:.2f}, "
            f"ratio {memory[-1]:.2f}; tokens an answer {length['peer']:.1f} and "
            f"{length['own']:.1f}",
            flush=True,
        )
    bound = lower_bound(ratios) if len(ratios) > 1 else math.nan
    print(f"answers/s: median ratio {statistics.median(ratios):.2f}, 95 % bound {bound:.2f}")
    print(f"peak memory: median ratio {statistics.median(memory):.2f}, highest {max(memory):.2f}")


def main() -> None:
    if sys.argv[1:] == ["peer"]:
        peer(json.load(sys.stdin))
        return
    if sys.argv[1:] == ["own"]:
        with tempfile.TemporaryDirectory() as home:
            print(json.dumps(own(json.load(sys.stdin), Path(home))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = Path(__file__).parent.parent / "recipes" / "questions.jsonl"
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--rows", default=rows)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--kl", type=float, default=0.04, help="coefficient; 0: no reference")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--group", type=int, default=8, help="answers to a prompt")
    parser.add_argument("--batch", type=int, default=16, help="answers per update")
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--updates", type=int, default=4)
    speed(parser.parse_args())


if __name__ == "__main__":
    main()
