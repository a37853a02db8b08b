"""Another engine's Python is known by the command that lies beside it."""

import os
import sys
from pathlib import Path

from llmpipe.run.interpreters import environment_of, python_of


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_a_command_on_path_tells_its_python(tmp_path, monkeypatch):
    python = put(tmp_path / "engine" / "bin" / "python", "#!/bin/sh\n")
    command = put(tmp_path / "engine" / "bin" / "vllm-of-a-test", "#!/nowhere/python\n")
    assert python_of("vllm-of-a-test") is None
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}{os.pathsep}{command.parent}")
    assert python_of("vllm-of-a-test") == str(python)
    linked = tmp_path / "links" / "vllm-linked"
    linked.parent.mkdir()
    linked.symlink_to(command)
    monkeypatch.setenv("PATH", str(linked.parent))
    assert python_of("vllm-linked") == str(python)
    python.unlink()
    assert python_of("vllm-linked") == "/nowhere/python"


def test_its_process_sees_none_of_our_packages(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    theirs = environment_of("/srv/engine/bin/python")
    assert "PYTHONPATH" not in theirs and theirs["HF_HUB_OFFLINE"] == "1"
    assert environment_of(sys.executable)["PYTHONPATH"] == "/ours"
