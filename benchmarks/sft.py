"""SFT rows per second and memory: llmpipe against bare TRL, on the same rows, model, precision and cores.

    python benchmarks/sft.py --model DIR --rows alpaca.json --packing --pairs 8

Each measurement is a fresh process, so the peak of resident memory belongs to it alone (it is given above what the bare
imports take). The sides alternate, and what counts is the ratio within a pair: the machine's drift hits both. The clock
runs from the first step's start to the last step's end; loading, tokenizing and packing are outside.
`--rows`: a JSON list of Alpaca rows (instruction, input, output).
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# One-sided 95 % quantile of Student's t, by degrees of freedom; 1.645 from there on.
T95 = [math.inf, 6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761]


def tokenize(path: str, count: int, max_length: int, tokenizer) -> list[dict[str, list[int]]]:
    """The first `count` rows as `input_ids` and `labels` (-100 on the prompt), cut at `max_length` tokens."""
    rows = []
    for row in json.loads(Path(path).read_text())[:count]:
        question = "\n".join(filter(None, (row["instruction"], row.get("input"))))
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["output"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        ids, labels = prompt + answer, [-100] * len(prompt) + answer
        rows.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    return rows


def common(args, out: str) -> dict:
    """What both sides are told: nothing here is a matter of speed."""
    return dict(  # noqa: C408  names of fields
                output_dir=out, max_length=args.max_length, packing=args.packing, bf16=args.precision == "bf16", seed=0,
                num_train_epochs=1, learning_rate=2e-5, use_cpu=True, logging_steps=1, save_strategy="no",
                report_to="none", disable_tqdm=True)  # fmt: skip


def run_trl(args, dataset, tokenizer, callback, out: str):
    """Bare TRL, as its documentation has it."""
    import torch
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    config = SFTConfig(**common(args, out), per_device_train_batch_size=args.batch)
    trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer, callbacks=[callback])
    trainer.train()
    return trainer


def run_llmpipe(args, dataset, tokenizer, callback, out: str):
    """The same trainer on llmpipe's engine, with the micro-batch that llmpipe chooses."""
    import torch
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from llmpipe.engine.upstream import choose_attention, silence, speed_up

    silence()
    attention, _ = choose_attention("cpu", packed=args.packing)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation=attention)
    speed_up(model, device_type="cpu")
    asked = common(args, out)
    if not args.packing:
        asked |= {"padding_free": True, "max_length": None}  # the rows are cut already
    micro = args.micro_batch or (1 if args.packing else min(4, args.batch))
    config = SFTConfig(**asked, per_device_train_batch_size=micro, gradient_accumulation_steps=args.batch // micro,
                       gradient_checkpointing=args.checkpointing)  # fmt: skip
    trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer, callbacks=[callback])
    trainer.train()
    return trainer


def measure(args) -> dict:
    """One side, in this process: seconds from the first step's start to the last step's end, peak bytes, losses."""
    import datasets
    import torch  # noqa: F401  part of the bare import
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTTrainer  # noqa: F401

    status = Path("/proc/self/status")
    resident = lambda key: int(status.read_text().split(key + ":")[1].split()[0]) * 1024  # noqa: E731
    bare = resident("VmRSS")

    class Clock(TrainerCallback):
        start = end = None

        def on_step_begin(self, *_, **__):
            self.start = self.start or (time.perf_counter(), time.process_time())

        def on_step_end(self, *_, **__):
            self.end = time.perf_counter(), time.process_time()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = tokenize(args.rows, args.count, args.max_length, tokenizer)
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        run = {"trl": run_trl, "llmpipe": run_llmpipe}[args.side]
        trainer = run(args, datasets.Dataset.from_list(rows), tokenizer, clock, out)
    history = [step for step in trainer.state.log_history if "loss" in step]
    seconds, cpu = (end - start for start, end in zip(clock.start, clock.end, strict=True))
    return {
        "seconds": seconds,
        "cpu": cpu,
        "rows_per_second": len(rows) / seconds,
        "peak": resident("VmHWM") - bare,
        "losses": [step["loss"] for step in history],
        "accuracy": [step.get("mean_token_accuracy") for step in history],
    }


def spawn(args, side: str, packing: bool) -> dict:
    """`measure` in a fresh process; the last line it prints is the result."""
    argv = [arg for arg in sys.argv[1:] if arg != "--packing"] + ["--side", side] + ["--packing"] * packing
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model with a ChatML tokenizer")
    parser.add_argument("--rows", required=True, help="JSON list of Alpaca rows")
    parser.add_argument("--count", type=int, default=96, help="rows used")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--against-unpacked", action="store_true", help="bare TRL stays unpacked")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8, help="rows (packed: packed rows) per optimizer step")
    parser.add_argument("--micro-batch", type=int, help="llmpipe's share of it per forward (packed 1, else 4)")
    parser.add_argument("--checkpointing", action="store_true", help="llmpipe recomputes activations, as TRL does")
    parser.add_argument("--side", choices=["trl", "llmpipe"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)))
        return

    ratios, cpu, peaks = [], [], {"trl": [], "llmpipe": []}
    for pair in range(args.pairs):
        trl = spawn(args, "trl", args.packing and not args.against_unpacked)
        own = spawn(args, "llmpipe", args.packing)
        ratios.append(own["rows_per_second"] / trl["rows_per_second"])
        cpu.append(trl["cpu"] / own["cpu"])
        peaks["trl"].append(trl["peak"])
        peaks["llmpipe"].append(own["peak"])
        apart = math.nan  # packed against unpacked: other batches, nothing to compare
        if len(trl["losses"]) == len(own["losses"]):
            apart = max(abs(a - b) for a, b in zip(trl["losses"], own["losses"], strict=True))
        seconds = f"trl {trl['seconds']:.1f} s, llmpipe {own['seconds']:.1f} s, ratio {ratios[-1]:.2f}"
        memory = f"peaks {trl['peak'] / 2**30:.2f} and {own['peak'] / 2**30:.2f} GiB"
        print(f"pair {pair + 1}: {seconds}, {memory}, losses apart {apart:.1e}", flush=True)
    print("losses  trl    ", *(f"{loss:.5f}" for loss in trl["losses"]))
    print("losses  llmpipe", *(f"{loss:.5f}" for loss in own["losses"]))
    for what, values in {"ratio": ratios, "ratio of processor seconds, for a busy machine": cpu}.items():
        print(f"{what}: median {statistics.median(values):.2f}, 95 % lower bound {lower_bound(values):.2f}")
    for side, values in peaks.items():
        middle, highest = statistics.median(values) / 2**30, max(values) / 2**30
        print(f"peak above the bare import, {side}: {middle:.2f} GiB (highest {highest:.2f})")


if __name__ == "__main__":
    main()
