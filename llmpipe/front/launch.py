"""The process boundary: who starts whom, how signals and exit codes cross it.

    llmpipe sft r.yaml                     the parent: plans, holds the lock, starts one worker after the other
      python -m llmpipe.front.worker prepare D   rows -> tokens, no torch, no process group
      python -m llmpipe.front.worker train D     one process, or accelerate with several of them

Launchers swallow exit codes, so a worker says how it ended in `outcome.json` and the parent ends with that. A signal to
the parent goes to the workers themselves, not to the launcher between, which would kill them after 30 s. Workers die
with their parent (PR_SET_PDEATHSIG). Under an outside launcher every process is the command: rank 0 does the parent's
work and the others wait for its word in a file, never in a collective, which would time out.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from llmpipe.errors import RESOURCES, SIGINT, SIGTERM, Stopped, UserError
from llmpipe.files import read_json, write_json
from llmpipe.recipe.sections import Recipe
from llmpipe.run.artifact import Artifact
from llmpipe.run.machine import process_count, thread_count
from llmpipe.run.signals import die_with_parent

_LAUNCHER = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT".split()


def start(action: str, artifact: Artifact, recipe: Recipe, *, inexact: bool, debug: bool) -> None:
    """Run one worker action to its end. Raises what it ended with: UserError or Stopped."""
    processes = process_count(recipe.launch) if action == "train" else 1
    threads = thread_count(recipe.launch, processes)
    command = [sys.executable]
    if processes > 1:
        command += [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            str(processes),
        ]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += [
            "--num_cpu_threads_per_process",
            str(threads),
            "--main_process_port",
            str(free_port()),
        ]
    command += ["-m", "llmpipe.front.worker", action, str(artifact.path)]
    command += ["--inexact"] * inexact + ["--debug"] * debug
    environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER} | environment_for(
        action, threads
    )
    environment["LLMPIPE_PARENT"] = str(os.getpid())
    outcome_path = artifact.path / "outcome.json"
    outcome_path.unlink(missing_ok=True)

    log = (artifact.path / "log.txt").open("ab") if processes > 1 else None
    parent = os.getpid()
    worker = subprocess.Popen(
        command,
        env=environment,
        stderr=log,  # a launcher prints a traceback of its own for every worker that fails
        process_group=0,
        preexec_fn=lambda: die_with_parent(parent),
    )

    told: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        told.append(number)
        for pid in ranks(worker.pid) if processes > 1 else [worker.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    previous = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = worker.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if log:
            log.close()
    outcome = read_json(outcome_path)
    if outcome is None and told and status:  # the worker had not come as far as noting how it ends
        raise Stopped(SIGINT if told[0] == signal.SIGINT else SIGTERM, "stopped")
    finish(outcome, status, artifact)


def ranks(launcher: int) -> list[int]:
    """Pids of the processes that a launcher started; the launcher itself before it has started any."""
    try:
        return [
            int(p) for p in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        ] or [launcher]
    except OSError:
        return [launcher]


def finish(outcome: dict | None, status: int, artifact: Artifact) -> None:
    """Turn a worker's outcome into an exception, or nothing when it is done."""
    if outcome is not None:
        if outcome["code"] in (SIGINT, SIGTERM):
            raise Stopped(outcome["code"], outcome["message"])
        if outcome["code"]:
            raise UserError(outcome["message"], outcome.get("hint"), outcome["code"])
        return
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        raise UserError(
            "the worker was killed (SIGKILL), most likely for want of memory",
            "lower launch.micro_batch_size or data.max_length; the same command goes on from the last checkpoint",
            RESOURCES,
        )
    if status:
        raise UserError(
            f"the worker ended with status {status}", f"see {artifact.path / 'log.txt'}", code=1
        )


def environment_for(action: str, threads: int) -> dict[str, str]:
    """Environment of a worker: fixed threads, and libraries that report nothing to anybody."""
    return {
        "OMP_NUM_THREADS": str(threads),
        # a thread that waits sleeps: spinning gains nothing alone and costs a multiple where cores are shared
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        # the libraries' bars for every file read and written; `prepare` has one of its own
        "TQDM_DISABLE": "" if action == "prepare" else "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def give_word(artifact: Artifact, action: str) -> None:
    """Rank 0 tells the other ranks of this launch what it decided."""
    path = artifact.run / ".locks" / f"{artifact.name}.word"
    word = {
        "action": action,
        "host": socket.gethostname(),
        "parent": parent_id(),
        "time": time.time(),
    }
    write_json(path, word)


def parent_id() -> str:
    """Pid and start time of the launcher: of no other process until the machine is started anew."""
    pid = os.getppid()
    try:
        return f"{pid} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except OSError:
        return str(pid)


def wait_for_word(artifact: Artifact, sleep: Callable[[float], None] = time.sleep) -> str:
    """Wait for rank 0's decision: its word is of this launch when it shares our parent, or is younger than we are."""
    path = artifact.run / ".locks" / f"{artifact.name}.word"
    begun = time.time() - 60  # clocks of two machines may differ by this much
    while True:
        word: Any = read_json(path)
        if word and word["host"] == socket.gethostname() and word["parent"] == parent_id():
            return word["action"]
        if word and word["host"] != socket.gethostname() and word["time"] > begun:
            return word["action"]
        sleep(0.2)
