"""The process boundary: who starts whom, how signals and exit codes cross it.

    llmpipe sft r.yaml                           the parent: plans, locks, starts the workers
      python -m llmpipe.front.start_worker prepare D   rows -> tokens, no torch, no process group
      python -m llmpipe.front.start_worker train D     one process, or accelerate with several

Launchers swallow exit codes, so a worker says how it ended in `outcome.json` and the parent ends
with that; of several workers with the first that failed. A signal to the parent goes to the workers
themselves, not to the launcher between, which would kill them after 30 s. Ctrl-Z stops them all.
Workers die with their parent (`llmpipe.ties`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from llmpipe.errors import Stopped, UserError
from llmpipe.faults import of_limit, of_place
from llmpipe.front.launcher_log import Said
from llmpipe.recipe.sections import Recipe
from llmpipe.run.artifact import Artifact
from llmpipe.run.ends import clear_ends, death, read_ends, reported, verdict
from llmpipe.run.machine import for_memory, process_count, thread_count
from llmpipe.run.outcome import LAUNCH, Ear, Outcome, listening, new_launch
from llmpipe.run.signals import code_of, stopping
from llmpipe.ties import PARENT, children, descendants, die_with_parent

Action = Literal["convert", "prepare", "train"]

# what a launcher further up has set is not for the workers
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def start(
    action: Action, artifact: Artifact, recipe: Recipe, *, inexact: bool, debug: bool
) -> None:
    """Run one worker action to its end. Raises what it ended with: UserError or Stopped."""
    processes = process_count(recipe) if action == "train" else 1
    threads = thread_count(recipe.launch, processes)
    command = [sys.executable]
    if processes > 1:
        command += launcher(processes, threads)
    command += ["-m", "llmpipe.front.start_worker", action, str(artifact.path)]
    if inexact:
        command.append("--inexact")
    if debug:
        command.append("--debug")
    Outcome.clear(artifact)
    launch = new_launch()
    log = artifact.path / "log.txt"
    remedy = for_memory(action, recipe)
    with listening() as ear:
        variables = environment(action, threads) | ear.environment | {LAUNCH: launch}
        end = run(command, variables, log, launched=processes > 1)
        if processes > 1:
            outcome = first_failure(artifact, launch, processes, ear, end, remedy)
        else:
            outcome = Outcome.read(artifact, launch) or ear.heard()
    if outcome is None and end.signals and end.status:
        # the worker had not come as far as noting how it ends
        raise Stopped(code_of(end.signals[0]), "stopped")
    finish(outcome, end.status, artifact, remedy)


def launcher(processes: int, threads: int) -> list[str]:
    """Arguments of Python that start several processes of what follows."""
    return [
        *("-m", "accelerate.commands.launch"),
        "--multi_gpu",
        *("--num_processes", str(processes)),
        *("--num_machines", "1"),
        *("--mixed_precision", "no"),
        *("--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", str(threads)),
        *("--main_process_port", str(free_port())),
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        _, port = probe.getsockname()
        return int(port)


def environment(action: Action, threads: int) -> dict[str, str]:
    """Environment of a worker: our own but for a launcher's, fixed threads, silent libraries."""
    ours = {name: text for name, text in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return (
        ours
        | library_environment(action)
        | {
            "OMP_NUM_THREADS": str(threads),
            PARENT: str(os.getpid()),
        }
    )


def library_environment(action: Action) -> dict[str, str]:
    """Libraries that report nothing to anybody."""
    return {
        # a thread that waits sleeps: spinning gains nothing alone, and costs a multiple where cores
        # are shared
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        # the libraries' bars for every file read and written; `prepare` has one of its own
        "TQDM_DISABLE": "" if action == "prepare" else "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # no native code of the Hub, see `llmpipe.front`
        "USE_HUB_KERNELS": "0",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }


@dataclass(frozen=True)
class Exit:
    """How a process ended."""

    status: int
    signals: list[int]
    """What was sent to us meanwhile, and handed on."""
    log: str
    """What a launcher said on standard error."""


def first_failure(
    artifact: Artifact, launch: str, processes: int, ear: Ear, end: Exit, remedy: str
) -> Outcome | None:
    """How several workers ended, which becomes outcome.json; None where nobody knows."""
    ends = read_ends(artifact, launch, processes, ear.said())
    outcome = verdict(ends, reported(end.log), remedy=remedy, stopped=bool(end.signals))
    if outcome:
        outcome.deliver(artifact, launch)
    clear_ends(artifact, processes)
    return outcome


def run(command: list[str], environment: dict[str, str], log: Path, *, launched: bool) -> Exit:
    """Run a worker, or a launcher with several, and hand on to the workers what signals us."""
    parent = os.getpid()
    signals: list[int] = []
    # a launcher prints a traceback of its own for every worker that fails
    with Said(Artifact(log.parent)) if launched else contextlib.nullcontext() as errors:
        process = subprocess.Popen(
            command,
            env=environment,
            stderr=errors.fileno() if errors else None,
            process_group=0,
            preexec_fn=lambda: die_with_parent(parent),
        )
        if errors:
            errors.begin()

        def forward(number: int, _: FrameType | None) -> None:
            signals.append(number)
            # the launcher itself before it has started any
            workers = children(process.pid) if launched else []
            send(number, workers or [process.pid])

        with handled_by(forward, stopping()), paused_with_us(process.pid):
            status = process.wait()
    return Exit(status, signals, errors.text if errors else "")


@contextlib.contextmanager
def paused_with_us(pid: int) -> Iterator[None]:
    """Let Ctrl-Z stop a process and all below it as well, and what continues us continue them."""

    def pause(number: int, _: FrameType | None) -> None:
        tree = [pid, *descendants(pid)]
        # in sessions of their own they would ignore what a terminal sends
        send(signal.SIGSTOP, tree)
        os.kill(os.getpid(), signal.SIGSTOP)
        send(signal.SIGCONT, tree)

    heeded = signal.getsignal(signal.SIGTSTP) != signal.SIG_IGN
    with handled_by(pause, [signal.SIGTSTP] if heeded else []):
        yield


def send(number: int, pids: Iterable[int]) -> None:
    """Send a signal to processes, of which some may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@contextlib.contextmanager
def handled_by(
    handler: Callable[[int, FrameType | None], None], numbers: Iterable[int]
) -> Iterator[None]:
    """Let `handler` have signals for a while."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def finish(outcome: Outcome | None, status: int, artifact: Artifact, remedy: str) -> None:
    """Turn how a worker ended into an exception, or into nothing when it is done.

    `remedy`: what to do where it was killed for want of memory.
    """
    if outcome is not None:
        outcome.check()
    elif status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        raise death("the worker", status, remedy)
    elif status:
        problem = f"the worker ended with status {status}"
        silenced = of_place(artifact.path, Path(tempfile.gettempdir())) or of_limit(remedy)
        hint = f"see {artifact.path / 'log.txt'}"
        raise silenced or UserError(problem, hint, code=1)
