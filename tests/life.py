"""A command's whole life inside one process, so that heavy libraries are imported once; and the
same in forked trials.

`command` is `llmpipe STAGE RECIPE` with its workers run here instead of as subprocesses. `Trial`
forks it from a server that has imported torch but started no thread.
"""

import json
import multiprocessing
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from llmpipe.errors import DONE, Stopped, UserError
from llmpipe.files.tables import table
from llmpipe.front import launch, outside
from llmpipe.run.artifact import Artifact
from llmpipe.run.outcome import Outcome
from llmpipe.run.signals import Signals

ROOT = Path(__file__).parent.parent
TINY = ROOT / "recipes" / "tiny"
FULL = os.environ.get("FAULTS") == "full"
"""Whether it is night, and `make faults` has more trials of each."""
WALL_CLOCK = (
    "tokens_per_second",
    "episodes_per_second",
    "rollout_share",
    "share_of_peak",
    "compilations",
    "memory_gb",
    "seconds",
)


def recipe(run: Path, **changes) -> dict:
    """A tiny sft recipe of twelve steps; `changes` name dotted fields, with __ for the dot."""
    values = {
        "stage": "sft",
        "run": str(run),
        "model": str(TINY / "model"),
        "data": {
            "train": [{"path": str(TINY / "rows.jsonl")}],
            "eval": {"holdout": 0.1},
            "max_length": 64,
        },
        "optim": {"learning_rate": 1e-3, "batch_size": 4, "steps": 12, "precision": "fp32"},
        "evaluation": {"every": 5},
        "checkpoint": {"every": 3},
        "log": {"every": 2},
        "launch": {"processes": 1, "threads": 1, "micro_batch_size": 2},
        "samples": {"prompts": ["What is 2 + 2?"], "max_new_tokens": 4},
    }
    return put(values, changes)


def put(values: dict, changes: dict) -> dict:
    """`values` with `changes` made: `optim__steps` is the field `steps` in `optim`. What is put in
    is a copy."""
    for dotted, value in changes.items():
        target = values
        *path, last = dotted.split("__")
        for part in path:
            target = target.setdefault(part, {})
        target[last] = dict(value) if isinstance(value, dict) else value
    return values


def by_the_dozen(*values):
    """A case for `make faults`: `make test` has others of its kind."""
    return pytest.param(*values, marks=pytest.mark.faults)


def write(run: Path, **changes) -> Path:
    path = run.parent / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(recipe(run, **changes)))
    return path


def guarded(artifact, work):
    """Run `work` alone; its end, whatever it is, becomes outcome.json."""
    from llmpipe.front.worker import as_kept, end_of

    outcome = end_of(work, artifact, debug=False)
    as_kept(outcome, artifact).deliver(artifact)
    return outcome


def start_here(action, artifact, recipe, *, inexact, debug, early=None):
    """`start` without a process of its own."""
    from llmpipe.front.worker import act

    signals = Signals()
    if multiprocessing.parent_process() is not None:  # a trial: signals reach it
        signals.install()
    Outcome.clear(artifact)
    guarded(artifact, lambda: act(action, artifact, signals, inexact=inexact)).check()


def nobody_early(*_, **__):
    """`begun_early` where workers run here."""
    return nullcontext()


def command(path: Path, sets=(), **options) -> Artifact:
    """Run the recipe's stage to its end in this process; raises what the command would have
    printed."""
    from llmpipe.front.asked import read_recipe
    from llmpipe.front.make import make

    originals = launch.start, launch.begun_early
    launch.start, launch.begun_early = start_here, nobody_early
    try:
        asked = read_recipe(yaml.safe_load(path.read_text())["stage"], path, None, list(sets))
        make(asked, **options)
        return Artifact(Path(asked.recipe.run) / asked.recipe.artifact)
    finally:
        launch.start, launch.begun_early = originals


def essence(artifact: Artifact) -> dict:
    """What must be bitwise equal: every file in model/, the samples, and the metrics less
    wall-clock figures."""
    files = {name: entry.sha256 for name, entry in table(artifact.model).items()}
    metrics = [
        json.loads(line) for line in (artifact.path / "metrics.jsonl").read_text().splitlines()
    ]
    for line in metrics:
        for name in WALL_CLOCK:
            line.pop(name, None)
    samples = artifact.path / "samples.jsonl"  # a reward model answers nothing
    return {
        "files": files,
        "metrics": metrics,
        "samples": samples.read_text() if samples.exists() else None,
    }


# --- forked trials --------------------------------------------------------------------------------
# -------------------

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.warm"])


def _trial(
    path: str,
    out: str,
    sets: tuple[str, ...],
    hook: str | None,
    rank: dict[str, str] | None = None,
    inexact: bool = False,
    fresh: bool = False,
) -> None:
    os.environ |= rank or {}
    sys.stdout = sys.stderr = os.fdopen(
        os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), "w", buffering=1
    )
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    if hook:
        import tests.hooks

        getattr(tests.hooks, hook)()
    try:
        command(Path(path), sets, inexact=inexact, fresh=fresh)
    except UserError as error:
        print(f"error: {error}")
        os._exit(error.code)
    except Stopped as stop:
        print(stop.message)
        os._exit(stop.code)
    if outside._peers.cache_info().currsize:
        outside._peers().leave(DONE, last=True)  # as at the exit of a process that was no fork
    os._exit(0)


def forked(target, *args):
    """`target(*args)` in a process that has the heavy libraries, and nothing that another test
    did to them."""
    process = _server.Process(target=target, args=args)
    process.start()
    return process


def ends(processes, seconds: float) -> list[int | None]:
    """Their exit codes, None of one that hangs, which is killed: nothing outlives its test."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


class Trial:
    """One command in a forked process; `kill`, `terminate` and `exitcode` are multiprocessing's."""

    def __init__(self, path: Path, sets=(), hook: str | None = None):
        self.out = path.with_suffix(".out")
        self.process = forked(_trial, str(path), str(self.out), tuple(sets), hook)

    def wait(self, seconds: float = 120) -> int:
        (code,) = ends([self.process], seconds)
        assert code is not None, "the trial hangs:\n" + self.text()
        return code

    def text(self) -> str:
        return self.out.read_text() if self.out.exists() else ""


def started(path: Path, sets=(), hooks=(None, None), inexact=False) -> list:
    """Two ranks of the recipe's stage, or as many as there are `hooks`, as torchrun would start
    them. llmpipe's own launching and accelerate's are tests of tests/front/test_processes.py."""
    size = str(len(hooks))
    world = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    world |= {"MASTER_PORT": str(launch.free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    outs = [path.with_suffix(f".{rank}.out") for rank in range(len(hooks))]
    processes = []
    for rank, hook in enumerate(hooks):
        environment = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = (str(path), str(outs[rank]), tuple(sets), hook, environment, inexact)
        processes.append(forked(_trial, *arguments))
    return processes


def started_apart(paths: list[Path], hooks=(None, None), each=1, fresh=False) -> list:
    """A rank of each recipe, or `each`, as on machines of their own: what differs is their run."""
    size = len(paths) * each
    world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(each), "MASTER_ADDR": "127.0.0.1"}
    world |= {"MASTER_PORT": str(launch.free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(size):
        machine, local = divmod(rank, each)
        numbers = {"RANK": rank, "GROUP_RANK": machine, "LOCAL_RANK": local}
        environment = world | {name: str(number) for name, number in numbers.items()}
        out = str(paths[machine].with_suffix(f".{rank}.out"))
        hook = hooks[rank] if rank < len(hooks) else None
        arguments = (str(paths[machine]), out, (), hook, environment, False, fresh)
        processes.append(forked(_trial, *arguments))
    return processes


def apart(paths: list[Path], hooks=(None, None), each=1, fresh=False) -> list[tuple[int, str]]:
    """(exit code, what was printed) of the ranks that `started_apart` starts."""
    processes = started_apart(paths, hooks, each, fresh)
    codes = ends(processes, 120)
    outs = [paths[r // each].with_suffix(f".{r}.out") for r in range(len(processes))]
    texts = [out.read_text() if out.exists() else "" for out in outs]
    assert None not in codes, "\n---\n".join(texts)
    return list(zip(codes, texts, strict=True))


def ranks(path: Path, sets=(), hooks=(None, None), inexact=False) -> list[tuple[int, str]]:
    """(exit code, what was printed) of the ranks that `started` starts."""
    outs = [path.with_suffix(f".{rank}.out") for rank in range(len(hooks))]
    processes = started(path, sets, hooks, inexact)
    codes = ends(processes, 120)
    texts = [out.read_text() if out.exists() else "" for out in outs]
    assert None not in codes, "\n".join(texts)
    return list(zip(codes, texts, strict=True))


def pair(path: Path, sets=()) -> Artifact:
    """The recipe's stage made by two ranks, and verified."""
    for code, text in ranks(path, sets):
        assert code == 0, f"exit code {code}:\n{text}"
    values = yaml.safe_load(path.read_text())
    artifact = Artifact(Path(values["run"]) / values.get("name", values["stage"]))
    assert artifact.verify().hardware["processes"] == 2
    return artifact


def pids_of(word: str, named: str = "") -> list[int]:
    """Of the processes that have a word in their environment, and `named` in their command line."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = word.encode() in (folder / "environ").read_bytes()
            if ours and named.encode() in (folder / "cmdline").read_bytes():
                pids.append(int(folder.name))
        except OSError:
            pass  # of somebody else, or gone
    return pids
