"""Tasks that srun started, as processes of a launch; the front door reads it before all else."""

from __future__ import annotations

import os
import re

SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "GROUP_RANK": "SLURM_NODEID",
}
"""What srun calls what torchrun tells its processes."""


def under_srun() -> None:
    """Take several tasks that srun started for processes, as if torchrun had started them.

    A batch script without srun is one process, whatever the job has; so is a step of one task.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ or int(tasks) < 2:
        return
    given = {ours: os.environ[theirs] for ours, theirs in SLURM.items()}
    given["LOCAL_WORLD_SIZE"] = _tasks_on(
        int(given["GROUP_RANK"]), os.environ["SLURM_STEP_TASKS_PER_NODE"]
    )
    os.environ |= given
    os.environ.setdefault("MASTER_ADDR", _first_of(os.environ["SLURM_STEP_NODELIST"]))
    step = int(os.environ["SLURM_JOB_ID"]) * 31 + int(os.environ["SLURM_STEP_ID"])
    os.environ.setdefault("MASTER_PORT", str(20_000 + step % 10_000))


def _tasks_on(node: int, tasks: str) -> str:
    """Tasks on the nth node of `8(x2),4`."""
    counts: list[str] = []
    for part in tasks.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [count] * int(times or 1)
    return counts[node]


def _first_of(nodes: str) -> str:
    """The first host of a list as Slurm writes it, `gpu[07-09,12],login`: gpu07."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes).split(",")[0]
