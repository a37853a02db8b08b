"""Peak memory of a streamed pretraining: 2 GB of jsonl beside 20 MB, both above what the imports
take.

    python benchmarks/stream.py 20 2000

Each size (in MB) is generated and trained on for the same number of steps by the stage itself, in a
process of its own; `--read` then lets the stream alone read it to its end. The ratio is that of the
last to the first size.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOKENIZER = Path(__file__).parent.parent / "recipes" / "tiny" / "model"


def generate(path: Path, megabytes: int) -> None:
    """Documents of 20 to 2,000 made-up words, one JSON object per line."""
    rng = random.Random(0)
    words = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 9)))
        for _ in range(20_000)
    ]
    size = 0
    with path.open("w") as file:
        while size < megabytes * 1e6:
            size += file.write(
                json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(20, 2000)))}) + "\n"
            )


def recipe(home: Path, rows: Path, steps: int) -> Path:
    values = {
        "stage": "pretrain",
        "run": str(home / "run"),
        "tokenizer": str(TOKENIZER),
        "architecture": {"layers": 2, "width": 64, "heads": 4},
        "data": {"train": [{"path": str(rows)}], "max_length": 256, "stream": True},
        "optim": {"learning_rate": 1e-3, "batch_tokens": 4096, "steps": steps},
        "launch": {"processes": 1, "micro_batch_size": 16},
    }
    (home / "stream.yaml").write_text(json.dumps(values))
    return home / "stream.yaml"


def train(path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "llmpipe", "pretrain", str(path)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def read(path: Path) -> dict:
    """The whole file through the stream, in this process."""
    from llmpipe.data.kinds.blocks import BLOCKS
    from llmpipe.data.prepare import prepare
    from llmpipe.data.stream import Stream
    from llmpipe.recipe.check import load
    from llmpipe.stages import schema

    asked = load(path, schema("pretrain"))
    cache = path.parent / "prepared"
    ready = prepare(asked.data, BLOCKS, TOKENIZER, cache, seed=0, say=lambda line: None)
    folder = ready.folder(cache)
    stream = Stream(asked.data, folder, 1 << 60, 1, seed=0, pinned={}, processes=2)
    begun, before = time.monotonic(), memory()
    blocks, position = 0, stream.position(0)
    while position.epoch == 0:
        blocks += 1000
        position = stream.position(blocks)
    return {"seconds": time.monotonic() - begun, "tokens": blocks * 256, "above": memory() - before}


def memory() -> float:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(args) -> dict:
    with tempfile.TemporaryDirectory() as home:
        rows = Path(home, "rows.jsonl")
        generate(rows, args.sizes[0])
        path = recipe(Path(home), rows, args.steps)
        if not args.read:
            command = [sys.executable, "-c", "import trl, bitsandbytes; from trl import SFTTrainer"]
            subprocess.run(command, check=True, capture_output=True)
            imports = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            train(path)
            return {
                "train": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024 - imports
            }
        return read(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", type=int, nargs="+", help="megabytes of jsonl")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--read", action="store_true", help="no training: read the whole file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    above = []
    for size in args.sizes:
        command = [sys.executable, __file__, str(size), "--steps", str(args.steps), "--one"] + [
            "--read"
        ] * args.read
        one = json.loads(
            subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True
            ).stdout.splitlines()[-1]
        )
        above.append(one["train"] if "train" in one else one["above"])
        rate = (
            f", {one['tokens'] / 1e6:.1f} M tokens in {one['seconds']:.0f} s" if args.read else ""
        )
        print(
            f"{size} MB: peak {above[-1]:.1f} MB above the "
            f"{'start' if args.read else 'imports'}{rate}",
            flush=True,
        )
    print(f"ratio: {above[-1] / above[0]:.2f}")


if __name__ == "__main__":
    main()
