# python benchmarks/front_door.py [--pairs 7] [--run runs/quickstart]
"""How fast the front door opens: the whole process of three light commands, beside `trl sft
--help`.

Each measurement is a fresh process with warm file caches: wall time, and CPU time (user + system)
of the process and of everything that it waited for. A command and its peer alternate, the order
turns from pair to pair, and what counts is the ratio within a pair: the machine's drift hits both.
The commands:

    llmpipe --help      a recipe with a misspelt key      llmpipe show RUN

RUN is a real one if `--run` names it, or else two unfinished artifacts with three hundred lines of
metrics each. Last it is shown that none of them imports torch: by the modules that the process
holds at its end.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
LLMPIPE = [sys.executable, "-m", "llmpipe"]
TRL = [
    sys.executable,
    "-c",
    "import sys; sys.argv[0] = 'trl'; from trl.cli import main; main()",
    "sft",
    "--help",
]
PROBE = """
import atexit, sys
heavy = {heavy!r}
loaded = lambda: [name for name in heavy if name in sys.modules]
atexit.register(lambda: print("HEAVY", *loaded(), file=sys.stderr))
sys.argv = ["llmpipe", *{arguments!r}]
from llmpipe.front.cli import main
main()
"""


def fixtures(folder: Path, run: Path | None) -> dict[str, tuple[list[str], int]]:
    """A recipe with a mistake and a run directory -> {title: (arguments, exit code)}."""
    recipe = (ROOT / "recipes" / "tiny" / "sft.yaml").read_text(encoding="utf-8")
    wrong = folder / "wrong.yaml"
    wrong.write_text(recipe.replace("learning_rate:", "learning_rte:"), encoding="utf-8")
    metrics = "".join(json.dumps({"step": step, "loss": 3 / step}) + "\n" for step in range(1, 301))
    for name in ("sft", "again"):
        artifact = folder / "run" / name
        artifact.mkdir(parents=True)
        (artifact / "recipe.yaml").write_text(recipe, encoding="utf-8")
        (artifact / "metrics.jsonl").write_text(metrics, encoding="utf-8")
    return {
        "llmpipe --help": (["--help"], 0),
        "a bad recipe": (["sft", str(wrong)], 2),
        "llmpipe show RUN": (["show", str(run or folder / "run")], 0),
    }


def measure(argv: list[str], code: int) -> tuple[float, float]:
    """Wall and CPU seconds of one whole process."""
    begun = time.perf_counter()
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != code:
        sys.exit(f"{' '.join(argv)}: exit code {process.returncode}, expected {code}")
    return wall, usage.ru_utime + usage.ru_stime


def heavy_modules(arguments: list[str]) -> list[str]:
    """Which of HEAVY a command has imported when it ends."""
    probe = PROBE.format(heavy=HEAVY, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    return next(line for line in done.stderr.split("\n") if line.startswith("HEAVY")).split()[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Wall and CPU time of llmpipe's light commands beside trl's help."
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--run", type=Path, metavar="DIR", help="run directory for `llmpipe show`")
    args = parser.parse_args()
    pairs, run = args.pairs, args.run and args.run.resolve()
    with tempfile.TemporaryDirectory() as name:
        commands = fixtures(Path(name), run)
        measure(TRL, 0)  # warm
        print(
            f"{pairs} pairs each, {os.cpu_count()} cores; seconds, median; "
            "ratio to `trl sft --help` within a pair"
        )
        print(
            f"{'':<18} {'wall':>7} {'trl':>7} {'ratio':>7} {'cpu':>9} {'trl':>7} {'ratio':>7}"
            "   lowest ratios"
        )
        for title, (arguments, code) in commands.items():
            own, peer = [], []
            measure([*LLMPIPE, *arguments], code)
            for pair in range(pairs):
                for side in (0, 1) if pair % 2 else (1, 0):
                    (own if side else peer).append(
                        measure([*LLMPIPE, *arguments], code) if side else measure(TRL, 0)
                    )
            shown = []
            lowest = []
            for i in (0, 1):
                ratios = [theirs[i] / ours[i] for ours, theirs in zip(own, peer, strict=True)]
                shown += [
                    statistics.median(o[i] for o in own),
                    statistics.median(p[i] for p in peer),
                ]
                shown.append(statistics.median(ratios))
                lowest.append(min(ratios))
            print(
                f"{title:<18} {shown[0]:7.3f} {shown[1]:7.2f} {shown[2]:6.1f}x "
                f"{shown[3]:9.3f} {shown[4]:7.2f} "
                f"{shown[5]:6.1f}x   {lowest[0]:.1f}x wall, {lowest[1]:.1f}x cpu",
                flush=True,
            )
        for title, (arguments, _) in commands.items():
            print(
                f"{title}: heavy modules imported: {', '.join(heavy_modules(arguments)) or 'none'}"
            )


if __name__ == "__main__":
    main()
