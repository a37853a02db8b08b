"""The process boundary: who starts whom, how signals and exit codes cross it.

    llmpipe sft r.yaml                           the parent: plans, locks, starts the workers
      python -m llmpipe.front.start_worker prepare D   rows -> tokens, no torch, no process group
      python -m llmpipe.front.start_worker train D     one process, or accelerate with several

The one that trains is started first, and imports its libraries until there is work for it
(`early`).

Launchers swallow exit codes, so a worker says how it ended in `outcome.json` and the parent ends
with that; of several workers with the first that failed. A signal to the parent goes to the workers
themselves, not to the launcher between, which would kill them after 30 s. Ctrl-Z stops them all.
Workers die with their parent (`llmpipe.ties`).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from llmpipe import screen
from llmpipe.errors import Stopped, UserError
from llmpipe.faults import of_limit, of_place
from llmpipe.front.early import Work, coming, libraries
from llmpipe.front.launcher_log import Said
from llmpipe.recipe.sections import Recipe
from llmpipe.run.artifact import Artifact
from llmpipe.run.ends import clear_ends, death, read_ends, reported, verdict
from llmpipe.run.machine import (
    IN_RUN,
    for_memory,
    on_several_machines,
    process_count,
    thread_count,
)
from llmpipe.run.outcome import BEGUN, ENDING, LAUNCH, Ear, Outcome, listening, new_launch
from llmpipe.run.signals import code_of, hold, stopping
from llmpipe.ties import PARENT, children, descendants, die_with_parent

PAUSE = 0.05
"""Seconds between two looks at whether a worker has begun."""

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
    action: Action,
    artifact: Artifact,
    recipe: Recipe,
    *,
    inexact: bool,
    debug: bool,
    early: Worker | None = None,
) -> None:
    """Run one worker action to its end. Raises what it ended with: UserError or Stopped.

    `early`: one that waits for this action, see `begun_early`; where it has ended, another one is
    started, unless somebody stopped it.
    """
    Outcome.clear(artifact)
    status = early.process.poll() if early else None
    refuse_stopped(status or 0, [])
    waits = early is not None and status is None
    ready = nullcontext(early) if waits else begun(action, artifact, recipe, inexact, debug)
    with ready as worker:
        assert worker is not None
        end = run(worker)
        remedy = for_memory(action, recipe)
        if worker.processes > 1:
            outcome = first_failure(artifact, worker, end, remedy)
        else:
            outcome = Outcome.read(artifact, worker.launch) or worker.ear.heard()
    if outcome is None:
        # the worker may not have come as far as noting how it ends
        refuse_stopped(end.status, end.signals)
    finish(outcome, end.status, artifact, remedy)
    if end.signals:
        # it was done already, but what would follow is not
        raise Stopped(code_of(end.signals[0]), "stopped")


@dataclass(frozen=True)
class Worker:
    """A worker that was started, or a launcher with several."""

    process: subprocess.Popen[bytes]
    launch: str
    """The word by which its outcome is known."""
    processes: int
    ear: Ear
    errors: Said | None
    """Where a launcher's standard error goes: it prints a traceback for every worker that fails."""
    work: Work | None = None
    """What one waits for that was begun early."""


@contextmanager
def begun(
    action: Action,
    artifact: Artifact,
    recipe: Recipe,
    inexact: bool,
    debug: bool,
    work: Work | None = None,
) -> Iterator[Worker]:
    """Start a worker; one that has not ended by then is killed."""
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
    if work:
        command.append(work.flag)
    launch, parent = new_launch(), os.getpid()
    errors = Said(artifact) if processes > 1 else None

    def begin() -> None:
        die_with_parent(parent)
        if processes == 1:  # a launcher and its workers hold nothing back
            hold()

    with listening() as ear:
        process = subprocess.Popen(
            command,
            env=environment(action, threads) | ear.environment | {LAUNCH: launch},
            stderr=errors.fileno() if errors else None,
            process_group=0,
            preexec_fn=begin,
            pass_fds=[work.descriptor] if work else (),
        )
        try:
            if errors:
                errors.begin()
            yield Worker(process, launch, processes, ear, errors, work)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


@contextmanager
def begun_early(
    artifact: Artifact, recipe: Recipe, *, inexact: bool, debug: bool
) -> Iterator[Worker | None]:
    """Start the worker that is to train while it has no work yet: it imports the libraries.

    None where a launcher is to start several, or this machine takes no process more.
    """
    if process_count(recipe) > 1:
        yield None
        return
    with paused_with_us(), ExitStack() as stack:
        try:
            work = stack.enter_context(coming(libraries(recipe)))
            train = begun("train", artifact, recipe, inexact, debug, work)
            worker: Worker | None = stack.enter_context(train)
        except (OSError, subprocess.SubprocessError):
            worker = None  # whether it is in the way of the work will be seen
        yield worker


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
        | ({IN_RUN: "1"} if on_several_machines() else {})
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
        # torch's warnings in C++, which show its stack where another process has gone
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }


@dataclass(frozen=True)
class Exit:
    """How a process ended."""

    status: int
    signals: list[int]
    """What was sent to us meanwhile, and handed on."""
    log: str
    """What a launcher said on standard error."""


def first_failure(artifact: Artifact, worker: Worker, end: Exit, remedy: str) -> Outcome | None:
    """How several workers ended, which becomes outcome.json; None where nobody knows."""
    ends = read_ends(artifact, worker.launch, worker.processes, worker.ear.said())
    outcome = verdict(ends, reported(end.log), remedy=remedy, stopped=bool(end.signals))
    if outcome:
        outcome.deliver(artifact, worker.launch)
    clear_ends(artifact, worker.processes)
    return outcome


def run(worker: Worker) -> Exit:
    """Let a worker do its work, and hand on to it, or to all of a launcher's, what signals us."""
    pid = worker.process.pid
    signals: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        signals.append(number)
        # the launcher itself before it has started any
        workers = children(pid) if worker.processes > 1 else []
        send(number, workers or [pid])

    with worker.errors or nullcontext(), handled_by(forward, stopping()), paused_with_us():
        if worker.work:
            worker.work.begin()
        if screen.is_shown():
            speak_for(worker)
        status = worker.process.wait()
    return Exit(status, signals, worker.errors.text if worker.errors else "")


def speak_for(worker: Worker) -> None:
    """Show on a terminal what a worker is at before it speaks for itself, and when it has ended."""

    def wait_for(what: dict[str, object]) -> None:
        while worker.process.poll() is None and not worker.ear.has_heard(what):
            time.sleep(PAUSE)

    count = f" in {worker.processes} processes" if worker.processes > 1 else ""
    with screen.doing(f"importing the libraries{count}"):
        wait_for(BEGUN)
    wait_for(ENDING)
    with screen.doing("closing what was open"):
        worker.process.wait()


@contextmanager
def paused_with_us() -> Iterator[None]:
    """Let Ctrl-Z stop all processes below this one as well, and what continues us continue them."""

    def pause(number: int, _: FrameType | None) -> None:
        tree = descendants(os.getpid())
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
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@contextmanager
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


def refuse_stopped(status: int, signals: list[int]) -> None:
    """Raise Stopped where a worker failed for what was sent to us, or to itself.

    `status`: what it ended with, the negative number of a signal that it did not serve.
    """
    number = signals[0] if signals else -status
    if status and number in stopping():
        raise Stopped(code_of(number), "stopped")


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
