"""GRPO beside PPO on sums, from one sft model and by one verifier, at equal time.

    python recipes/make_sums.py && make models
    python benchmarks/sums.py --seeds 42 1 2 --home /tmp/sums --plot benchmarks/sums.svg

The stages of recipes/sums.yaml and recipes/sums-grpo.yaml as they are, but for the seed, a look at
the held-out asks every six updates, and threads: after sft, grpo and ppo train at the same time
with one thread each, so that whatever else the machine does takes from both alike. Then eval asks
both the 500 test expressions. Runs that are finished are taken as they are.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import yaml

RECIPES = Path(__file__).parent.parent / "recipes"
BESIDE = ("grpo", "ppo")
COLOURS = {"grpo": "#26c", "ppo": "#c62"}


def stages(seed: int, run: Path) -> dict[str, dict]:
    """sft, grpo, ppo and eval, as the recipes have them."""
    sums = yaml.safe_load((RECIPES / "sums.yaml").read_text())["stages"]
    sft, grpo, last = yaml.safe_load((RECIPES / "sums-grpo.yaml").read_text())["stages"]
    ppo = next(stage for stage in sums if stage["stage"] == "ppo" and "name" not in stage)
    for stage, threads in ((sft, 2), (grpo, 1), (ppo, 1)):
        stage |= {"seed": seed, "launch": {"processes": 1, "threads": threads}}
    for stage in (grpo, ppo):
        stage["evaluation"] = {"every": 6}
    last["models"] = {name: f"artifact:{name}" for name in ("sft", *BESIDE)}
    del last["gate"]
    return {stage["stage"]: {"run": str(run), **stage} for stage in (sft, grpo, ppo, last)}


def start(stage: dict, home: Path) -> subprocess.Popen:
    path = home / f"{Path(stage['run']).name}-{stage['stage']}.yaml"
    path.write_text(yaml.safe_dump(stage, sort_keys=False))
    command = [sys.executable, "-m", "llmpipe", stage["stage"], str(path)]
    with path.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def end(process: subprocess.Popen) -> None:
    if process.wait():
        sys.exit(f"{' '.join(process.args)} failed: {process.returncode}")


def train(seed: int, home: Path) -> Path:
    """All stages of a seed; the run."""
    run = home / f"seed-{seed}"
    asked = stages(seed, run)
    begun = time.monotonic()
    end(start(asked["sft"], home))
    for process in [start(asked[name], home) for name in BESIDE]:
        end(process)
    end(start(asked["eval"], home))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"seed {seed}: {time.monotonic() - begun:.0f} s with sft and eval; "
        f"{used.ru_utime + used.ru_stime:.0f} s of processor time so far",
        flush=True,
    )
    return run


def tell(run: Path) -> None:
    """Shares right and paired differences, and what each took."""
    answers = json.loads((run / "eval" / "results.json").read_text())["tasks"]["answers"]
    right, differences = answers["metrics"]["number"], answers["differences"]["number"]
    for name in BESIDE:
        gain = differences[f"{name} - sft"]
        lines = curve(run, name)
        print(
            f"  {name}: sft {right['sft']['value']:.3f}, {name} {right[name]['value']:.3f}, "
            f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]; "
            f"{lines[-1]['seconds'] / 60:.1f} min on one thread"
        )
    apart = differences.get("ppo - grpo") or differences["grpo - ppo"]
    sign = 1 if "grpo - ppo" in differences else -1
    low, high = sorted((sign * apart["low"], sign * apart["high"]))
    print(f"  grpo less ppo: {sign * apart['value']:+.3f} [{low:+.3f}, {high:+.3f}]", flush=True)


def curve(run: Path, name: str) -> list[dict]:
    """Lines that say how the held-out asks were answered, with the seconds until then."""
    lines = (run / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "eval_score" in line]


def plot(runs: list[Path], path: Path) -> None:
    """Held-out score against time, a line for each seed, as SVG. How fast a thread was is another
    thing in every seed, so that time is the share of what the slower one of both took."""
    curves = {name: [curve(run, name) for run in runs] for name in BESIDE}
    longest = [max(each[i][-1]["seconds"] for each in curves.values()) for i in range(len(runs))]

    def x(share: float) -> float:
        return 50 + 520 * share

    def y(score: float) -> float:
        return 350 - 320 * score

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 400" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="620" height="400" fill="white"/>'
        '<path d="M50 30V350H570" stroke="black" fill="none"/>',
        '<text x="10" y="20">score of held-out sums</text>'
        '<text x="170" y="390">share of the time that both train, a thread each</text>',
    ]
    for i in range(6):
        parts.append(f'<text x="20" y="{y(i / 5) + 4:.0f}">{i / 5:.1f}</text>')
        parts.append(f'<text x="{x(i / 5) - 8:.0f}" y="368">{i / 5:.1f}</text>')
    for at, (name, lines) in enumerate(curves.items()):
        colour = COLOURS[name]
        for each, seconds in zip(lines, longest, strict=True):
            points = " ".join(
                f"{x(line['seconds'] / seconds):.1f},{y(line['eval_score']):.1f}" for line in each
            )
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            )
        parts.append(f'<text x="520" y="{300 + 18 * at}" fill="{colour}">{name}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--home", type=Path, required=True, help="where runs and recipes go")
    parser.add_argument("--plot", type=Path, help="an SVG file to write")
    args = parser.parse_args()
    args.home.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in args.seeds:
        runs.append(train(seed, args.home))
        tell(runs[-1])
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
