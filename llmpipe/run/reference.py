"""What a recipe's reference to a model means, and whether it may be opened."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files import differences, digest, read_json, sha256_file, table
from llmpipe.recipe.sections import Recipe, is_local
from llmpipe.run.artifact import MANIFEST, SUMS, Artifact, is_artifact, is_reward_model
from llmpipe.run.identity import changes, short

Kinds = tuple[str, ...]  # of artifacts


@dataclass(frozen=True)
class Model:
    """What a reference means. `identity` decides, `folder` is where it lies now (None: still to be fetched).

    `merged`: an adapter (in `folder`) to be merged into its `base` first. An `artifact` with a base is an adapter.
    """

    kind: Literal["hub", "folder", "gguf", "artifact", "merged"]
    reference: str
    identity: dict[str, Any]
    folder: Path | None
    parents: list[dict[str, str]] = field(default_factory=list)
    base: Model | None = None

    @property
    def converts(self) -> bool:
        """Whether it, or its base, is no folder yet that can be loaded."""
        return self.kind in ("gguf", "merged") or (self.base is not None and self.base.converts)

    @property
    def is_adapter(self) -> bool:
        """Whether it is used as an adapter on its base, unmerged."""
        return self.kind == "artifact" and self.base is not None

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Model:
        """What plan.json holds, read again."""
        return cls(
            record["kind"],
            record["reference"],
            record["identity"],
            Path(record["folder"]).expanduser() if "folder" in record else None,
            record["parents"],
            cls.of_record(record["base"]) if "base" in record else None,
        )

    def record(self) -> dict[str, Any]:
        """As plan.json holds it."""
        names = ("kind", "reference", "identity", "parents")
        out = {name: getattr(self, name) for name in names} | (
            {"base": self.base.record()} if self.base else {}
        )
        if self.folder and self.kind != "hub":
            out["folder"] = (
                str(self.folder) if self.folder.is_absolute() else os.path.relpath(self.folder)
            )
        return out


def resolve(
    reference: str,
    at: str,
    run: Path,
    accepts: Kinds,
    pinned: dict[str, Any] | None = None,
    keep: bool = True,
) -> Model:
    """What a reference means. `at` is its field, `accepts` names the artifact kinds that the stage can use, `pinned`
    is the identity that an earlier start of the same work found, `keep` leaves an adapter unmerged."""
    if reference.startswith("artifact:"):
        name, _, step = reference.removeprefix("artifact:").partition("@")
        return _from_artifact(Artifact(run / name), step, accepts, reference, at, keep)
    if not is_local(reference):
        return _from_hub(reference, at, pinned)
    path = Path(reference).expanduser()
    if not path.exists():
        folder = path.parent if path.parent.is_dir() else Path()
        match = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir()], n=1)
        hint = (
            f"did you mean {folder / match[0]}?"
            if match
            else "a local path is looked up from the current folder"
        )
        raise UserError(f"{at}: {reference}: no such file or folder", hint)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(
                f"{at}: {reference}: a single file must be .gguf",
                "give the folder of the model instead",
            )
        return Model("gguf", reference, {"gguf": sha256_file(path)}, path)
    if is_artifact(path):
        return _from_artifact(Artifact(path), "", accepts, reference, at, keep)
    check_folder(path, weights=at != "tokenizer")
    if (path / "adapter_config.json").exists():
        problem = f"{at}: {reference}: an adapter whose base no manifest names"
        raise UserError(problem, "merge it into its base first", INTEGRITY)
    return Model("folder", reference, {"files": digest(table(path))}, path)


def parents_of(recipe: Recipe, run: Path) -> list[Artifact]:
    """The artifacts that a recipe names, by `artifact:NAME` or by their folders, each once."""
    found = {}
    for reference in recipe.references().values():
        path = Path(reference).expanduser()
        if reference.startswith("artifact:"):
            path = run / reference.removeprefix("artifact:").partition("@")[0]
        elif not is_local(reference) or not is_artifact(path):
            continue
        while (
            path and path.resolve() not in found
        ):  # and the base of an adapter, which is read as well
            found[path.resolve()] = artifact = Artifact(path)
            base = (read_json(path / MANIFEST) or {}).get("base", {}).get("reference", "")
            path = (
                artifact.run / base.removeprefix("artifact:")
                if base.startswith("artifact:")
                else None
            )
    return list(found.values())


def _from_artifact(
    parent: Artifact, step: str, accepts: Kinds, reference: str, at: str, keep: bool
) -> Model:
    if step:
        checkpoint = parent.checkpoints / f"step-{step}"
        sums = read_json(checkpoint / SUMS)
        if sums is None:
            have = (
                ", ".join(
                    sorted(p.name.removeprefix("step-") for p in parent.checkpoints.glob("step-*"))
                )
                or "none"
            )
            raise UserError(f"{at}: {reference}: no such checkpoint; there are: {have}")
        if problems := differences(checkpoint, sums["files"], {SUMS}):
            raise UserError(f"{checkpoint}/{problems[0]}", "take another checkpoint", INTEGRITY)
        if (checkpoint / "adapter_config.json").exists():
            raise UserError(
                f"{at}: {reference} is a checkpoint of an adapter",
                f"take artifact:{parent.name}",
                INTEGRITY,
            )
        if (kind := "reward-model" if is_reward_model(checkpoint) else "model") not in accepts:
            raise _other_kind(at, reference, kind, accepts)
        identity = {
            "artifact": parent.name,
            "checkpoint": int(step),
            "fingerprint": digest(sums["files"]),
        }
        parents = [{"name": f"{parent.name}@{step}", "fingerprint": identity["fingerprint"]}]
        return Model("artifact", reference, identity, checkpoint, parents)
    if not parent.finished:
        begun = " is not finished" if parent.path.exists() else ": no such artifact in this run"
        raise UserError(
            f"{at}: {reference}{begun}", f"make it first; it would lie in {parent.path}"
        )
    manifest = parent.verify()
    if manifest["kind"] not in accepts:
        raise _other_kind(at, reference, manifest["kind"], accepts)
    identity = {"artifact": parent.name, "fingerprint": manifest["fingerprint"]}
    parents = [{"name": parent.name, "fingerprint": identity["fingerprint"]}]
    if not (parent.model / "adapter_config.json").exists():  # a reward model may be an adapter, too
        return Model("artifact", reference, identity, parent.model, parents)
    base = _base_of(parent, manifest["base"], at)
    if keep:
        return Model("artifact", reference, identity, parent.model, parents, base)
    return Model("merged", reference, {**identity, "merged": True}, parent.model, parents, base)


def _other_kind(at: str, reference: str, kind: str, accepts: Kinds) -> UserError:
    return UserError(
        f"{at}: {reference} is of kind '{kind}'; this stage takes {' or '.join(accepts)}",
        code=INTEGRITY,
    )


def _base_of(adapter: Artifact, record: dict[str, Any], at: str) -> Model:
    """The very model that an adapter was trained on. Raises UserError (3) when another one lies in its place."""
    kinds = ("model", "adapter", "reward-model")
    where, keep = f"{at}: base of {adapter.name}", record["kind"] != "merged"
    base = resolve(record["reference"], where, adapter.run, kinds, record["identity"], keep)
    if base.identity != record["identity"]:
        other = changes(record["identity"], base.identity)
        lines = [f"  {path}: {short(a)} in training, {short(b)} now" for path, a, b in other]
        raise UserError(
            "\n".join(
                [
                    f"{adapter.path}: its base {record['reference']} is not the one it was trained on:",
                    *lines,
                ]
            ),
            "put the old base back; an adapter is of no use on another one",
            INTEGRITY,
        )
    return base


def _from_hub(reference: str, at: str, pinned: dict[str, Any] | None) -> Model:
    """Pin a Hub model to a commit, from the cache when offline. Raises UserError (2) when neither has it."""
    name, _, revision = reference.partition("@")
    if pinned and pinned.get("hub") == reference:
        return Model("hub", reference, pinned, None)
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        if not constants.HF_HUB_OFFLINE:
            commit = HfApi().model_info(name, revision=revision or None, timeout=10).sha
            return Model("hub", reference, {"hub": reference, "revision": commit}, None)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403, 404):
            raise UserError(
                f"{at}: {name}: not found on the Hub, or closed to you (HTTP {status})",
                "check the name; a gated model needs `hf auth login`; a local folder starts with ./",
            ) from None
    except (OSError, OfflineModeIsEnabled, RuntimeError):
        pass  # no network: the cache may have it
    except Exception as error:  # the Hub's HTTP client has its own family of connection errors
        if type(error).__module__.split(".")[0] not in (
            "httpx",
            "httpx2",
            "httpcore",
            "httpcore2",
            "requests",
        ):
            raise
    try:
        folder = Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        raise UserError(
            f"{at}: {name}: the Hub cannot be reached and the model is not in the local cache",
            "go online once, or give a local folder (./folder) or file (./model.gguf)",
        ) from None
    return Model("hub", reference, {"hub": reference, "revision": folder.name}, folder)


def check_folder(folder: Path, home: Path | None = None, *, weights: bool = True) -> None:
    """Refuse a model folder that is not plain safetensors + JSON before any library opens it. Raises UserError (3).

    A snapshot in the Hub's cache is made of links into `home`, the cache of that repository; no other link is followed.
    A folder that is there for its tokenizer needs no `weights`.
    """

    def refuse(path: Path, why: str) -> None:
        raise UserError(
            f"{path}: {why}", "llmpipe loads safetensors, JSON and text only", INTEGRITY
        )

    adapter = (folder / "adapter_config.json").exists()
    config = read_json(folder / ("adapter_config.json" if adapter else "config.json"))
    config = config if weights else config or {}
    if not isinstance(config, dict):
        raise UserError(f"{folder}: no readable config.json: this is not a model folder")
    if "auto_map" in config:
        refuse(folder / "config.json", "asks to run code that comes with the model (auto_map)")
    if any(
        "/" in str(value) for key, value in config.items() if key.startswith("_attn_implementation")
    ):
        refuse(folder / "config.json", "names an attention implementation to be downloaded")
    for path in folder.rglob("*"):
        if path.is_symlink() and not (home and path.resolve().is_relative_to(home.resolve())):
            refuse(path, "a link in a model folder")
        if path.suffix == ".py":
            refuse(path, "code in a model folder")
    if not weights:
        return
    index = read_json(folder / "model.safetensors.index.json")
    names = {"adapter_model.safetensors" if adapter else "model.safetensors"}
    names = set(index.get("weight_map", {}).values()) if isinstance(index, dict) else names
    for name in sorted(map(str, names)):
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            refuse(
                folder / "model.safetensors.index.json",
                f"weight_map names {name!r}, outside the folder's safetensors",
            )
        if not (folder / name).is_file():
            refuse(folder / name, "missing: no safetensors weights")


def model_folder(model: Model, converted: Path, weights: bool = True) -> Path:
    """Where a model lies: fetched from the Hub at its pinned commit, or made in `converted`."""
    if model.kind == "gguf":
        return converted / f"gguf-{model.identity['gguf'][:16]}"
    if model.kind == "merged":
        return converted / f"merged-{model.identity['fingerprint'][:16]}"
    if model.kind == "hub":
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.jinja", "*.txt", "*.model", *["*.safetensors"] * weights]
        name, commit = model.reference.partition("@")[0], model.identity["revision"]
        return Path(snapshot_download(name, revision=commit, allow_patterns=patterns))
    assert model.folder is not None
    return model.folder
