"""Models that cannot be loaded as they lie, made folders that can: by who needs one first.

    a GGUF file   ->  models/gguf-HASH in this user's cache    once for all runs
    an adapter    ->  .prepared/merged-HASH of a run           once for this run

Where the cache takes nothing, and where other machines have to see the folder, a GGUF file is read
for the run as an adapter is. A folder has its table before it has its name, so that a half written
one is none; one that is not as its table says is made again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmpipe import screen, sums
from llmpipe.data.soundness import check_tokenizer
from llmpipe.errors import RESOURCES, Say, UserError
from llmpipe.files.tables import in_bytes
from llmpipe.run.artifact import Artifact
from llmpipe.run.folders import check_folder, unused_code
from llmpipe.run.gguf import check_gguf
from llmpipe.run.lock import Lock
from llmpipe.run.reference import Model, model_folder

BESIDE_WEIGHTS = 1 << 26
"""Bytes of a model's files that are looked into before it is used; larger ones are its weights."""

PATIENCE = 3600
"""Seconds for which another process may be at the same model."""

FP32 = 4
"""Bytes of a weight that was read of a GGUF file."""


def make_readable(
    model: Model,
    kept: Path,
    say: Say,
    *,
    weights: bool = True,
    in_run: bool = False,
    few_bits: bool = False,
) -> Path:
    """Make of a model, and of its base, a folder that can be loaded, if it is none yet.

    `kept`: where a run has such folders; `in_run`: there alone; `few_bits`: its weights may be
    quantized as `export` has it done. Returns the model's own. Raises
    UserError where it is damaged.
    """
    base = make_readable(model.base, kept, say, in_run=in_run) if model.base else None
    if model.kind == "gguf":
        readable = _read(model, kept, say, in_run)
    elif model.kind == "merged":
        assert base is not None
        readable = _merged(model, base, kept, say)
    else:
        readable = model_folder(model, kept, weights)
    snapshots = readable.parent.parent if model.kind == "hub" else None  # its files are links
    check_folder(readable, snapshots, weights=weights, few_bits=few_bits)
    for name in unused_code(readable):
        say(f"{model.reference}: auto_map of {name} is not used: transformers' own classes are")
    check_tokenizer(readable / "tokenizer.json")
    if model.kind == "hub" and (readable / "adapter_config.json").exists():
        problem = f"{model.reference}: an adapter whose base no manifest names"
        raise UserError(problem, "merge it into its base first")
    return readable


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Have a folder that is to be made for oneself: another stage, or another run, may need the
    same one."""
    lock = Lock(Artifact(folder))
    with screen.doing("waiting for another process, which makes the same model readable"):
        lock.acquire(wait=PATIENCE)
    with lock:
        yield


# --- a GGUF file, read ----------------------------------------------------------------------------


def _read(model: Model, kept: Path, say: Say, in_run: bool) -> Path:
    place = model_folder(model, kept)
    own = kept / place.name
    if place != own and not in_run:
        try:
            return _read_into(place, model, say, "once for all runs: into")
        except UserError as error:
            if error.code != RESOURCES:
                raise
            say(f"{error.message}; so it is read for this run alone")
    return _read_into(own, model, say, "for this run: into")


def _read_into(folder: Path, model: Model, say: Say, where: str) -> Path:
    """Read a GGUF file into a folder, unless that is there."""
    if model.folder is None:  # the file is gone, and nothing else is left of it
        sums.glance(folder, BESIDE_WEIGHTS)
        return folder
    if _is_whole(folder, say):  # for which nothing is written: it may be a disk for reading alone
        return folder
    _refuse_no_room(folder, model.folder)
    with _alone(folder):
        if not _is_whole(folder):
            from llmpipe.models.gguf import convert_gguf

            size = in_bytes(model.folder.stat().st_size)
            say(f"{model.reference}: reading {size} of GGUF, {where} {folder}")
            with screen.doing(f"reading {model.folder.name}") as show:
                convert_gguf(model.folder, folder, show)
    return folder


def _is_whole(folder: Path, say: Say | None = None) -> bool:
    """Whether a folder is there and, at a glance, as it was made."""
    if not sums.is_sealed(folder):
        return False
    problems = sums.verify(folder, most=BESIDE_WEIGHTS)
    if problems and say:
        say(f"{folder}/{problems[0]}: it is not as it was made, and is made again")
    return not problems


def _refuse_no_room(folder: Path, file: Path) -> None:
    """Raise UserError (5) where a disk has no room for what a GGUF file becomes."""
    disk = os.statvfs(next(path for path in folder.absolute().parents if path.is_dir()))
    free, needed = disk.f_bavail * disk.f_frsize, check_gguf(file).numbers * FP32
    if free < needed:
        problem = f"{folder.parent}: {in_bytes(free)} are free, and {in_bytes(needed)} needed"
        raise UserError(f"{problem} for {file.name} as safetensors", "make room there", RESOURCES)


# --- an adapter, merged ---------------------------------------------------------------------------


def _merged(model: Model, base: Path, kept: Path, say: Say) -> Path:
    folder = model_folder(model, kept)
    with _alone(folder):
        if sums.is_sealed(folder):
            sums.glance(folder, BESIDE_WEIGHTS)
            return folder
        from llmpipe.models.publish import merge

        assert model.folder is not None and model.base is not None
        check_folder(model.folder)
        if model.base.kind in ("gguf", "merged"):
            sums.check(sums.Kept(base))
        say(f"{model.reference}: merging the adapter into its base, once for this run")
        merge(base, model.folder, folder)
        sums.seal(folder)
    return folder
