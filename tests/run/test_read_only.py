"""Parents, models and runs on storage that nobody can write: a reader needs no file of its own."""

import os
import sys
import traceback
from pathlib import Path

import pytest

from llmpipe.files.writing import settle
from llmpipe.front import cli
from llmpipe.run.artifact import Artifact
from tests import disks, life
from tests.evaluation import test_eval
from tests.models import test_adapters


def started(home: Path) -> None:
    """Mount a finished run read-only, and start from what lies there."""
    out = (home / "out").open("w", buffering=1)
    sys.stdout = sys.stderr = out
    disks.alone()
    mounted = home / "mounted"
    disks.mount("--bind", str(home / "made"), str(mounted))
    disks.mount("-o", "remount,ro,bind", str(mounted))
    try:
        run = home / "run"
        steps = {"optim__steps": 2, "evaluation": {}}
        with pytest.raises(OSError, match="Read-only"):
            (mounted / "file").touch()
        life.command(life.write(run, model=f"{mounted}/run/sft/model", **steps))
        life.command(test_adapters.write(run, model=f"{mounted}/run/sft", **steps))
        adapter = {"rank": 2, "alpha": 4, "continue": False}
        life.command(
            test_adapters.write(
                run, name="on", model=f"{mounted}/run/lora", adapter=adapter, **steps
            )
        )
        data = [{"path": str(life.TINY / "rows.jsonl"), "limit": 4}]
        models = {"sft": f"{mounted}/run/sft", "lora": f"{mounted}/run/lora"}
        life.command(test_eval.write(run, [{"task": "perplexity", "data": data}], models))
        for name in ("sft", "lora", "on", "eval"):
            Artifact(run / name).verify()
        cli.show(mounted / "run")
        cli.report([mounted / "run"], home / "report.html")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def test_a_parent_on_storage_that_is_read_only(tmp_path):
    made = tmp_path / "made" / "run"
    made.parent.mkdir()
    (tmp_path / "mounted").mkdir()
    steps = {"optim__steps": 2, "evaluation": {}}
    life.command(life.write(made, **steps))
    life.command(test_adapters.write(made, model="artifact:sft", **steps))
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}
    process = life.forked(started, tmp_path)
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "out").read_text()
    assert (tmp_path / "report.html").exists()
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}


def test_others_read_what_one_publishes(tmp_path):
    """Checkpoints, rows and artifacts on a disk that several people share."""
    life.command(life.write(tmp_path / "run", optim__steps=2, evaluation={}))
    umask = os.umask(0)
    os.umask(umask)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*.*")}
    files = {path.name: mode for path, mode in modes.items() if path.is_file()}
    assert {"seen.safetensors", "model.safetensors", "train.arrow", "manifest.json"} <= set(files)
    assert {name: oct(mode) for name, mode in files.items() if mode != 0o666 & ~umask} == {}


def test_a_file_that_another_person_began(tmp_path, monkeypatch):
    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    (tmp_path / "log.txt").write_text("begun")
    monkeypatch.setattr(Path, "chmod", refuse)
    settle([tmp_path / "log.txt"])
