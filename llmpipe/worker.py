"""What is started: `python -m llmpipe.worker ACTION FOLDER`. Folder -> recipe -> the stage's `prepare` or `train`.

ACTION is `convert` (a GGUF file -> safetensors), `prepare` (rows -> tokens) or `train`. However it ends, outcome.json
says so; a user's mistake prints nothing here, the parent prints it once.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

from llmpipe import __version__, launch, rundir
from llmpipe.errors import DONE, RESOURCES, Stopped, UserError
from llmpipe.plan import check_folder
from llmpipe.recipe import dump, parse, validate
from llmpipe.rundir import Artifact, Lock
from llmpipe.stages import Job, schema, stage

# the libraries whose versions a manifest holds
VERSIONS = (
    "torch transformers trl peft accelerate datasets tokenizers bitsandbytes safetensors "
    "lm_eval math_verify rouge_score sacrebleu"
).split()
BASE = ("kind", "reference", "identity")  # what a manifest says of the model that was trained, or trained on
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "NCCL_DEBUG", "PYTORCH_CUDA_ALLOC_CONF")


def main(arguments: list[str]) -> int:
    parent = os.environ.get("LLMPIPE_PARENT")
    ranked = "RANK" in os.environ  # the launcher in between is the parent then
    launch.die_with_parent(int(parent) if parent and not ranked else None)
    signals = launch.Signals().install()
    action, folder = arguments[0], Path(arguments[1])
    artifact = Artifact(folder)
    return guarded(
        artifact, lambda: act(action, artifact, signals, inexact="--inexact" in arguments), "--debug" in arguments
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
        mended = rundir.disk_full(out_of_memory(error), artifact.path)
        if not isinstance(mended, UserError):
            traceback.print_exc()
            with (artifact.path / "log.txt").open("a", encoding="utf-8") as log:
                traceback.print_exc(file=log)
            mended = UserError(f"a bug: {type(error).__name__}: {error}", "please report it, with the traceback", 1)
        outcome = {"code": mended.code, "message": mended.message, "hint": mended.hint}
    path = artifact.path / "outcome.json"
    if launch.rank() == 0 or (outcome["code"] != DONE and not path.exists()):
        rundir.write_json(path, outcome)
    return outcome["code"]


def out_of_memory(error: Exception) -> Exception:
    """An allocation that failed, in whatever words, as a UserError (5); any other error as it is."""
    words = ("can't allocate memory", "out of memory", "DefaultCPUAllocator")
    if isinstance(error, MemoryError) or any(word in str(error) for word in words):
        hint = "lower launch.micro_batch_size or data.max_length, or set launch.activation_checkpointing: true"
        return UserError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'MemoryError'}", hint, RESOURCES
        )
    return error


def act(action: str, artifact: Artifact, signals: launch.Signals, *, inexact: bool = False) -> None:
    job = open_job(artifact, signals, inexact=inexact)
    if action == "convert":
        convert(job)
    elif action == "prepare":
        prepare(job)
    else:
        train(job)


def open_job(artifact: Artifact, signals: launch.Signals, *, inexact: bool = False) -> Job:
    """The job that a folder holds: its resolved recipe and its plan."""
    path = artifact.path / "recipe.yaml"
    values, where = parse(path.read_text(encoding="utf-8"), str(path))
    recipe = validate(values, where, schema(values["stage"]), str(path))
    plan = rundir.read_json(artifact.path / "plan.json")

    def say(line: str) -> None:
        if launch.rank() == 0:
            print(line, flush=True)
            with (artifact.path / "log.txt").open("a", encoding="utf-8") as log:
                print(line, file=log)

    converted = artifact.run / ".prepared"
    folders = {at: model_folder(model, converted, at != "tokenizer") for at, model in plan["models"].items()}
    bases = {at: model_folder(m["base"], converted) for at, m in plan["models"].items() if is_adapter(m)}
    return Job(artifact, recipe, folders, bases, plan, say, signals, inexact)


def is_adapter(model: dict[str, Any]) -> bool:
    return model["kind"] == "artifact" and "base" in model


def model_folder(model: dict[str, Any], converted: Path, weights: bool = True) -> Path:
    """Where a model of a plan lies: fetched from the Hub at its pinned commit, or made by `convert` in `converted`."""
    if model["kind"] == "gguf":
        return converted / f"gguf-{model['identity']['gguf'][:16]}"
    if model["kind"] == "merged":
        return converted / f"merged-{model['identity']['fingerprint'][:16]}"
    if model["kind"] == "hub":
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.jinja", "*.txt", "*.model", *["*.safetensors"] * weights]
        name, commit = model["reference"].partition("@")[0], model["identity"]["revision"]
        return Path(snapshot_download(name, revision=commit, allow_patterns=patterns))
    return Path(model["folder"]).expanduser()


def convert(job: Job) -> None:
    for at, model in job.plan["models"].items():
        convert_one(model, job.artifact.run / ".prepared", job.say, at != "tokenizer")


def convert_one(model: dict[str, Any], converted: Path, say: Any, weights: bool = True) -> Path:
    """Make of a model, and of its base, a folder that can be loaded, if it is none yet."""
    base = convert_one(model["base"], converted, say) if "base" in model else None
    folder = model_folder(model, converted, weights)
    if model["kind"] in ("gguf", "merged"):
        with Lock(Artifact(folder)).acquire(wait=3600):  # another stage of the run may need the same one
            if not (folder / "config.json").exists():
                from llmpipe.engine import adapters, models

                source = Path(model["folder"]).expanduser()
                if model["kind"] == "gguf":
                    say(f"{model['reference']}: reading GGUF, once for this run")
                    models.convert_gguf(source, folder)
                else:
                    check_folder(source)
                    say(f"{model['reference']}: merging the adapter into its base, once for this run")
                    adapters.merge(base, source, folder)
    check_folder(folder, folder.parent.parent if model["kind"] == "hub" else None, weights=weights)
    if model["kind"] == "hub" and (folder / "adapter_config.json").exists():
        raise UserError(
            f"{model['reference']}: an adapter whose base no manifest names", "merge it into its base first"
        )
    return folder


def prepare(job: Job) -> None:
    convert(job)  # checks the folders that are there already
    prepared = stage(job.recipe.stage).prepare(job)
    rundir.write_json(job.artifact.path / "prepared.json", prepared)


def train(job: Job) -> None:
    """Train and commit. Rank 0 holds the write lock: a parent that died must not admit a second writer."""
    from llmpipe.engine import upstream

    artifact, main = job.artifact, launch.rank() == 0
    begun = time.time()
    upstream.silence()
    with Lock(artifact, "write").acquire(wait=10) if main else nullcontext():
        prepared = rundir.read_json(artifact.path / "prepared.json")
        made = stage(job.recipe.stage).train(job, prepared)
        if not main:
            return
        about = describe(job, made, time.time() - begun)
        for name in about.pop("merged", ()):  # first: where it is missing, the adapter is not finished either
            also = Artifact(artifact.run / name)
            (also.path / "recipe.yaml").write_bytes((artifact.path / "recipe.yaml").read_bytes())
            kind = "model" if about["kind"] == "adapter" else about["kind"]
            also.commit({**about, "kind": kind, "name": name, "merged_from": artifact.name})
            job.say(f"{also.path}: model published, the adapter merged into its base")
        manifest = artifact.commit(about)
        count = len(manifest["files"])
        job.say(f"{artifact.path}: {manifest['kind']} published, {count} files, {manifest['fingerprint'][:12]}")


def describe(job: Job, made: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The manifest, less its file table: what was made, of what, by what, on what."""
    models = job.plan["models"]
    start = models.get("model")
    base = {} if start is None else {n: (start["base"] if is_adapter(start) else start)[n] for n in BASE}
    return {
        "version": 1,
        "kind": stage(job.recipe.stage).MAKES,
        "stage": job.recipe.stage,
        "name": job.artifact.name,
        "identity": job.plan["identity"],
        "asked": job.plan["asked"],
        "parents": list({p["name"]: p for model in models.values() for p in model["parents"]}.values()),
        "models": {at: {"reference": model["reference"], **model["identity"]} for at, model in models.items()},
        **({"base": base} if base else {}),
        "seed": job.recipe.seed,
        **made,
        "llmpipe": __version__,
        "git": git_commit(),
        "versions": {"python": platform.python_version(), **{n: installed(n) for n in VERSIONS}},
        "machine": {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "seconds": round(seconds, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Commit of the checkout that llmpipe runs from, with a + when it was changed; None when it is installed."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def write_plan(artifact: Artifact, recipe: Any, plan: Any) -> None:
    """Leave what `open_job` reads: the resolved recipe and the plan."""
    artifact.path.mkdir(parents=True, exist_ok=True)
    run = recipe.run if not os.path.isabs(os.path.expanduser(recipe.run)) else f"runs/{artifact.run.name}"
    (artifact.path / "recipe.yaml").write_text(dump(recipe.model_copy(update={"run": run})), encoding="utf-8")
    models = {at: model.record() for at, model in plan.models.items()}
    rundir.write_json(artifact.path / "plan.json", {"identity": plan.identity, "asked": plan.asked, "models": models})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
