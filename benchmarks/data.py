"""How fast and in how much memory rows become tokens: `python benchmarks/data.py [rows ...]`.

Each size runs in a fresh process. Rows look like Alpaca's (about 110 tokens); the tokenizer is
trained on the spot, or comes from a model folder given by --model. Memory is the largest sum of
resident memory of the process and its workers, sampled every 20 ms, less what the process held
after its imports. It must not grow with the data: the last line compares the largest size with the
one before, and 1.3 times is the limit.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

SIZES = (10_000, 100_000, 1_000_000)
WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have "
    "from or had an they which one you were her all she there would their we him been has "
    "when who will more no if out so said what up its about into than them can only other new "
    "some could time these two may then do first any my now such like our over man model "
    "answer explain describe write list example because water energy history music number "
    "question"
).split()


def make_rows(path: Path, count: int) -> None:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            row = {
                "instruction": f"Explain number {i}: "
                + " ".join(draw.choices(WORDS, k=draw.randint(5, 20))),
                "input": " ".join(draw.choices(WORDS, k=10)) if i % 3 == 0 else "",
                "output": " ".join(draw.choices(WORDS, k=draw.randint(20, 120))) + ".",
            }
            file.write(json.dumps(row) + "\n")


def make_model(folder: Path) -> None:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    folder.joinpath("tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def one(rows: Path, model: Path, cache: Path, processes: str) -> None:
    """The measured process: import, say so, wait for the go, prepare."""
    from llmpipe.data.kinds.rows import ROWS
    from llmpipe.data.prepare import prepare
    from llmpipe.recipe.sections import Data

    import_module("multiprocessing.spawn")  # `prepare` would, inside the measured time

    print("ready", flush=True)
    sys.stdin.readline()
    number = processes if processes == "auto" else int(processes)
    data = Data.model_validate(
        {
            "train": [{"path": str(rows)}],
            "template": "chatml",
            "eval": {"holdout": 0.01},
            "processes": number,
        }
    )
    prepare(data, ROWS, model, cache, seed=0, say=lambda line: None)


def resident(pid: int) -> int:
    """Resident bytes of a process and everything below it."""
    total = 0
    try:
        total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total += sum(
                resident(int(child)) for child in thread.joinpath("children").read_text().split()
            )
    except (OSError, IndexError):
        pass
    return total


def measure(count: int, model: Path | None, processes: str) -> dict:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        make_rows(folder / "rows.jsonl", count)
        if model is None:
            model = folder / "model"
            make_model(model)
        command = [
            sys.executable,
            __file__,
            "--one",
            str(folder / "rows.jsonl"),
            "--model",
            str(model),
            "--cache",
            str(folder / "cache"),
            "--processes",
            processes,
        ]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            child.stdout.readline()
            imported = resident(child.pid)
            started = time.perf_counter()
            child.stdin.write("go\n")
            child.stdin.flush()
            peak = imported
            while child.poll() is None:
                peak = max(peak, resident(child.pid))
                time.sleep(0.02)
        if child.returncode:
            sys.exit(child.returncode)
        seconds = time.perf_counter() - started
        record = json.loads(next(folder.glob("cache/*/prepared.json")).read_text())
        return {
            "rows": count,
            "tokens": record["tokens"]["train"],
            "processes": record["processes"],
            "seconds": round(seconds, 1),
            "rows_per_second": round(count / seconds),
            "peak_mb_above_import": round((peak - imported) / 2**20, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--processes", default="auto")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one, args.model, args.cache, args.processes)
        return
    results = []
    for count in args.rows:
        results.append(measure(count, args.model, args.processes))
        print(json.dumps(results[-1]), flush=True)
    if len(results) > 1:
        ratio = results[-1]["peak_mb_above_import"] / results[-2]["peak_mb_above_import"]
        print(json.dumps({"memory_ratio": round(ratio, 2), "limit": 1.3, "holds": ratio <= 1.3}))
        sys.exit(ratio > 1.3)


if __name__ == "__main__":
    main()
