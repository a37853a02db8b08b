"""The parts that look at whole runs: every stage, resume, host reads, memory, tests."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from onecard import commands
from onecard.bench import Bench
from onecard.commands import ROOT, Failed, artifact_of
from onecard.parts import PROMPT, REWARD
from onecard.table import Row

DATA = ROOT / "recipes" / "tiny"
ROWS, PAIRS = [{"path": str(DATA / "rows.jsonl")}], [{"path": str(DATA / "pairs.jsonl")}]
ADAPTER = {"rank": 4, "alpha": 8}


def tiny(run: Path, stage: str, **more: Any) -> dict[str, Any]:
    """A stage on the tiny model of recipes/, whose every step is the same wherever it is cut."""
    steps, batch = (8, 8) if stage == "ppo" else (80, 4)
    fields = {
        "stage": stage,
        "run": str(run),
        "model": str(DATA / "model"),
        "data": {"train": PAIRS if stage in ("reward", "dpo", "kto") else ROWS, "max_length": 64},
        "optim": {"learning_rate": 1e-3, "batch_size": batch, "steps": steps},
        "checkpoint": {"every": 50},
        "log": {"every": 1},
        "launch": {"processes": 1, "threads": 1, "micro_batch_size": batch // 2},
    }
    if stage in ("lora", "qlora"):
        fields["adapter"] = ADAPTER
    if stage == "qlora":
        fields["quantization"] = {"bits": 4}
    if stage == "ppo":
        fields |= {"rollout": {"max_new_tokens": 8}, "algorithm": {"epochs": 2, "minibatches": 2}}
        fields["reward"] = [REWARD]
    return fields | more


def pretraining(run: Path) -> dict[str, Any]:
    fields = tiny(run, "pretrain", tokenizer=str(DATA / "model"))
    del fields["model"]
    return fields | {
        "architecture": {"kind": "llama", "layers": 2, "width": 32, "heads": 4},
        "data": {"train": ROWS, "max_length": 32, "max_rejected": 0.2},
        "optim": {"learning_rate": 1e-3, "batch_tokens": 128, "steps": 80},
    }


def judged(run: Path) -> dict[str, Any]:
    """ppo by the reward model that its run has made."""
    return tiny(run, "ppo", name="ppo-model", reward=[{"model": "artifact:reward"}])


def evaluating(run: Path) -> dict[str, Any]:
    models = {name: f"artifact:{name}" for name in ("sft", "ppo")}
    scored = {"task": "generate", "data": ROWS, "score": ["exact_match"], "max_new_tokens": 8}
    return {
        "stage": "eval",
        "run": str(run),
        "models": {"base": str(DATA / "model"), **models},
        "tasks": [{"task": "perplexity", "data": ROWS, "window": 64, "stride": 32}, scored],
        "launch": {"threads": 1},
    }


def stages(bench: Bench) -> Iterator[Row]:
    """Every stage to its end; and four that were stopped, against those that were not."""
    straight, cut = bench.home / "runs" / "straight", bench.home / "runs" / "stopped"
    for run in (straight, cut):
        shutil.rmtree(run, ignore_errors=True)
    special = {"pretrain": pretraining, "ppo-model": judged, "eval": evaluating}
    later = ("ppo-model", "eval")
    names = bench.scale.stages
    first = [
        special[name](straight) if name in special else tiny(straight, name)
        for name in names
        if name not in later
    ]
    second = [special[name](straight) for name in names if name in later]
    stopped = [tiny(cut, stage) for stage in bench.scale.resumed]
    with ThreadPoolExecutor(max(1, min(6, (os.cpu_count() or 1) // 2))) as pool:
        cuts = [pool.submit(resumed, recipe) for recipe in stopped]
        codes = list(pool.map(commands.finished, first))
        codes += list(pool.map(commands.finished, second))
        yield ended(first + second, codes)
        ends = {recipe["stage"]: cut.result() for recipe, cut in zip(stopped, cuts, strict=True)}
    wrong = [f"{stage}: {says}" for stage, says in ends.items() if says]
    wrong += [
        f"{recipe['stage']}: other bytes"
        for recipe in stopped
        if not ends[recipe["stage"]] and not equal(artifact_of(recipe), straight / recipe["stage"])
    ]
    note = f"of {len(ends)}: SIGTERM, the same command again, the bytes of a run not stopped"
    yield Row(
        "resume",
        "equal",
        own=float(len(ends) - len(wrong)),
        note="; ".join(wrong) or note,
        failed=bool(wrong),
    )


def ended(recipes: list[dict[str, Any]], codes: list[int]) -> Row:
    """How many of the stages ended with exit code 0, and what the others said."""
    names = [recipe.get("name", recipe["stage"]) for recipe in recipes]
    wrong = [
        f"{name}: exit code {code}: {commands.tail(recipe)}"
        for name, code, recipe in zip(names, codes, recipes, strict=True)
        if code
    ]
    return Row(
        "stages",
        "exit 0",
        own=float(codes.count(0)),
        note="; ".join(wrong) or f"of {len(names)}: {', '.join(names)}",
        failed=bool(wrong),
        details={"exit_codes": dict(zip(names, codes, strict=True))},
    )


def resumed(recipe: dict[str, Any]) -> str:
    """Stop a stage half way, and run the command again; what went wrong."""
    code = commands.stopped(recipe, 3 if recipe["stage"] == "ppo" else 20)
    if code != 143:
        return f"exit code {code} after SIGTERM, not 143: {commands.tail(recipe)}"
    code = commands.finished(recipe)
    return f"exit code {code} when it went on: {commands.tail(recipe)}" if code else ""


def equal(one: Path, other: Path) -> bool:
    """Whether two artifacts published the same bytes under the same names."""
    folders = [folder / "model" for folder in (one, other)]
    names, others = (
        sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        for folder in folders
    )
    same = (
        folders[0].joinpath(name).read_bytes() == folders[1].joinpath(name).read_bytes()
        for name in names
    )
    return bool(names) and names == others and all(same)


def reads(bench: Bench) -> Iterator[Row]:
    """Waits for the card, of a packed sft per optimizer step and of ppo per update."""
    if not bench.has_card:
        yield Row("reads", note="skipped: no card to wait for")
        return
    model, scale = bench.model("small"), bench.scale
    data = {"train": [{"path": bench.rows()}], "max_length": scale.length}
    recipe = bench.recipe("reads", "sft", model=model, data=data, optim=bench.optim())
    yield counted("reads: sft", "per step", recipe)
    recipe = bench.recipe(
        "reads",
        "ppo",
        model=model,
        adapter=ADAPTER,
        reward=[REWARD],
        data=data | {"max_length": PROMPT},
        rollout={"max_new_tokens": 16},
        algorithm={"epochs": 1, "minibatches": 2},
        optim=bench.optim(batch_size=8),
    )
    yield counted("reads: ppo", "per update", recipe)


def counted(name: str, unit: str, recipe: dict[str, Any]) -> Row:
    """Of a stage that is prepared by its command and trained in a process that counts."""
    if code := commands.finished(recipe, "prepare"):
        raise Failed(f"llmpipe prepare: exit code {code}: {commands.tail(recipe)}")
    out = Path(recipe["run"]) / f"{recipe['stage']}.reads.json"
    done = subprocess.run(
        [sys.executable, commands.HERE / "reads.py", artifact_of(recipe), "8", out],
        env=commands.environment(),
        capture_output=True,
        text=True,
        timeout=commands.LIMIT,
    )
    if not out.exists():
        raise Failed(f"{name}: exit code {done.returncode}: {commands.last_line(done.stderr)}")
    told = json.loads(out.read_text())
    most = [f"{place} ({times})" for place, times in list(told["places"].items())[:3]]
    return Row(
        name,
        unit,
        own=float(median(told["reads"][3:])),
        note=", ".join(most) and f"most at {', '.join(most)}",
        details=told,
    )


def memory(bench: Bench) -> Iterator[Row]:
    """Peak memory of a packed sft at its tenth step, and at the end of a longer run."""
    scale, early = bench.scale, 10
    recipe = bench.recipe(
        "memory",
        "sft",
        model=bench.model("small"),
        data={"train": [{"path": bench.rows()}], "max_length": scale.length, "packing": True},
        optim=bench.optim(),
    )
    seen = commands.measured(recipe, scale.long_run)
    before, after = (seen.lines[step - 1]["memory_gb"] for step in (early, scale.long_run))
    grown = after / before - 1
    yield Row(
        "memory",
        "% grown",
        own=100 * grown,
        gib=after,
        note=f"from step {early} to {scale.long_run}",
        failed=bench.has_card and grown > 0.01,
    )


def checkpoints(bench: Bench) -> Iterator[Row]:
    """Seconds that the steps of a packed sft stand still for a checkpoint, by either way."""
    recipe = bench.recipe(
        "checkpoints",
        "sft",
        model=bench.model("small"),
        data={"train": [{"path": bench.rows()}], "max_length": bench.scale.length, "packing": True},
        optim=bench.optim(),
    )
    out = Path(recipe["run"]).parent / "checkpoints.json"
    out.unlink(missing_ok=True)
    asked = ["--recipe", commands.write_recipe(recipe), "--processes", "1", "--json", out]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "checkpoints.py", *asked],
        env=commands.environment(),
        capture_output=True,
        text=True,
        timeout=commands.LIMIT,
    )
    if done.returncode or not out.exists():
        raise Failed(f"checkpoints: exit code {done.returncode}: {commands.last_line(done.stderr)}")
    told = json.loads(out.read_text())
    for way in ("at once", "beside"):
        each = [interval for interval in told["intervals"] if interval["way"] == way]
        still, seconds = (median(of[name] for of in each) for name in ("still", "seconds"))
        note = f"of {told['bytes'] / 1e9:.2f} GB; {seconds:.2f} s from one to the next"
        yield Row(f"saved {way}", "s still", own=still, note=note, details={"intervals": each})


APART, FIRST = 2e-3, 4
"""By which share of itself a loss, or a norm of gradients, may differ, and in how many steps that
is looked at, where an engine is around the very same arithmetic: in bf16 rounding parts any two
trainings later on."""


def zero(bench: Bench) -> Iterator[Row]:
    """One process under DeepSpeed's ZeRO: its losses beside those of plain training, what it
    publishes, and a run that was stopped."""
    if not find_spec("deepspeed"):
        yield Row("zero", note="skipped: this Python has no deepspeed")
        return
    for stage in ("sft", "dpo"):
        plain = under(bench, stage, "ddp")
        if code := commands.finished(plain):
            raise Failed(f"{stage}: exit code {code}: {commands.tail(plain)}")
        for strategy in ("zero2", "zero3"):
            recipe = under(bench, stage, strategy)
            yield beside_plain(
                recipe, commands.lines_of(plain), under(bench, stage, strategy, "cut")
            )


def under(bench: Bench, stage: str, strategy: str, run: str = "zero") -> dict[str, Any]:
    """A stage on the tiny model, begun anew."""
    home = bench.home / "runs" / run / strategy
    shutil.rmtree(home / stage, ignore_errors=True)
    recipe = tiny(home, stage)
    recipe["launch"] |= {"strategy": strategy, "activation_checkpointing": "none", "compile": False}
    return recipe


def beside_plain(recipe: dict[str, Any], plain: list[dict[str, Any]], again: dict[str, Any]) -> Row:
    """The greatest difference of a loss or a norm; failed where it is large, nothing is published,
    or a run that was stopped (`again`) publishes other bytes."""
    stage, strategy = recipe["stage"], recipe["launch"]["strategy"]
    name = f"{strategy}: {stage}"
    if code := commands.finished(recipe):
        return Row(name, note=f"exit code {code}: {commands.tail(recipe)}", failed=True)
    pairs = list(zip(commands.lines_of(recipe), plain, strict=True))[:FIRST]
    differences = [
        abs(mine[quantity] / theirs[quantity] - 1)
        for mine, theirs in pairs
        for quantity in ("loss", "grad_norm")
    ]
    wrong = resumed(again)
    if not wrong and not equal(artifact_of(again), artifact_of(recipe)):
        wrong = "other bytes after a stop"
    return Row(
        name,
        "% apart",
        own=100 * max(differences),
        note=wrong or f"of losses and norms, in {FIRST} steps; stopped, the same bytes",
        failed=bool(wrong) or max(differences) > APART,
        details={"differences": differences},
    )


TESTS = """
tests/test_attention.py
tests/test_upstream.py
tests/rl/test_policy_gradient.py
tests/rl/test_optimizer.py
tests/models/drawing/test_token_step.py
tests/rl/test_learner.py
tests/models/test_apart.py
tests/models/test_generate.py
tests/models/test_verify.py
""".split()


def tests(bench: Bench) -> Iterator[Row]:
    """Tests of what computes, with the card visible."""
    if not find_spec("pytest"):
        yield Row("tests", note="skipped: this Python has no pytest")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=commands.environment() | {"LLMPIPE_TESTS_WITH_GPU": "1"},
            capture_output=True,
            text=True,
            timeout=commands.LIMIT,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"pytest: not done in {commands.LIMIT:.0f} s") from None
    said = done.stdout.splitlines()
    failing = [line.split()[1] for line in said if line.startswith(("FAILED ", "ERROR "))]
    passed = re.search(r"(\d+) passed", done.stdout)
    yield Row(
        "tests",
        "passed",
        own=float(passed[1]) if passed else 0.0,
        note="; ".join(failing[:4]) or (said[-1] if said else ""),
        failed=bool(done.returncode),
        details={"failing": failing},
    )
