"""A worker that is started before there is work for it, and imports the libraries meanwhile.

That takes seconds, in which the command verifies models and prepares rows. A byte through a pipe
tells it to begin. Where the command ends without one, the pipe closes, and the worker is gone: up
to then it has read nothing of the run, written nothing and locked nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

from llmpipe import noise
from llmpipe.recipe.sample import SampleRecipe
from llmpipe.recipe.sections import Recipe, Training
from llmpipe.run.signals import heed, hold, stopping

FLAG = "--early="


def libraries(recipe: Recipe) -> str:
    """A module that imports most of what a stage's `train` needs."""
    if isinstance(recipe, Training):
        return "llmpipe.training.conclude"
    if isinstance(recipe, SampleRecipe):
        return "llmpipe.rl.sample"
    return "llmpipe.evaluation.candidate"


@dataclass
class Work:
    """What a worker waits for, as the command has it."""

    module: str
    """What it imports meanwhile."""
    descriptor: int
    """The end of a pipe that the worker reads."""
    _ours: int

    @property
    def flag(self) -> str:
        """The worker's argument."""
        return f"{FLAG}{self.descriptor}:{self.module}"

    def begin(self) -> None:
        """Tell the worker, which may have ended: its end of the pipe is open here as well."""
        os.write(self._ours, b"\n")


@contextmanager
def coming(module: str) -> Iterator[Work]:
    """Work for a worker that imports `module` until it is there."""
    theirs, ours = os.pipe()
    try:
        yield Work(module, theirs, ours)
    finally:
        os.close(theirs)
        os.close(ours)


def wait_for_work(arguments: list[str]) -> list[str]:
    """For a worker: import what its flag says, and wait; returns the other arguments.

    What stops a run ends it at once meanwhile: there is nothing to be finished, and imports take
    long. From then on it waits until `heed`, as in every worker.

    Where the import fails, this process begins anew without the flag: a library that was imported
    by half says other things of itself the second time.
    """
    flag = next((argument for argument in arguments if argument.startswith(FLAG)), None)
    if flag is None:
        return arguments
    descriptor, _, module = flag.removeprefix(FLAG).partition(":")
    for number in stopping():
        signal.signal(number, signal.SIG_DFL)
    heed()
    imported = _imported(module)
    if not os.read(int(descriptor), 1):
        os._exit(0)
    hold()
    os.close(int(descriptor))
    if not imported:
        anew = [argument for argument in sys.orig_argv if argument != flag]
        os.execv(sys.executable, anew)
    return [argument for argument in arguments if argument != flag]


def _imported(module: str) -> bool:
    """Whether an import went well; what failed is met again, and said, by the process anew."""
    try:
        noise.silence()
        import_module(module)
    except Exception:
        return False
    return True
