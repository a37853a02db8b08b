"""One artifact, from the command to the end: locks, plan, prepare, train, judge.

`Session.make` is the ordinary driver, which starts a process for each step that works. Where an
outside launcher started this very command several times, `llmpipe.front.outside` drives the same
steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

from llmpipe import screen
from llmpipe.errors import Say
from llmpipe.faults import writing
from llmpipe.front import launch
from llmpipe.front.worker import write_plan
from llmpipe.recipe.sections import Recipe
from llmpipe.run.artifact import Artifact, artifact_of
from llmpipe.run.lock import Lock
from llmpipe.run.machine import idle_gpus
from llmpipe.run.plan import Decision, decide, plan_of
from llmpipe.run.reference import parents_of
from llmpipe.stages import Judging, Stage, stage


@dataclass(frozen=True)
class Session:
    """What is asked for, and the steps towards it; a driver says in which order."""

    recipe: Recipe
    say: Say
    fresh: bool = False
    """Move an artifact that lies there aside and start anew."""
    inexact: bool = False
    """Resume although processes, micro-batch or threads changed."""
    debug: bool = False
    """Show the traceback of an error."""
    only_prepare: bool = False
    """End when the rows are prepared."""

    @property
    def artifact(self) -> Artifact:
        return artifact_of(self.recipe)

    @property
    def stage(self) -> Stage:
        return stage(self.recipe.stage)

    def make(self) -> None:
        """Raises what the command ends with: UserError or Stopped."""
        with self.locked(), self.early() as early:
            decision = self.plan()
            if decision.action != "skip":
                self.prepare(decision)
            if self.only_prepare:
                return
            if decision.action != "skip":
                self.start("train", early)
            self.judge()

    def early(self) -> AbstractContextManager[launch.Worker | None]:
        """The worker that is to train, where there will be work for it, as far as one can see."""
        if self.only_prepare or (self.artifact.finished and not self.fresh):
            return nullcontext()
        how = {"inexact": self.inexact, "debug": self.debug}
        return launch.begun_early(self.artifact, self.recipe, **how)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the artifact, and its parents shared. Raises UserError (75) where one is busy, and
        (5) where this or what is done meanwhile finds the run not to be written.

        A parent that is being made is busy; one that is read cannot be moved aside meanwhile.
        """
        parents = parents_of(self.recipe, self.artifact.run)
        with writing(self.artifact.path), ExitStack() as locks:
            locks.enter_context(Lock(self.artifact).acquire())
            for parent in parents:
                locks.enter_context(Lock(parent, shared=True).acquire())
            # a worker whose parent was killed may not have ended yet
            Lock(self.artifact, "write").acquire(wait=5).release()
            yield

    @screen.doing("verifying models, rows and what lies there")
    def plan(self) -> Decision:
        """Decide what there is to do, and say so; with `fresh` nothing lies there any more."""
        recipe, artifact, accepts = self.recipe, self.artifact, self.stage.ACCEPTS
        if self.fresh:
            plan = plan_of(recipe, artifact.run, accepts)  # refuse first
            if aside := artifact.move_aside():
                self.say(f"{artifact.path}: moved to {aside}")
            artifact.refuse_links()
            decision = Decision("run", "begun anew", plan)
        else:
            decision = decide(artifact, recipe, accepts, self.stage.PROGRESS)
        self.say(f"{artifact.path}: {decision.action}: {decision.why}")
        return decision

    def prepare(self, decision: Decision) -> None:
        """Write the plan down, make models readable that are not, and rows into tokens."""
        recipe, artifact = self.recipe, self.artifact
        if decision.action == "run":
            (artifact.path / "samples.jsonl").unlink(missing_ok=True)
        write_plan(artifact, recipe, decision.plan)
        if any(model.converts for model in decision.plan.models.values()):
            self.start("convert")
        self.start("prepare")

    def start(self, action: launch.Action, early: launch.Worker | None = None) -> None:
        """Run a worker to its end."""
        if action == "train" and (note := idle_gpus(self.recipe)):
            self.say(note)
        how = {"inexact": self.inexact, "debug": self.debug}
        launch.start(action, self.artifact, self.recipe, **how, early=early)

    def judge(self) -> None:
        """Hold what was made against the recipe's conditions, where the stage has such."""
        if isinstance(self.stage, Judging):
            self.stage.judge(self.recipe, self.artifact, self.say)
