"""The figures of one card, beside bare TRL's on the same card in the same run.

    make gpu
    make gpu PYTHON=python3                     a Python that has the dependencies, no .venv/
    python benchmarks/gpu.py --plan             what there is; without a card
    python benchmarks/gpu.py sft ppo            these parts alone
    python benchmarks/gpu.py --tiny             the same parts in tiny, on any machine

No network is needed: models have random weights, of SmolLM2-1.7B's shape and of SmolLM2-135M's,
rows are made of invented words, as long as Alpaca's (lognormal, 200 tokens on average), and so is
the tokenizer. llmpipe is run by its command and ended once enough steps are measured; both sides
learn from every token, in bf16, TRL without activation checkpointing, which is its faster way. The
first steps of either side do not count. A part's row is printed as soon as it is known, and the
record, benchmarks/gpu/CARD.json, is written anew after each, so that a run that is cut has told
what it saw. A record of the same commit, card and versions is added to.

MFU is the share of the card's bf16 peak, by its maker: 6 operations a weight and token (4, and 2
where it is trained, of adapters) and 12 x layers x width x context for the attention.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from onecard import parts, whole
from onecard.bench import Bench, make
from onecard.commands import ROOT, Failed
from onecard.parts import Part
from onecard.shapes import FULL, TINY
from onecard.table import TITLE, Row, table

PARTS = [
    Part("sft", "packed sft of 1.7 B beside TRL, and both starts", 120, parts.sft),
    Part("pretrain", "pretraining of 1.7 B in blocks of 2,048 tokens: MFU", 60, parts.pretrain),
    Part("ppo", "ppo, LoRA on 1.7 B, 64 answers x 128 tokens, a function scores", 80, parts.ppo),
    Part("lora", "packed LoRA r16 on 1.7 B beside TRL and PEFT", 80, parts.lora),
    Part("dpo", "dpo, LoRA r16 on 1.7 B, beside TRL and PEFT", 80, parts.dpo),
    Part("stages", "every stage on a tiny model: exit codes; resume to the byte", 90, whole.stages),
    Part("ppo_trl", "ppo of 135 M beside trl 1.12, with a reward model", 120, parts.ppo_trl),
    Part("qlora", "packed QLoRA, NF4, r16 on 1.7 B beside TRL and PEFT", 90, parts.qlora),
    Part("reads", "host reads of a step of sft, of an update of ppo", 60, whole.reads),
    Part("memory", "peak memory of sft of 135 M over 50 steps", 40, whole.memory),
    Part("ppo_rm", "ppo as above, a reward model of 1.7 B scores", 90, parts.ppo_rm),
    Part("checkpoints", "how long sft of 135 M stands still for one", 60, whole.checkpoints),
    Part("zero", "sft and dpo of a tiny model under DeepSpeed: losses, resume", 150, whole.zero),
    Part("sft_unpacked", "sft of 1.7 B, a row per sequence, beside TRL", 100, parts.sft_unpacked),
    Part("tests", "the tests of what computes, with the card", 120, whole.tests),
]
LIBRARIES = (
    "torch transformers trl peft accelerate triton liger-kernel bitsandbytes deepspeed".split()
)


def plan() -> str:
    """What each part shows, and how long it takes on an H100."""
    lines = [f"{part.name:15s}{part.seconds:4d} s  {part.shows}" for part in PARTS]
    return "\n".join(
        [*lines, "", "in this order; seconds are what an H100 is allowed for it, about"]
    )


def output(*command: str) -> str:
    """What a command prints; nothing where there is no such command."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def conditions(computing: dict[str, Any], commit: str | None) -> dict[str, Any]:
    """Under which figures are comparable: what was run, where, with which libraries."""
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    changed = output("git", "status", "--porcelain", "--", "llmpipe", "benchmarks/onecard")
    head = output("git", "rev-parse", "HEAD")
    return {
        "commit": commit or (head and head + (" and changes" if changed else "")) or None,
        "card": computing["card"],
        "gib": computing["gib"],
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": computing["cuda"],
        "python": sys.version.split()[0],
        "versions": {name: installed(name) for name in LIBRARIES},
    }


class Record:
    """The file of figures, whole after each; nothing without a path."""

    def __init__(self, path: Path | None, conditions: dict[str, Any]):
        self.path = path
        self.conditions = conditions
        self.rows: dict[str, Row] = {}
        self.before = self._of_the_same() if path and path.exists() else {}

    def _of_the_same(self) -> dict[str, Any]:
        """Rows of an earlier run that nothing tells from this one but the parts."""
        assert self.path is not None
        held = json.loads(self.path.read_text())
        same = all(held.get(key) == value for key, value in self.conditions.items())
        return held["rows"] if same and held.get("commit") else {}

    def add(self, row: Row) -> None:
        self.rows[row.name] = row
        if self.path is None:
            return
        told = {name: row.record() for name, row in self.rows.items()}
        date = datetime.now(UTC).date().isoformat()
        record = self.conditions | {"date": date, "rows": self.before | told}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.rename(self.path)


def measure(part: Part, bench: Bench) -> Iterator[Row]:
    """The rows of a part; one that says so where it fails, which costs no other part its turn."""
    try:
        yield from part.run(bench)
    except Failed as failure:
        yield Row(part.name, note=str(failure), failed=True)
    except Exception as bug:
        traceback.print_exc()
        yield Row(part.name, note=f"{type(bug).__name__}: {bug}", failed=True)


@contextmanager
def folder(home: Path | None) -> Iterator[Path]:
    """For models and runs: the one that was named, or one that goes away."""
    if home:
        home.mkdir(parents=True, exist_ok=True)
        yield home.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="gpu-") as made:
        yield Path(made).resolve()


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--plan", action="store_true", help="list the parts, and do nothing")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument(
        "--limit", type=float, default=480, help="seconds after which no part begins"
    )
    parser.add_argument("--json", type=Path, help="the record; benchmarks/gpu/CARD.json unless set")
    parser.add_argument("--home", type=Path, help="keep models and runs here, and take them again")
    parser.add_argument("--trl112", type=Path, help="a folder to import trl 1.12 from, for ppo_trl")
    parser.add_argument("--commit", help="what is measured, where this is no git checkout")
    args = parser.parse_args()
    if unknown := [name for name in args.parts if name not in names]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(names)}")
    return args


def main() -> int:
    args = asked()
    if args.plan:
        print(plan())
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends what was started, too
    begun = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - begun:4.0f} s  {line}", flush=True)

    scale = TINY if args.tiny else FULL
    known = {part.name: part for part in PARTS}
    chosen = [known[name] for name in args.parts or known]
    with folder(args.home) as home:
        computing = make(home, scale)
        has_card = computing["card"] != "cpu"
        if not has_card and not args.tiny:
            print("no card here: --plan lists what one is asked, --tiny does it in small")
            return 2
        named = re.sub(r"\W+", "-", computing["card"]).strip("-").lower()
        usual = None if args.tiny else ROOT / "benchmarks" / "gpu" / f"{named}.json"
        record = Record(args.json or usual, conditions(computing, args.commit))
        say(f"{computing['card']}, {json.dumps(record.conditions['versions'])}")
        say(TITLE)
        trl112 = args.trl112.resolve() if args.trl112 else None
        bench = Bench(home, scale, computing["peak_flops"], has_card, trl112)
        for part in chosen:
            if time.monotonic() - begun > args.limit:
                say(f"{part.name:15s}skipped: it would begin after {args.limit:.0f} s")
                continue
            for row in measure(part, bench):
                record.add(row)
                say(str(row))
    print(f"\n{computing['card']}\n{table(record.rows.values())}")
    return int(any(row.failed for row in record.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
