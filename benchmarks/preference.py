"""Whether preferences teach something on few rows: `reward` and `dpo`, cross-validated.

    python benchmarks/preference.py --model DIR --rows dpo_en_demo.json --run runs/folds

Every row is held out once. In each fold a reward model and a policy are trained on the others, and
`eval` ranks the held-out answers by the parent, the policy and the reward model. Rows whose prompt
leaves no room for an answer in `--max-length` tokens are rejected in training, counted by llmpipe,
and not ranked either; answers are ranked whole, in training what is too long is truncated, and
counted, too. The command can be killed and run again.
`--rows`: a JSON list of ShareGPT rows with answers (conversations, chosen, rejected).
"""

import argparse
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from llmpipe.evaluation.book import Line
from llmpipe.evaluation.statistics import measured

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def pipeline(args, run: Path, train: Path, test: Path) -> Path:
    """The recipe of one fold."""
    data = {"train": [{"path": str(train)}], "max_length": args.max_length, "max_rejected": 0.5}
    learning = {"batch_size": 8, "epochs": args.epochs}
    common = {
        "model": args.model,
        "data": data,
        "adapter": {"rank": 16},
        "launch": {"threads": args.threads},
    }
    models = {"parent": args.model, "dpo": "artifact:dpo", "reward": "artifact:reward"}
    stages = [
        {"stage": "reward", **common, "optim": {"learning_rate": 2e-4, **learning}},
        {"stage": "dpo", **common, "optim": {"learning_rate": args.dpo_rate, **learning}},
        {
            "stage": "eval",
            "models": models,
            "tasks": [{"task": "preference", "data": [{"path": str(test)}]}],
        },
    ]
    stages[2]["launch"] = common["launch"]
    path = run.with_suffix(".yaml")
    path.write_text(json.dumps({"run": str(run), "stages": stages}))  # JSON is YAML
    return path


def fits(row: dict, tokenizer, most: int) -> bool:
    """Whether a row's prompt is shorter than `most` tokens."""
    turns = [
        {"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]
    ]
    return (
        len(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
        < most
    )


def one(args, home: Path, fold: int, rows: list[dict], tokenizer) -> list[Line]:
    """Train and evaluate one fold; the lines that `eval` wrote of its items."""
    of: dict[str, int] = {}  # a question that is asked twice is in one fold
    folds = [
        of.setdefault(json.dumps(row["conversations"]), i % args.folds)
        for i, row in enumerate(rows)
    ]
    parts = {
        "train": [row for row, at in zip(rows, folds, strict=True) if at != fold],
        "test": [
            row
            for row, at in zip(rows, folds, strict=True)
            if at == fold and fits(row, tokenizer, args.max_length)
        ],
    }
    for name, part in parts.items():
        (home / f"{name}-{fold}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    path = pipeline(
        args, home / str(fold), home / f"train-{fold}.jsonl", home / f"test-{fold}.jsonl"
    )
    with (home / f"{fold}.log").open("a") as log:
        done = subprocess.run(
            [sys.executable, "-m", "llmpipe", "run", str(path)], stdout=log, stderr=log
        )
    if done.returncode:
        sys.exit(f"fold {fold} ended with {done.returncode}: see {log.name}")
    for stage in ("reward", "dpo"):
        counts = json.loads((home / str(fold) / stage / "manifest.json").read_text())["data"][
            "rows"
        ]
        print(f"fold {fold}: {stage}: {counts}", flush=True)
    text = (home / str(fold) / "eval" / "samples.jsonl").read_text(encoding="utf-8")
    lines = [Line.parse(line) for line in text.split("\n") if line]
    return [replace(line, item=line.item * args.folds + fold) for line in lines]


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--run", required=True, help="folder for the runs")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--dpo-rate", type=float, default=2e-4)
    parser.add_argument("--jobs", type=int, default=1, help="folds at once")
    parser.add_argument("--threads", type=int, default=2, help="of each")
    args = parser.parse_args()

    rows = json.loads(Path(args.rows).read_text())
    random.Random(0).shuffle(rows)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    home = Path(args.run).resolve()
    home.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        folds = pool.map(lambda fold: one(args, home, fold, rows, tokenizer), range(args.folds))
        lines = [line for of_fold in folds for line in of_fold]
    for table in measured(lines, ["parent", "dpo", "reward"], 0):
        for metric, cells in table.items():
            for name, cell in cells.items():
                interval = f"[{cell.low:+.4f}, {cell.high:+.4f}]"
                print(f"{metric:14s} {name:16s} {cell.value:+.4f}  {interval}  n={cell.n}")


if __name__ == "__main__":
    main()
