"""Artifacts that tests start from, made once in a run of the suite and copied to whoever asks for
the same again.

`made(path)` is `life.command(path)` for a fixture, and `made(path, life.pair)` that: what decides
the result is the recipe, less where its run lies, and the fingerprints of the artifacts it names.
Whichever process of the suite asks first makes it; the others wait.
"""

import fcntl
import os
import pydoc_data.topics
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import yaml

from llmpipe.files.json import digest
from llmpipe.run.artifact import Artifact
from tests import life

HOME = "LLMPIPE_TEST_STORE"  # set by conftest.py, the same in every process of a run of the suite


def made(path: Path, by=life.command) -> Artifact:
    """The artifact of a recipe, in the run that the recipe names."""
    values = yaml.safe_load(path.read_text())
    run = Path(values.pop("run"))
    artifact = Artifact(run / values.get("name", values["stage"]))
    decides = [by.__name__, values, fingerprints(run, path.read_text())]
    kept = Path(os.environ[HOME]) / digest(decides)
    with alone(kept.with_suffix(".lock")):
        if not kept.exists():
            before = folders(run)
            by(path)
            keep(run, folders(run) - before, kept)
            return artifact
    shutil.copytree(kept, run, dirs_exist_ok=True)
    return artifact


def texts() -> Path:
    """A part of Python's own documentation, a file per document."""
    folder = Path(os.environ[HOME]) / "texts"
    with alone(folder.with_suffix(".lock")):
        if not folder.exists():
            folder.mkdir()
            for name, text in sorted(pydoc_data.topics.topics.items())[:20]:
                (folder / f"{name}.txt").write_text(text)
    return folder


def fingerprints(run: Path, text: str) -> dict[str, str]:
    """Of every artifact of the run that a recipe names."""
    named = set(re.findall(r"artifact:([\w.-]+)", text))
    return {name: Artifact(run / name).manifest().fingerprint for name in sorted(named)}


def folders(run: Path) -> set[str]:
    """The artifacts of a run: a merged model is one more."""
    return {folder.name for folder in run.glob("[!.]*")}


def keep(run: Path, names: set[str], kept: Path) -> None:
    unfinished = kept.with_suffix(".part")
    for name in names:
        shutil.copytree(run / name, unfinished / name)
    unfinished.rename(kept)


@contextmanager
def alone(path: Path):
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
