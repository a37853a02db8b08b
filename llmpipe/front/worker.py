"""What is started: `python -m llmpipe.front.worker ACTION FOLDER`. Folder -> recipe -> the stage's `prepare` or `train`.

ACTION is `convert` (a GGUF file -> safetensors), `prepare` (rows -> tokens) or `train`. However it ends, outcome.json
says so; a user's mistake prints nothing here, the parent prints it once.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from llmpipe.errors import DONE, RESOURCES, Say, Stopped, UserError
from llmpipe.files import disk_full, write_json
from llmpipe.recipe.check import validate
from llmpipe.recipe.yaml import dump, parse
from llmpipe.run.artifact import Artifact
from llmpipe.run.job import Job
from llmpipe.run.lock import Lock
from llmpipe.run.machine import rank
from llmpipe.run.manifest import describe
from llmpipe.run.plan import Plan
from llmpipe.run.reference import Model, check_folder, model_folder
from llmpipe.run.signals import Signals, die_with_parent
from llmpipe.stages import schema, stage


def main(arguments: list[str]) -> int:
    parent = os.environ.get("LLMPIPE_PARENT")
    ranked = "RANK" in os.environ  # the launcher in between is the parent then
    die_with_parent(int(parent) if parent and not ranked else None)
    signals = Signals().install()
    action, folder = arguments[0], Path(arguments[1])
    artifact = Artifact(folder)
    return guarded(
        artifact,
        lambda: act(action, artifact, signals, inexact="--inexact" in arguments),
        "--debug" in arguments,
    )


def guarded(artifact: Artifact, work: Any, debug: bool = False) -> int:
    """Run `work`; its end, whatever it is, becomes outcome.json and an exit code."""
    outcome: dict[str, Any] = {"code": DONE}
    try:
        work()
    except Stopped as stop:
        outcome = {"code": stop.code, "message": stop.message}
    except UserError as error:
        if debug:
            traceback.print_exc()
        outcome = {"code": error.code, "message": error.message, "hint": error.hint}
    except Exception as error:
        mended = disk_full(out_of_memory(error), artifact.path)
        if not isinstance(mended, UserError):
            traceback.print_exc()
            with (artifact.path / "log.txt").open("a", encoding="utf-8") as log:
                traceback.print_exc(file=log)
            mended = UserError(
                f"a bug: {type(error).__name__}: {error}", "please report it, with the traceback", 1
            )
        outcome = {"code": mended.code, "message": mended.message, "hint": mended.hint}
    path = artifact.path / "outcome.json"
    if rank() == 0 or (outcome["code"] != DONE and not path.exists()):
        write_json(path, outcome)
    return outcome["code"]


def out_of_memory(error: Exception) -> Exception:
    """An allocation that failed, in whatever words, as a UserError (5); any other error as it is."""
    words = ("can't allocate memory", "out of memory", "DefaultCPUAllocator")
    if isinstance(error, MemoryError) or any(word in str(error) for word in words):
        hint = "lower launch.micro_batch_size or data.max_length, or set launch.activation_checkpointing: true"
        return UserError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'MemoryError'}",
            hint,
            RESOURCES,
        )
    return error


def act(action: str, artifact: Artifact, signals: Signals, *, inexact: bool = False) -> None:
    job = open_job(artifact, signals, inexact=inexact)
    if action == "convert":
        convert(job)
    elif action == "prepare":
        prepare(job)
    else:
        train(job)


def open_job(artifact: Artifact, signals: Signals, *, inexact: bool = False) -> Job:
    """The job that a folder holds: its resolved recipe and its plan."""
    path = artifact.path / "recipe.yaml"
    values, where = parse(path.read_text(encoding="utf-8"), str(path))
    recipe = validate(values, where, schema(values["stage"]), str(path))
    plan = Plan.read(artifact.path)
    assert plan is not None  # written before a worker is started

    def say(line: str) -> None:
        if rank() == 0:
            print(line, flush=True)
            with (artifact.path / "log.txt").open("a", encoding="utf-8") as log:
                print(line, file=log)

    converted = artifact.run / ".prepared"
    folders = {
        at: model_folder(model, converted, at != "tokenizer") for at, model in plan.models.items()
    }
    bases = {
        at: model_folder(model.base, converted)
        for at, model in plan.models.items()
        if model.is_adapter
    }
    return Job(artifact, recipe, folders, bases, plan, say, signals, inexact)


def convert(job: Job) -> None:
    for at, model in job.plan.models.items():
        convert_one(model, job.artifact.run / ".prepared", job.say, at != "tokenizer")


def convert_one(model: Model, converted: Path, say: Say, weights: bool = True) -> Path:
    """Make of a model, and of its base, a folder that can be loaded, if it is none yet."""
    base = convert_one(model.base, converted, say) if model.base else None
    folder = model_folder(model, converted, weights)
    if model.kind in ("gguf", "merged"):
        # another stage of the run may need the same one
        with Lock(Artifact(folder)).acquire(wait=3600):
            if not (folder / "config.json").exists():
                _convert(model, base, folder, say)
    check_folder(folder, folder.parent.parent if model.kind == "hub" else None, weights=weights)
    if model.kind == "hub" and (folder / "adapter_config.json").exists():
        problem = f"{model.reference}: an adapter whose base no manifest names"
        raise UserError(problem, "merge it into its base first")
    return folder


def _convert(model: Model, base: Path | None, folder: Path, say: Say) -> None:
    from llmpipe.models.gguf import convert_gguf
    from llmpipe.models.publish import merge

    assert model.folder is not None
    if model.kind == "gguf":
        say(f"{model.reference}: reading GGUF, once for this run")
        convert_gguf(model.folder, folder)
    else:
        check_folder(model.folder)
        say(f"{model.reference}: merging the adapter into its base, once for this run")
        merge(base, model.folder, folder)


def prepare(job: Job) -> None:
    convert(job)  # checks the folders that are there already
    prepared = stage(job.recipe.stage).prepare(job)
    prepared.to_file(job.artifact.path / "prepared.json")


def train(job: Job) -> None:
    """Train and commit. Rank 0 holds the write lock: a parent that died must not admit a second writer."""
    from llmpipe import upstream

    artifact, main = job.artifact, rank() == 0
    begun = time.time()
    upstream.silence()
    with Lock(artifact, "write").acquire(wait=10) if main else nullcontext():
        module = stage(job.recipe.stage)
        prepared = module.PREPARED.from_file(artifact.path / "prepared.json")
        made = module.train(job, prepared)
        if not main:
            return
        about = describe(job, module.MAKES, made, time.time() - begun)
        for name in made.merged:  # first: where it is missing, the adapter is not finished either
            also = Artifact(artifact.run / name)
            (also.path / "recipe.yaml").write_bytes((artifact.path / "recipe.yaml").read_bytes())
            kind = "model" if about["kind"] == "adapter" else about["kind"]
            also.commit({**about, "kind": kind, "name": name, "merged_from": artifact.name})
            job.say(f"{also.path}: model published, the adapter merged into its base")
        manifest = artifact.commit(about)
        count = len(manifest["files"])
        job.say(
            f"{artifact.path}: {manifest['kind']} published, {count} files, {manifest['fingerprint'][:12]}"
        )


def write_plan(artifact: Artifact, recipe: Any, plan: Plan) -> None:
    """Leave what `open_job` reads: the resolved recipe and the plan."""
    artifact.path.mkdir(parents=True, exist_ok=True)
    run = (
        recipe.run
        if not os.path.isabs(os.path.expanduser(recipe.run))
        else f"runs/{artifact.run.name}"
    )
    (artifact.path / "recipe.yaml").write_text(
        dump(recipe.model_copy(update={"run": run})), encoding="utf-8"
    )
    plan.write(artifact.path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
