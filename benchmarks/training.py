"""Rows per second and memory of training: llmpipe against a bare peer, on the same rows, model,
precision and cores.

    python benchmarks/training.py --model DIR --rows alpaca.json --packing --pairs 8
    python benchmarks/training.py --model DIR --rows alpaca.json --packing --pairs 8 --stage qlora
    python benchmarks/training.py --model DIR --rows alpaca.json --pairs 8 --stage pretrain \\
        --count 400
    python benchmarks/training.py --model DIR --rows dpo.json --pairs 8 --stage dpo --count 48

The peer is TRL (with PEFT for lora and qlora), which tokenizes pairs by itself, as its
documentation has it. For pretrain, where rows are text, the model starts from random weights and
DIR gives the tokenizer, it is a PyTorch loop: forward, backward, clipping, fused AdamW. Of pairs
those count that fit whole into `--max-length`.

Each measurement is a fresh process, so the peak of resident memory belongs to it alone (it is given
above what the bare imports take). The sides alternate, and what counts is the ratio within a pair:
the machine's drift hits both. The clock runs from the first step's start to the last step's end;
loading, tokenizing and packing are outside. `--rows`: a JSON list of Alpaca rows (instruction,
input, output); for reward and dpo, of ShareGPT rows with answers (conversations, chosen, rejected).
"""

import argparse
import contextlib
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

# One-sided 95 % quantile of Student's t, by degrees of freedom; 1.645 from there on.
T95 = [
    math.inf,
    6.314,
    2.920,
    2.353,
    2.132,
    2.015,
    1.943,
    1.895,
    1.860,
    1.833,
    1.812,
    1.796,
    1.782,
    1.771,
    1.761,
]


def prepare(args, home: Path, packing: bool) -> Path:
    """`llmpipe prepare` on the first `count` rows; the artifact's folder, ready to train."""
    rows = json.loads(Path(args.rows).read_text())
    if args.stage == "pretrain":
        rows = [{"text": " ".join(row.values())} for row in rows]
    if args.stage in PREFERENCES:
        rows = fitting([conversation(row) for row in rows], args)
    rows = rows[: args.count]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    launch = {"processes": 1, "activation_checkpointing": args.checkpointing}
    extra = {"adapter": {"rank": 8, "alpha": 16}} if "lora" in args.stage else {}
    extra |= {"quantization": {"bits": 4}} if args.stage == "qlora" else {}
    data = {
        "train": [{"path": str(home / "rows.jsonl")}],
        "max_length": args.max_length,
        "packing": packing,
    }
    batch = {"batch_size": args.batch}
    if args.stage in PREFERENCES:
        del data["packing"]
    if args.stage == "pretrain":
        extra, batch = (
            {"tokenizer": args.model, "architecture": SHAPE},
            {"batch_tokens": args.batch * args.max_length},
        )
        del data["packing"]
    recipe = {
        "stage": args.stage,
        "name": "packed" if packing else "unpacked",
        "run": str(home),
        **({} if args.stage == "pretrain" else {"model": args.model}),
        "seed": 0,
        "data": data,
        "optim": {
            "learning_rate": rate(args),
            **batch,
            "precision": args.precision,
            "scheduler": "linear",
            "warmup": 0,
        },
        "log": {"every": 1},
        "checkpoint": {"every": 10**6},
        **extra,
        "launch": launch | ({"micro_batch_size": args.micro_batch} if args.micro_batch else {}),
    }
    path = home / f"{recipe['name']}.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    done = subprocess.run(
        [sys.executable, "-m", "llmpipe", "prepare", str(path)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"llmpipe prepare failed:\n{done.stdout}{done.stderr}")
    print(done.stdout.splitlines()[-1], flush=True)
    return home / recipe["name"]


PREFERENCES = ("reward", "dpo")
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def conversation(row: dict) -> dict:
    """A ShareGPT row with its two answers as TRL knows preferences."""
    return {
        "prompt": messages(row["conversations"]),
        "chosen": messages([row["chosen"]]),
        "rejected": messages([row["rejected"]]),
    }


def messages(turns: list[dict]) -> list[dict]:
    return [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]


def fitting(rows: list[dict], args) -> list[dict]:
    """Pairs that neither side has to cut or drop."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def length(turns: list[dict]) -> int:
        return len(tokenizer.apply_chat_template(turns, return_dict=False))

    return [
        row
        for row in rows
        if max(length(row["prompt"] + row[s]) for s in ("chosen", "rejected")) < args.max_length
    ]


SHAPE = {"layers": 6, "width": 384, "heads": 6, "ffn": 1024}


def rate(args) -> float:
    """The peak learning rate."""
    return {"sft": 2e-5, "reward": 1e-5, "dpo": 1e-6}.get(args.stage, 2e-4)


def common(args, out: str) -> dict:
    """What both sides are told: nothing here is a matter of speed."""
    return {
        "output_dir": out,
        "max_length": args.max_length,
        "bf16": args.precision == "bf16",
        "seed": 0,
        "num_train_epochs": 1,
        "learning_rate": rate(args),
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def run_trl(args, dataset, tokenizer, callback, out: str):
    """Bare TRL, as its documentation has it."""
    import torch
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        BitsAndBytesConfig,
    )
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    half = torch.bfloat16 if args.precision == "bf16" else torch.float32
    how, peft = {"dtype": half if "lora" in args.stage else torch.float32}, None
    if "lora" in args.stage:
        peft = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    if args.stage == "qlora":
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=half,
        )
    if args.stage == "reward":
        how |= {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    kind = AutoModelForSequenceClassification if args.stage == "reward" else AutoModelForCausalLM
    torch.manual_seed(0)
    model = kind.from_pretrained(args.model, **how)
    own = (
        {}
        if args.stage in PREFERENCES
        else {"packing": args.packing, "dataset_kwargs": {"skip_prepare_dataset": True}}
    )
    make, settings = {"reward": (RewardTrainer, RewardConfig), "dpo": (DPOTrainer, DPOConfig)}.get(
        args.stage, (SFTTrainer, SFTConfig)
    )
    config = settings(
        **common(args, out),
        **own,
        per_device_train_batch_size=args.batch,
        gradient_checkpointing=args.checkpointing or args.trl_default,
    )
    named = {
        "train_dataset": dataset,
        "processing_class": tokenizer,
        "callbacks": [callback],
        "peft_config": peft,
    }
    trainer = make(model, args=config, **named)
    trainer.train()
    trainer.seen = len(trainer.train_dataset)  # RewardTrainer drops what is too long
    return trainer


def run_loop(args, dataset, tokenizer, callback, out: str):
    """A bare loop over the same blocks, in the order that llmpipe takes them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "hidden_size": SHAPE["width"],
        "num_hidden_layers": SHAPE["layers"],
        "vocab_size": len(tokenizer),
    }
    shape |= {"num_attention_heads": SHAPE["heads"], "num_key_value_heads": SHAPE["heads"]}
    shape |= {"intermediate_size": SHAPE["ffn"], "max_position_embeddings": args.max_length}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", tie_word_embeddings=True, **shape)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate(args), weight_decay=0.0, fused=True)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    order = [i for i in order if len(dataset[i]["input_ids"]) == args.max_length]
    steps = [order[i : i + args.batch] for i in range(0, len(order) - args.batch + 1, args.batch)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))
    history = []
    for step in steps:
        callback.on_step_begin()
        ids = torch.tensor([dataset[i]["input_ids"] for i in step])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append({"loss": float(loss)})
        callback.on_step_end()
    return SimpleNamespace(state=SimpleNamespace(log_history=history), seen=len(steps) * args.batch)


def run_llmpipe(args, folder: Path, callback):
    """The stage itself, as the worker runs it: training, checkpoint, verification; the clock
    sees the steps."""
    from llmpipe.front.worker import open_job
    from llmpipe.run.artifact import Artifact
    from llmpipe.run.signals import Signals
    from llmpipe.stages import prepared_by, stage
    from llmpipe.training import hosted

    fit, seen = hosted.Durable.fit, []

    def fitted(trainer):
        trainer.add_callback(callback)
        seen.append(trainer)
        return fit(trainer)

    hosted.Durable.fit = fitted
    job = open_job(Artifact(folder), Signals())
    with contextlib.redirect_stdout(sys.stderr):
        module = stage(job.recipe.stage)
        module.train(job, prepared_by(module).of_artifact(folder))
    return seen[0]


def measure(args) -> dict:
    """One side, in this process: seconds from the first step's start to the last step's end,
    peak bytes, losses."""
    import datasets
    from transformers import AutoTokenizer, TrainerCallback

    import_module("torch")  # what memory is measured above
    import_module("trl.trainer.sft_trainer")
    status = Path("/proc/self/status")

    def resident(key: str) -> int:
        return int(status.read_text().split(key + ":")[1].split()[0]) * 1024

    bare = resident("VmRSS")

    class Clock(TrainerCallback):
        start = end = None

        def on_step_begin(self, *_, **__):
            self.start = self.start or (time.perf_counter(), time.process_time())

        def on_step_end(self, *_, **__):
            self.end = time.perf_counter(), time.process_time()

    clock = Clock()
    home = Path(args.home)
    # bare TRL gets the very sequences that llmpipe trains on: when it packs by itself, it breaks
    # ties at random
    folder = home / ("packed" if args.packing else "unpacked")
    rows = datasets.Dataset.from_file(str(home / ".prepared" / key_of(folder) / "train.arrow"))
    if args.stage in PREFERENCES and args.side == "peer":
        rows = datasets.Dataset.from_list(
            [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
        )
    with tempfile.TemporaryDirectory() as out:
        if args.side == "peer":
            trainer = (run_loop if args.stage == "pretrain" else run_trl)(
                args, rows, AutoTokenizer.from_pretrained(args.model), clock, out
            )
        else:
            shutil.copytree(folder, Path(out, folder.name))
            Path(out, ".prepared").symlink_to(home / ".prepared")
            trainer = run_llmpipe(args, Path(out, folder.name), clock)
    history = [step for step in trainer.state.log_history if "loss" in step]
    seconds, cpu = (end - start for start, end in zip(clock.start, clock.end, strict=True))
    return {
        "seconds": seconds,
        "cpu": cpu,
        # the loop leaves out the last batch, which is not whole
        "rows_per_second": getattr(trainer, "seen", len(rows)) / seconds,
        "peak": resident("VmHWM") - bare,
        "losses": [step["loss"] for step in history],
        "accuracy": [step.get("mean_token_accuracy") for step in history],
    }


def key_of(folder: Path) -> str:
    """The folder of `.prepared` that holds an artifact's rows."""
    return json.loads((folder / "prepared.json").read_text())["data"]


def spawn(args, home: Path, side: str, packing: bool) -> dict:
    """`measure` in a fresh process; the last line it prints is the result."""
    argv = [arg for arg in sys.argv[1:] if arg != "--packing"] + [
        "--side",
        side,
        "--home",
        str(home),
    ]
    argv += ["--packing"] * packing
    done = subprocess.run([sys.executable, __file__, *argv], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def lower_bound(ratios: list[float]) -> float:
    """One-sided 95 % lower bound of the geometric mean, from Student's t over the log ratios."""
    logs = [math.log(ratio) for ratio in ratios]
    if len(logs) < 2:
        return 0.0
    t = T95[len(logs) - 1] if len(logs) <= len(T95) else 1.645
    return math.exp(statistics.mean(logs) - t * statistics.stdev(logs) / math.sqrt(len(logs)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="folder of a causal language model with a ChatML tokenizer"
    )
    parser.add_argument("--rows", required=True, help="JSON list of rows; see above")
    parser.add_argument(
        "--stage", choices=["sft", "lora", "qlora", "pretrain", *PREFERENCES], default="sft"
    )
    parser.add_argument("--count", type=int, default=96, help="rows used")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--against-unpacked", action="store_true", help="bare TRL stays unpacked")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument(
        "--batch", type=int, default=8, help="rows (packed: packed rows) per optimizer step"
    )
    parser.add_argument(
        "--micro-batch",
        type=int,
        help="llmpipe's share of it per forward; its own choice unless given",
    )
    parser.add_argument(
        "--trl-default",
        action="store_true",
        help="bare TRL recomputes activations, as it does by default",
    )
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="both recompute activations in the backward pass",
    )
    parser.add_argument("--side", choices=["peer", "llmpipe"], help=argparse.SUPPRESS)
    parser.add_argument("--home", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return

    with tempfile.TemporaryDirectory() as home:
        prepare(args, Path(home), packing=False)
        if args.packing:
            prepare(args, Path(home), packing=True)
        compare(args, Path(home))


def compare(args, home: Path) -> None:
    """The pairs, one after the other, and what they say."""
    ratios, cpu, peaks = [], [], {"peer": [], "llmpipe": []}
    for pair in range(args.pairs):
        peer = spawn(args, home, "peer", args.packing and not args.against_unpacked)
        own = spawn(args, home, "llmpipe", args.packing)
        ratios.append(own["rows_per_second"] / peer["rows_per_second"])
        cpu.append(peer["cpu"] / own["cpu"])
        peaks["peer"].append(peer["peak"])
        peaks["llmpipe"].append(own["peak"])
        apart = math.nan  # packed against unpacked: other batches, nothing to compare
        if abs(len(peer["losses"]) - len(own["losses"])) <= 1:
            apart = max(abs(a - b) for a, b in zip(peer["losses"], own["losses"], strict=False))
        seconds = (
            f"peer {peer['seconds']:.1f} s, llmpipe {own['seconds']:.1f} s, ratio {ratios[-1]:.2f}"
        )
        memory = f"peaks {peer['peak'] / 2**30:.2f} and {own['peak'] / 2**30:.2f} GiB"
        print(f"pair {pair + 1}: {seconds}, {memory}, losses apart {apart:.1e}", flush=True)
    print("losses  peer   ", *(f"{loss:.5f}" for loss in peer["losses"]))
    print("losses  llmpipe", *(f"{loss:.5f}" for loss in own["losses"]))
    for what, values in {
        "ratio": ratios,
        "ratio of processor seconds, for a busy machine": cpu,
    }.items():
        print(
            f"{what}: median {statistics.median(values):.2f}, "
            f"95 % lower bound {lower_bound(values):.2f}"
        )
    for side, values in peaks.items():
        middle, highest = statistics.median(values) / 2**30, max(values) / 2**30
        print(f"peak above the bare import, {side}: {middle:.2f} GiB (highest {highest:.2f})")


if __name__ == "__main__":
    main()
