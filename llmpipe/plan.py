"""Decide, before anything is written, what a command will do: run, resume, skip or refuse.

What a recipe asks for is written out as one document, `asked`: the recipe's science, the identity of the model it
starts from and the content of every file it names. An artifact holds the document it was made for; two equal documents
are one artifact, and where they differ the user is shown which fields do.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from llmpipe import rundir
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.recipe import TEMPLATES, Data, Recipe, is_local, science
from llmpipe.rundir import Artifact, digest

Action = Literal["run", "resume", "skip"]


@dataclass(frozen=True)
class Model:
    """What `model:` refers to. `identity` decides, `folder` is where it lies now (None: still to be fetched)."""

    kind: Literal["hub", "folder", "gguf", "artifact"]
    identity: dict[str, Any]
    folder: Path | None
    parents: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    action: Action
    why: str
    asked: dict[str, Any]
    model: Model

    @property
    def identity(self) -> str:
        return digest(self.asked)


def resolve_model(recipe: Recipe, run: Path, accepts: tuple[str, ...]) -> Model:
    """What a recipe starts from. `accepts` names the artifact kinds that the stage can use."""
    reference = recipe.model
    if recipe.revision and is_local(reference):
        raise UserError(f"revision: {recipe.revision}: only a Hub model has revisions; {reference} is a local path")
    if reference.startswith("artifact:"):
        name, _, step = reference.removeprefix("artifact:").partition("@")
        return _from_artifact(Artifact(run / name), step, accepts, reference)
    if not is_local(reference):
        return _from_hub(reference, recipe.revision)
    path = Path(reference).expanduser()
    if not path.exists():
        folder = path.parent if path.parent.is_dir() else Path()
        match = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir()], n=1)
        hint = f"did you mean {folder / match[0]}?" if match else "a local path is looked up from the current folder"
        raise UserError(f"model: {reference}: no such file or folder", hint)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"model: {reference}: a single file must be .gguf", "give the folder of the model instead")
        return Model("gguf", {"gguf": rundir.sha256_file(path)}, path)
    if rundir.is_artifact(path):
        return _from_artifact(Artifact(path), "", accepts, reference)
    check_folder(path)
    return Model("folder", {"files": digest(rundir.table(path))}, path)


def parent_of(recipe: Recipe, run: Path) -> Artifact | None:
    """The artifact that `model:` names, by `artifact:NAME` or by its folder."""
    if recipe.model.startswith("artifact:"):
        return Artifact(run / recipe.model.removeprefix("artifact:").partition("@")[0])
    path = Path(recipe.model).expanduser()
    return Artifact(path) if is_local(recipe.model) and rundir.is_artifact(path) else None


def _from_artifact(parent: Artifact, step: str, accepts: tuple[str, ...], reference: str) -> Model:
    if step:
        checkpoint = parent.checkpoints / f"step-{step}"
        sums = rundir.read_json(checkpoint / rundir.SUMS)
        if sums is None:
            have = ", ".join(sorted(p.name.removeprefix("step-") for p in parent.checkpoints.glob("step-*"))) or "none"
            raise UserError(f"model: {reference}: no such checkpoint; there are: {have}")
        if problems := rundir.differences(checkpoint, sums["files"], {rundir.SUMS}):
            raise UserError(f"{checkpoint}/{problems[0]}", "take another checkpoint", INTEGRITY)
        identity = {"artifact": parent.name, "checkpoint": int(step), "fingerprint": digest(sums["files"])}
        return Model("artifact", identity, checkpoint, [{"name": f"{parent.name}@{step}", **_fingerprint(identity)}])
    if not parent.finished:
        begun = " is not finished" if parent.path.exists() else ": no such artifact in this run"
        raise UserError(f"model: {reference}{begun}", f"make it first; it would lie in {parent.path}")
    manifest = parent.verify()
    if manifest["kind"] not in accepts:
        raise UserError(
            f"model: {reference} is of kind '{manifest['kind']}'; this stage takes {' or '.join(accepts)}",
            code=INTEGRITY,
        )
    identity = {"artifact": parent.name, "fingerprint": manifest["fingerprint"]}
    return Model("artifact", identity, parent.model, [{"name": parent.name, **_fingerprint(identity)}])


def _fingerprint(identity: dict[str, Any]) -> dict[str, str]:
    return {"fingerprint": identity["fingerprint"]}


def _from_hub(name: str, revision: str | None) -> Model:
    """Pin a Hub model to a commit, from the cache when offline. Raises UserError (2) when neither has it."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        if not constants.HF_HUB_OFFLINE:
            return Model(
                "hub", {"hub": name, "revision": HfApi().model_info(name, revision=revision, timeout=10).sha}, None
            )
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403, 404):
            raise UserError(
                f"model: {name}: not found on the Hub, or closed to you (HTTP {status})",
                "check the name; a gated model needs `hf auth login`; a local folder starts with ./",
            ) from None
    except (OSError, OfflineModeIsEnabled, RuntimeError):
        pass  # no network: the cache may have it
    except Exception as error:  # the Hub's HTTP client has its own family of connection errors
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        raise UserError(
            f"model: {name}: the Hub cannot be reached and the model is not in the local cache",
            "go online once, or give a local folder (./folder) or file (./model.gguf)",
        ) from None
    return Model("hub", {"hub": name, "revision": folder.name}, folder)


def check_folder(folder: Path, home: Path | None = None) -> None:
    """Refuse a model folder that is not plain safetensors + JSON before any library opens it. Raises UserError (3).

    A snapshot in the Hub's cache is made of links into `home`, the cache of that repository; no other link is followed.
    """

    def refuse(path: Path, why: str) -> None:
        raise UserError(f"{path}: {why}", "llmpipe loads safetensors, JSON and text only", INTEGRITY)

    config = rundir.read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder}: no readable config.json: this is not a model folder")
    if "auto_map" in config:
        refuse(folder / "config.json", "asks to run code that comes with the model (auto_map)")
    if any("/" in str(value) for key, value in config.items() if key.startswith("_attn_implementation")):
        refuse(folder / "config.json", "names an attention implementation to be downloaded")
    for path in folder.rglob("*"):
        if path.is_symlink() and not (home and path.resolve().is_relative_to(home.resolve())):
            refuse(path, "a link in a model folder")
        if path.suffix == ".py":
            refuse(path, "code in a model folder")
    index = rundir.read_json(folder / "model.safetensors.index.json")
    names = set(index.get("weight_map", {}).values()) if isinstance(index, dict) else {"model.safetensors"}
    for name in sorted(map(str, names)):
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            refuse(
                folder / "model.safetensors.index.json", f"weight_map names {name!r}, outside the folder's safetensors"
            )
        if not (folder / name).is_file() and not (folder / "adapter_model.safetensors").is_file():
            refuse(folder / name, "missing: no safetensors weights")


def data_content(data: Data) -> dict[str, str]:
    """{file: sha256, or Hub dataset: commit} of every data file and template that a recipe names."""
    from llmpipe.data.sources import files_of, hub_revision

    found: dict[str, str] = {}
    for i, source in enumerate([*data.train, *data.eval.sources]):
        if is_local(source.path):
            found |= {f"{i}:{file.name}": file.sha256 for file in files_of(source)}
        else:
            found[f"{i}:{source.path}"] = hub_revision(source)
    if data.template not in ("auto", *TEMPLATES):
        path = Path(data.template).expanduser()
        if not path.is_file():
            raise UserError(f"data.template: {data.template}: no such file")
        found[data.template] = rundir.sha256_file(path)
    return found


def ask(recipe: Recipe, model: Model) -> dict[str, Any]:
    """The document that decides the result."""
    return {"recipe": science(recipe), "model": model.identity, "content": data_content(recipe.data)}


def decide(artifact: Artifact, recipe: Recipe, accepts: tuple[str, ...]) -> Plan:
    """Compare what is asked with what lies there. Raises UserError (3) when another recipe made it."""
    model = resolve_model(recipe, artifact.run, accepts)
    asked = ask(recipe, model)
    if artifact.finished:
        manifest = artifact.manifest()
        _refuse_other(artifact, recipe, manifest["asked"], asked, "was made")
        wrong = [n for n, e in manifest["files"].items() if not _same_size(artifact.path / n, e["size"])]
        if wrong:
            raise UserError(
                f"{artifact.path / wrong[0]}: not as published",
                "restore it, or make the artifact again with --fresh",
                INTEGRITY,
            )
        return Plan("skip", "finished, same recipe and inputs", asked, model)
    begun = rundir.read_json(artifact.path / "plan.json")
    if begun and any(artifact.checkpoints.glob("step-*")):
        _refuse_other(artifact, recipe, begun["asked"], asked, "was begun")
        return Plan("resume", "not finished, same recipe and inputs", asked, model)
    return Plan("run", "nothing there yet", asked, model)


def _same_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _refuse_other(artifact: Artifact, recipe: Recipe, old: dict, new: dict, verb: str) -> None:
    try:  # a field that the old document does not know takes its default
        filled = science(type(recipe).model_validate({**old["recipe"], "run": recipe.run}))
        old = {**old, "recipe": filled}
    except ValidationError:
        pass  # a field that no longer exists: shown as a difference
    if old == new:
        return
    lines = [f"{artifact.path} {verb} with another recipe or other inputs:"]
    lines += [f"  {path}: {_short(a)} there, {_short(b)} now" for path, a, b in changes(old, new)]
    raise UserError(
        "\n".join(lines),
        f"--fresh moves {artifact.path} aside and starts anew; `name:` keeps both; or put the old values back",
        INTEGRITY,
    )


def changes(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Every (dotted path, old value, new value) in which two documents differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            change
            for key in sorted({*old, *new})
            for change in changes(old.get(key, "absent"), new.get(key, "absent"), f"{path}.{key}" if path else key)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [c for i, pair in enumerate(zip(old, new, strict=True)) for c in changes(*pair, f"{path}.{i}")]
    return [] if old == new else [(path.removeprefix("recipe."), old, new)]


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 and " " not in text else text if len(text) <= 60 else text[:57] + "..."
