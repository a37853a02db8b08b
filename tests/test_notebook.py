"""notebooks/quickstart.ipynb, cell by cell, in small: the tiny model, one epoch, not installed."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from llmpipe.front import cli, launch
from tests import life

ROOT = Path(__file__).parent.parent
NOTEBOOK = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))
IN_SMALL = {
    'MODEL = "Qwen/Qwen3-0.6B"': f'MODEL = "{life.TINY / "model"}"',
    "EPOCHS = 12": "EPOCHS = 1",
}


def cells() -> list[str]:
    """What is run: code, but for what installs."""
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    kept = [cell for cell in code if "install" not in cell["metadata"].get("tags", ())]
    assert len(kept) == len(code) - 1
    return ["".join(cell["source"]) for cell in kept]


def run(line: str, names: dict[str, object], monkeypatch, capsys) -> None:
    """A line that begins with `!`, as a notebook would: llmpipe's commands in this process."""
    line = re.sub(r"\{(\w+)\}", lambda match: str(names[match[1]]), line)
    if line.startswith("head "):
        assert Path(line.split()[-1]).exists()
        return
    if piped := re.fullmatch(r"echo '(.*)' \| (llmpipe chat .*)", line):
        monkeypatch.setattr(sys, "stdin", io.StringIO(piped[1] + "\n"))
        line = piped[2]
    assert line.startswith("llmpipe "), line
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    assert not end.value.code, f"{line}\n{printed.out[-3000:]}\n{printed.err[-3000:]}"


def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "start", life.start_here)
    monkeypatch.setattr(launch, "begun_early", life.nobody_early)
    names: dict[str, object] = {}
    for cell in cells():
        for written, small in IN_SMALL.items():
            cell = cell.replace(written, small)
        python = [line for line in cell.split("\n") if not line.startswith("!")]
        exec(compile("\n".join(python), "cell", "exec"), names)
        for line in cell.split("\n"):
            if line.startswith("!"):
                run(line[1:], names, monkeypatch, capsys)
    assert (tmp_path / "runs" / "mine" / "report.html").exists()
    assert (tmp_path / "runs" / "mine" / "lora" / "manifest.json").exists()


def test_it_is_kept_without_outputs():
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert NOTEBOOK["nbformat"] == 4
