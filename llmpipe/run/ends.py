"""How each of several processes ended, a file each; the first failure speaks for all.

One that loses another says so, in words of gloo's or NCCL's, and one that a launcher stops for
another's sake ends as if a person had stopped it: neither is why a run failed. A process that was
killed says nothing; what is known of it is what its launcher prints.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmpipe.errors import DONE, RESOURCES, UserError
from llmpipe.faults import GO_ON
from llmpipe.files.json import read_json, write_json
from llmpipe.run.artifact import Artifact
from llmpipe.run.machine import on_several_machines
from llmpipe.run.outcome import Outcome, say_to_command

FAILURE = re.compile(r"^\s*rank\s*: (\d+) \(local_rank.*\n\s*exitcode\s*: (-?\d+)", re.MULTILINE)
"""Of torchrun's report of the processes that failed before it ended the others."""


@dataclass(frozen=True)
class End:
    """How one process ended."""

    rank: int
    at: float
    """When, in seconds of a clock that all processes share."""
    outcome: Outcome


def write_end(artifact: Artifact, launch: str, rank: int, outcome: Outcome) -> dict[str, object]:
    """Say how this process ended, of those that `launch` started; what was written."""
    # the time of day may be set meanwhile, and is all that several machines share
    at = time.time() if on_several_machines() else time.monotonic()
    values: dict[str, object] = {"launch": launch, "rank": rank, "at": at, **outcome.values()}
    try:
        write_json(_path(artifact, rank), values)
    except OSError:
        say_to_command(values)
    return values


def read_ends(
    artifact: Artifact, launch: str, processes: int, said: Iterable[object] = ()
) -> list[End]:
    """How the processes of a launch ended, as far as they have written that, or `said` it."""
    written = [read_json(_path(artifact, rank)) for rank in range(processes)]
    ends = []
    for values in (*written, *said):
        outcome = Outcome.of_values(values)
        if outcome and isinstance(values, dict) and values.get("launch") == launch:
            ends.append(End(int(values["rank"]), float(values["at"]), outcome))
    return ends


def clear_ends(artifact: Artifact, processes: int) -> None:
    for rank in range(processes):
        _path(artifact, rank).unlink(missing_ok=True)


def reported(log: str) -> dict[int, int]:
    """Statuses of ranks that failed, by torchrun's report; of one that a signal ended, minus it."""
    return {int(rank): int(status) for rank, status in FAILURE.findall(log)}


def verdict(
    ends: Sequence[End], statuses: Mapping[int, int], *, remedy: str = "", stopped: bool = False
) -> Outcome | None:
    """How all of them ended: the first failure, or None where nobody knows.

    `statuses`: see `reported`; `remedy`: what to do where one was killed for want of memory;
    `stopped`: whether a person stopped them. What rank 0 finished is done, whatever happens to
    others afterwards.
    """
    by_time = sorted(ends, key=lambda end: end.at)
    if any(end.rank == 0 and end.outcome.code == DONE for end in ends):
        return Outcome(DONE)
    failed = [end.outcome for end in by_time if end.outcome.code != DONE]
    stops = [outcome for outcome in failed if outcome.was_stopped]
    told = [outcome for outcome in failed if outcome.kind == "told" and not outcome.was_stopped]
    silent = set(statuses) - {end.rank for end in ends}
    deaths = [
        Outcome.of(death(f"rank {rank}", statuses[rank], remedy))
        for rank in sorted(silent, key=lambda rank: (statuses[rank] != -signal.SIGKILL, rank))
        if statuses[rank] != -signal.SIGTERM
    ]
    bugs = [outcome for outcome in failed if outcome.kind == "bug"]
    lost = [outcome for outcome in failed if outcome.kind == "peer"]
    order = [told, stops, deaths] if stopped else [told, deaths]
    return next((outcome for kind in (*order, bugs, lost, stops) for outcome in kind), None)


def death(who: str, status: int, remedy: str) -> UserError:
    """What to say of a process that ended without a word, with a status as `Popen` has it."""
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        problem = f"{who} was killed (SIGKILL), most likely for want of memory"
        return UserError(problem, remedy, RESOURCES)
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"{-status}"
        return UserError(f"{who} died of signal {name}", GO_ON, code=1)
    return UserError(f"{who} ended with status {status}", "see log.txt", code=status)


def _path(artifact: Artifact, rank: int) -> Path:
    return artifact.run / ".locks" / f"{artifact.name}.{rank}.end"
