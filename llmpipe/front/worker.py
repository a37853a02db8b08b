"""What `llmpipe.front.launch` starts, by way of `llmpipe.front.start_worker ACTION FOLDER`.

ACTION is `convert` (a GGUF file -> safetensors), `prepare` (rows -> tokens) or `train`; FOLDER
holds the recipe and the plan. However it ends, outcome.json says so; a user's mistake prints
nothing here, the parent prints it once.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from llmpipe import noise, screen
from llmpipe.data.prepared import RECORD
from llmpipe.errors import DONE, INTEGRITY, Say, Stopped, UserError
from llmpipe.faults import a_bug, of_machine, of_peer, remembering
from llmpipe.files.writing import to_write, write_whole
from llmpipe.front.readable import make_readable
from llmpipe.front.terminal import open_terminal
from llmpipe.front.verified import verifying
from llmpipe.recipe.check import validate
from llmpipe.recipe.places import portable_paths, with_values
from llmpipe.recipe.sections import Recipe, Training, is_local
from llmpipe.recipe.yaml import dump, parse
from llmpipe.run.artifact import Artifact
from llmpipe.run.context import check_lengths
from llmpipe.run.ends import write_end
from llmpipe.run.job import Job
from llmpipe.run.lock import Lock
from llmpipe.run.machine import IN_RUN, for_memory, rank
from llmpipe.run.machine_paths import MachinePaths
from llmpipe.run.manifest import Manifest
from llmpipe.run.outcome import BEGUN, ENDING, Outcome, say_to_command, this_launch
from llmpipe.run.plan import Plan, refuse_changed
from llmpipe.run.provenance import describe
from llmpipe.run.reference import model_folder
from llmpipe.run.signals import Signals, heed
from llmpipe.run.whereabouts import note
from llmpipe.stages import prepared_by, schema, stage

DOING = {
    "convert": "making models readable",
    "prepare": "preparing rows",
    "train": "importing the libraries, verifying what was prepared",
}
"""What a terminal shows of an action, until it says more."""


def main(arguments: list[str]) -> int:
    open_terminal()
    signals = Signals().install()
    action, folder, *flags = arguments
    artifact = Artifact(Path(folder))

    def work() -> None:
        heed()
        act(action, artifact, signals, inexact="--inexact" in flags)

    outcome = end_of(work, artifact, "--debug" in flags)
    signals.deferred = True  # what comes now changes nothing
    launch = this_launch()
    if "RANK" in os.environ:  # one of several: the command decides who speaks for all
        write_end(artifact, launch, rank(), as_kept(outcome, artifact))
    else:
        as_kept(outcome, artifact).deliver(artifact, launch)
    if rank() == 0:
        say_to_command(ENDING)
    return outcome.code


def as_kept(outcome: Outcome, artifact: Artifact) -> Outcome:
    """An outcome without this machine's paths; as it is where nobody can read which there are."""
    try:
        paths = MachinePaths.of(artifact)
    except OSError:
        return outcome
    hint = outcome.hint and paths.kept(outcome.hint)
    return replace(outcome, message=paths.kept(outcome.message), hint=hint)


def end_of(work: Callable[[], None], artifact: Artifact, debug: bool) -> Outcome:
    """Run `work`, and say how it ended; a bug's traceback is printed, and kept in the log."""
    try:
        work()
    except Stopped as stop:
        return Outcome(code=stop.code, message=stop.message)
    except UserError as error:
        if debug:
            traceback.print_exc()
        return Outcome.of(error)
    except Exception as error:
        lost = of_peer(error)
        fault = lost or of_machine(error, artifact.path)
        if debug or not fault:
            traceback.print_exc()
        if lost or not fault:
            text = MachinePaths.of(artifact).kept(traceback.format_exc())
            path = artifact.path / "log.txt"
            with suppress(OSError, UserError), to_write(path, "a", errors="replace") as log:
                log.write(text)
        return Outcome.of(fault or a_bug(error), "peer" if lost else "told" if fault else "bug")
    return Outcome(code=DONE)


def act(action: str, artifact: Artifact, signals: Signals, *, inexact: bool = False) -> None:
    if rank() == 0:
        say_to_command(BEGUN)
    with screen.doing(DOING[action]):
        job = open_job(artifact, signals, inexact=inexact)
        actions = {"convert": convert, "prepare": prepare, "train": train}
        with remembering(for_memory(action, job.recipe)):
            actions[action](job)


def write_plan(artifact: Artifact, recipe: Recipe, plan: Plan) -> None:
    """Leave what `open_job` reads: the resolved recipe and the plan, no path of it in full."""
    artifact.path.mkdir(parents=True, exist_ok=True)
    held = portable_paths(recipe)
    held["run"] = f"runs/{artifact.run.name}" if os.path.isabs(recipe.run) else recipe.run
    text = dump(with_values(recipe.model_dump(by_alias=True), held))
    write_whole(artifact.path / "recipe.yaml", text.encode())
    plan.write(artifact.path)
    for model in (each for start in plan.models.values() for each in start.chain):
        if model.place and is_local(model.reference):
            note(model.identity, model.place)


def open_job(artifact: Artifact, signals: Signals, *, inexact: bool = False) -> Job[Recipe]:
    """The job that a folder holds: its resolved recipe and its plan."""
    path = artifact.path / "recipe.yaml"
    plan = Plan.read(artifact.path)
    text = path.read_bytes()  # once: what is hashed is what is read
    if plan is None or sha256(text).hexdigest() != plan.recipe_file:
        problem = f"{path}: is not the one that this command wrote"
        raise UserError(problem, "run the same command again: it is written anew", INTEGRITY)
    values, where = parse(text.decode(), str(path))
    values = with_values(values, plan.places)
    recipe = validate(values, where, schema(values["stage"]), str(path))
    refuse_changed(recipe, plan.asked)
    if rank() == 0:  # on another machine a copy may have times of its own
        plan.refuse_changed_models()
    converted = artifact.run / ".prepared"
    folders: dict[str, Path] = {}
    bases: dict[str, Path] = {}
    for at, model in plan.models.items():
        folders[at] = model_folder(model, converted, needs_weights(at))
        if model.base and model.is_adapter:
            bases[at] = model_folder(model.base, converted)
    for folder in (*folders.values(), *bases.values()):
        if rank() and not folder.is_dir():
            problem = f"{folder}: is not on the machine of rank {rank()}"
            raise UserError(problem, "models have to lie in one place on all machines (HF_HOME)")
    say = teller(artifact)
    return Job(artifact, recipe, folders, bases, plan, say, signals, inexact)


def teller(artifact: Artifact) -> Say:
    """What prints a line and keeps it in log.txt, once for all ranks."""
    paths = MachinePaths.of(artifact)

    def say(line: str) -> None:
        if rank() == 0:
            print(line, flush=True)
            with to_write(artifact.path / "log.txt", "a", errors="replace") as log:
                print(paths.kept(line), file=log)

    return say


def needs_weights(at: str) -> bool:
    """Whether more is read of the model at a recipe's field than its tokenizer."""
    return at != "tokenizer"


def convert(job: Job[Recipe]) -> None:
    in_run = os.environ.get(IN_RUN) == "1"
    for at, model in job.plan.models.items():
        weights = needs_weights(at)
        make_readable(model, job.prepared, job.say, weights=weights, in_run=in_run)


def prepare(job: Job[Recipe]) -> None:
    convert(job)  # checks the folders that are there already
    if isinstance(job.recipe, Training) and "model" in job.models:
        check_lengths(job.recipe, job.weights, job.say)
    prepared = stage(job.recipe.stage).prepare(job)
    prepared.of(job.artifact.path).to_file(job.artifact.path / RECORD)


def train(job: Job[Recipe]) -> None:
    """Train and commit.

    Rank 0 holds the write lock: a parent that died must not admit a second writer.
    """
    artifact = job.artifact
    leads = rank() == 0
    begun = time.monotonic()
    module = stage(job.recipe.stage)
    prepared = prepared_by(module).of_artifact(artifact.path)
    finish_verifying = verifying(job, prepared)
    noise.silence()
    finish_verifying()
    alone = Lock(artifact, "write").acquire(wait=10) if leads else nullcontext()
    with screen.doing("getting ready"), alone:
        result = module.train(job, prepared)
        if not leads:
            return
        manifest = describe(job, module.MAKES, result, time.monotonic() - begun)
        # first: where it is missing, the adapter is not finished either
        for name in result.merged:
            commit_merged(job, name, manifest)
        committed = artifact.commit(manifest)
        count, fingerprint = len(committed.files), committed.fingerprint[:12]
        job.say(f"{artifact.path}: {committed.kind} published, {count} files, {fingerprint}")


def commit_merged(job: Job[Recipe], name: str, manifest: Manifest) -> None:
    """Commit the artifact that holds the adapter merged into its base."""
    merged = Artifact(job.artifact.run / name)
    recipe = (job.artifact.path / "recipe.yaml").read_bytes()
    with to_write(merged.path / "recipe.yaml", "wb") as file:
        file.write(recipe)
    kind = "model" if manifest.kind == "adapter" else manifest.kind
    merged.commit(replace(manifest, kind=kind, name=name, merged_from=job.artifact.name))
    job.say(f"{merged.path}: model published, the adapter merged into its base")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
