"""Whether a model folder may be opened: checked before any library reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files import read_json

INDEX = "model.safetensors.index.json"


def check_folder(folder: Path, home: Path | None = None, *, weights: bool = True) -> None:
    """Refuse a model folder that is not plain safetensors + JSON. Raises UserError (3).

    A snapshot in the Hub's cache is made of links into `home`, the cache of that repository; no
    other link is followed. A folder that is there for its tokenizer needs no `weights`.
    """
    adapter = (folder / "adapter_config.json").exists()
    config = read_json(folder / ("adapter_config.json" if adapter else "config.json"))
    if config is None and not weights:
        config = {}
    if not isinstance(config, dict):
        raise UserError(f"{folder}: no readable config.json: this is not a model folder")
    _check_config(folder / "config.json", config)
    _check_files(folder, home.resolve() if home else None)
    if weights:
        _check_weights(folder, "adapter_model.safetensors" if adapter else "model.safetensors")


def _check_config(path: Path, config: dict[str, Any]) -> None:
    if "auto_map" in config:
        raise _refusal(path, "asks to run code that comes with the model (auto_map)")
    for key, value in config.items():
        if key.startswith("_attn_implementation") and "/" in str(value):
            raise _refusal(path, "names an attention implementation to be downloaded")


def _check_files(folder: Path, home: Path | None) -> None:
    for path in folder.rglob("*"):
        if path.is_symlink() and not (home and path.resolve().is_relative_to(home)):
            raise _refusal(path, "a link in a model folder")
        if path.suffix == ".py":
            raise _refusal(path, "code in a model folder")


def _check_weights(folder: Path, single: str) -> None:
    """`single` is the file that weights lie in which no index divides."""
    index = read_json(folder / INDEX)
    names = {single}
    if isinstance(index, dict):
        names = {str(name) for name in index.get("weight_map", {}).values()}
    for name in sorted(names):
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            why = f"weight_map names {name!r}, outside the folder's safetensors"
            raise _refusal(folder / INDEX, why)
        if not (folder / name).is_file():
            raise _refusal(folder / name, "missing: no safetensors weights")


def _refusal(path: Path, why: str) -> UserError:
    return UserError(f"{path}: {why}", "llmpipe loads safetensors, JSON and text only", INTEGRITY)
