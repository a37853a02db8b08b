"""A file into the run directory, and from there to the system."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from llmpipe.errors import RESOURCES, UserError
from llmpipe.files.writing import write_whole
from llmpipe.front.submit.job import Job, SystemName
from llmpipe.run.artifact import make_run

SENDS: dict[SystemName, tuple[list[str], str]] = {
    "slurm": (["sbatch"], "slurm.sh"),
    "sky": (["sky", "jobs", "launch", "--yes", "--detach-run"], "sky.yaml"),
    "kubeflow": (["kubectl", "create", "-f"], "kubeflow.yaml"),
    "docker": (["bash"], "docker.sh"),
}
"""What takes a file, and what the file is called in the run directory."""


def written_to(system: SystemName, job: Job) -> Path:
    """Where the file is kept that was submitted last."""
    return job.run / f"{job.name}.{SENDS[system][1]}"


def command_of(system: SystemName, job: Job) -> list[str]:
    """What hands the file to the system."""
    return [*SENDS[system][0], str(written_to(system, job))]


def send(system: SystemName, job: Job, text: str) -> None:
    """Keep the file, and submit it. Raises UserError where the system is not here, or refuses."""
    if system == "docker" and job.nodes > 1:
        problem = f"docker: starts on this machine alone, and this job has {job.nodes}"
        raise UserError(problem, "keep the file, and run it on each of them, as it says")
    make_run(job.run)
    write_whole(written_to(system, job), text.encode())
    command = command_of(system, job)
    try:
        done = subprocess.run(command, check=False)
    except FileNotFoundError:
        hint = f"the file is kept: {written_to(system, job)}"
        raise UserError(f"{command[0]} is not here", hint) from None
    if done.returncode and system == "docker":  # it is the run itself that has ended
        raise UserError("docker: the run did not come to its end", code=done.returncode)
    if done.returncode:
        problem = f"{os.path.basename(command[0])} ended with {done.returncode}"
        raise UserError(problem, f"nothing was submitted: {written_to(system, job)}", RESOURCES)
