"""The process boundary: who starts whom, how signals and exit codes cross it.

    llmpipe sft r.yaml                           the parent: plans, locks, starts the workers
      python -m llmpipe.front.worker prepare D   rows -> tokens, no torch, no process group
      python -m llmpipe.front.worker train D     one process, or accelerate with several of them

Launchers swallow exit codes, so a worker says how it ended in `outcome.json` and the parent ends
with that. A signal to the parent goes to the workers themselves, not to the launcher between, which
would kill them after 30 s. Workers die with their parent (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from llmpipe.errors import RESOURCES, SIGINT, SIGTERM, Stopped, UserError
from llmpipe.faults import of_limit, of_place
from llmpipe.front.launcher_log import Said
from llmpipe.recipe.sections import Recipe
from llmpipe.run.artifact import Artifact
from llmpipe.run.machine import for_memory, process_count, thread_count
from llmpipe.run.outcome import Outcome, listening
from llmpipe.run.signals import die_with_parent

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
    command += ["-m", "llmpipe.front.worker", action, str(artifact.path)]
    if inexact:
        command.append("--inexact")
    if debug:
        command.append("--debug")
    Outcome.clear(artifact)
    log = artifact.path / "log.txt"
    with listening() as ear:
        variables = environment(action, threads) | ear.environment
        end = run(command, variables, log, launched=processes > 1)
        outcome = Outcome.read(artifact) or ear.heard()
    if outcome is None and end.signals and end.status:
        # the worker had not come as far as noting how it ends
        raise Stopped(SIGINT if end.signals[0] == signal.SIGINT else SIGTERM, "stopped")
    finish(outcome, end.status, artifact, for_memory(action, recipe))


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
            "LLMPIPE_PARENT": str(os.getpid()),
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
class End:
    """How a process ended."""

    status: int
    signals: list[int]
    """What was sent to us meanwhile, and handed on."""


def run(command: list[str], environment: dict[str, str], log: Path, *, launched: bool) -> End:
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
            for pid in children(process.pid) if launched else [process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

        with handled_by(forward):
            status = process.wait()
    return End(status, signals)


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `handler` have SIGINT and SIGTERM for a while."""
    previous = {
        number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def children(launcher: int) -> list[int]:
    """Pids of what a launcher started; the launcher itself before it has started any."""
    try:
        pids = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    except OSError:
        return [launcher]
    return [int(pid) for pid in pids] or [launcher]


def finish(outcome: Outcome | None, status: int, artifact: Artifact, remedy: str) -> None:
    """Turn how a worker ended into an exception, or into nothing when it is done.

    `remedy`: what to do where it was killed for want of memory.
    """
    if outcome is not None:
        outcome.check()
    elif status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        problem = "the worker was killed (SIGKILL), most likely for want of memory"
        raise UserError(problem, remedy, RESOURCES)
    elif status:
        problem = f"the worker ended with status {status}"
        silenced = of_place(artifact.path, Path(tempfile.gettempdir())) or of_limit(remedy)
        hint = f"see {artifact.path / 'log.txt'}"
        raise silenced or UserError(problem, hint, code=1)
