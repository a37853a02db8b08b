"""Whether a model folder may be opened: checked before any library reads it."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import parse_json, read_json, read_text
from llmpipe.run import config_rules, configs
from llmpipe.run.config_rules import Rule
from llmpipe.run.configs import check, refusal
from llmpipe.run.weights import Tensor, tensors_in

INDEX = "model.safetensors.index.json"

CONFIG = "config.json"

ADAPTER = "adapter_config.json"

OTHERS: dict[str, Mapping[str, Rule]] = {
    "generation_config.json": config_rules.GENERATION,
    "tokenizer_config.json": config_rules.TOKENIZER,
    "special_tokens_map.json": config_rules.TOKENIZER,
    "added_tokens.json": {},
}
"""The other JSON that is read of a folder, and what it may say."""

SPREAD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Weights as several processes saved them, which transformers reads by way of torch."""

COMPRESSED, TORCHAO, BITSANDBYTES = "compressed-tensors", "torchao", "bitsandbytes"
"""By what weights have few bits, as transformers calls it."""

READ_BY = {
    TORCHAO: "torchao",
    BITSANDBYTES: "bitsandbytes",
    COMPRESSED: "compressed_tensors",
}
"""The package by which transformers reads them."""

MOST_ENTRIES = 100_000
"""Files and folders below a model's."""


def check_folder(
    folder: Path, home: Path | None = None, *, weights: bool = True, few_bits: bool = False
) -> None:
    """Refuse a model folder that is not plain safetensors + JSON. Raises UserError (3).

    `few_bits`: its weights may be quantized as `export` has it done, which nothing can be trained
    on.

    A snapshot in the Hub's cache is made of links into `home`, the cache of that repository; no
    other link is followed. A folder that is there for its tokenizer needs no `weights`.
    """
    _check_files(folder, home.resolve() if home else None)
    adapter = _object(folder / ADAPTER)
    config = _object(folder / CONFIG)
    if config is None and adapter is None and weights:
        raise UserError(f"{folder}: no readable config.json: this is not a model folder")
    _files(folder, "model.safetensors")
    for name, rules in OTHERS.items():
        check(folder / name, _object(folder / name) or {}, rules)
    tensors: dict[str, Tensor] = {}
    if weights:
        single = "model.safetensors" if adapter is None else "adapter_model.safetensors"
        tensors = _weights(folder, single)
    if adapter is not None:
        configs.check_adapter(folder / ADAPTER, adapter)
        _check_rank(folder / ADAPTER, adapter, tensors)
    if config is not None:
        own = weights and adapter is None
        count = len(tensors) if own else None
        configs.check_model(folder / CONFIG, config, count, few_bits=few_bits)


def reader_of(folder: Path) -> str | None:
    """The package that transformers needs to read a folder's weights of few bits."""
    return READ_BY.get(quantized_by(folder) or "")


def quantized_by(folder: Path) -> str | None:
    """By what the weights of a model folder have few bits; None where its config names nothing."""
    match read_json(folder / CONFIG):
        case {"quantization_config": {"quant_method": str(method)}}:
            return method
    return None


def unused_code(folder: Path) -> list[str]:
    """The files of a folder that may be opened whose `auto_map` nothing obeys."""
    names = (CONFIG, "tokenizer_config.json")
    return [name for name in names if (_object(folder / name) or {}).get(configs.AUTO_MAP)]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model's safetensors that lie there, by name. Raises UserError (3) where one
    is damaged."""
    paths = [folder / name for name in _files(folder, "model.safetensors")]
    whole = [tensors_in(path) for path in paths if path.is_file()]
    return {name: tensor for tensors in whole for name, tensor in tensors.items()}


def _object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file. Raises UserError (3) for another
    thing in its place."""
    try:
        value = parse_json(read_text(path), twice=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: no readable {path.name}: {reason}", code=INTEGRITY) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: no readable {path.name}: no JSON object", code=INTEGRITY)
    return value


def _check_files(folder: Path, home: Path | None) -> None:
    for number, entry in enumerate(_below(folder), 1):
        path = Path(entry.path)
        if number > MOST_ENTRIES:
            raise refusal(folder, f"more than {MOST_ENTRIES:,} files in a model folder")
        if entry.is_symlink() and not (home and path.resolve().is_relative_to(home)):
            raise refusal(path, "a link in a model folder")
        if path.suffix == ".py":
            raise refusal(path, "code in a model folder")
        if SPREAD.fullmatch(path.name):
            raise refusal(path, "weights as several processes saved them, in a model folder")
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            raise refusal(path, f"cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise refusal(path, "neither a file nor a folder, in a model folder")


def _below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Everything below a folder; links to folders are not followed."""
    folders = [str(folder)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    yield entry
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise refusal(folder, f"{error.filename}: cannot be read: {error.strerror}") from None


def _weights(folder: Path, single: str) -> dict[str, Tensor]:
    """The tensors of a folder. `single` is the file that they lie in which no index divides."""
    names = _files(folder, single)
    for name in names:
        if not (folder / name).is_file():
            raise refusal(folder / name, "missing: no safetensors weights")
    return {name: tensor for part in names for name, tensor in tensors_in(folder / part).items()}


def _files(folder: Path, single: str) -> list[str]:
    """The names of the files that the tensors of a folder lie in."""
    index = _object(folder / INDEX)
    if index is None:
        return [single]
    check(folder / INDEX, index, config_rules.INDEX)
    names = sorted(set(index.get("weight_map", {}).values()))
    for name in names:
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            why = f"weight_map names {name!r}, outside the folder's safetensors"
            raise refusal(folder / INDEX, why)
    # where both are there, transformers reads the one file
    if (folder / single).exists():
        return [single]
    if "metadata" not in index or not names:
        raise refusal(folder / INDEX, "lacks weight_map or metadata")
    return names


def _check_rank(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Hold the ranks of an adapter, by which its matrices are made, against these."""
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    widest = max((length for tensor in tensors.values() for length in tensor.shape), default=0)
    if tensors and max(ranks) > widest:
        raise refusal(path, f"r: {max(ranks):,}, and no matrix of the weights is so wide")
