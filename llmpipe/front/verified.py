"""What a run keeps is verified before it is trained or measured with: once on each machine.

One process of each machine hashes it, beside the import of the large libraries; the others wait for
its verdict in a file, since a collective would time out where there is much to read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmpipe.data.prepared import PreparedFolder
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.record import Record
from llmpipe.run.job import Job
from llmpipe.run.machine import local_rank, machine_rank, rank
from llmpipe.run.outcome import this_launch
from llmpipe.run.plan import Plan
from llmpipe.run.reference import Model, model_folder
from llmpipe.run.whereabouts import cache
from llmpipe.sums import Kept, Verification

PAUSE = 0.05


class Verdict(Record):
    """What the process that verifies tells the others of its machine."""

    launch: str
    """Of which launch it is."""
    problem: str | None = None
    hint: str | None = None


def verifying(job: Job[Any], prepared: PreparedFolder) -> Callable[[], None]:
    """Begin to verify what `job` keeps and `prepared` names; what is returned waits for the end,
    and raises UserError (3) where something is not as it was made.
    """
    path = job.artifact.run / ".locks" / f"{job.artifact.name}.{machine_rank()}.verdict"
    if local_rank() > 0:
        return lambda: _wait(path)
    verification = Verification([*prepared.kept(job.prepared), *converted(job.plan, job.prepared)])
    verification.start()

    def finish() -> None:
        try:
            verification.finish()
            if rank() == 0:
                job.plan.refuse_changed_models()
            prepared.refuse_another(job.prepared)
        except UserError as error:
            _tell(path, Verdict(launch=this_launch(), problem=error.message, hint=error.hint))
            raise
        _tell(path, Verdict(launch=this_launch()))

    return finish


def converted(plan: Plan, home: Path) -> Iterator[Kept]:
    """The folders of models that were made readable for this run, in its `home`, or for all."""
    model: Model | None
    for model in plan.models.values():
        while model:
            if model.kind in ("gguf", "merged"):
                folder = model_folder(model, home)
                yield Kept(folder, in_cache=folder.is_relative_to(cache()))
            model = model.base if model.is_adapter else None


def _tell(path: Path, verdict: Verdict) -> None:
    if "LOCAL_RANK" in os.environ:
        verdict.to_file(path)


def _wait(path: Path) -> None:
    while True:
        verdict = Verdict.if_readable(path)
        if verdict and verdict.launch == this_launch():
            break
        time.sleep(PAUSE)
    if verdict.problem:
        raise UserError(verdict.problem, verdict.hint, INTEGRITY)
