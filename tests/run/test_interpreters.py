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
    assert python_of("vllm-linked") is None


def test_without_a_python_beside_it_the_first_line_of_a_command_tells(tmp_path, monkeypatch):
    python = put(tmp_path / "pythons" / "python3-of-a-test", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{python.parent}")
    lines = {
        f"#!{python} -I\n": str(python),
        "#!/usr/bin/env python3-of-a-test\n": str(python),
        "#!/usr/bin/env -S python3-of-a-test -I\n": str(python),
        "#!/usr/bin/env python-that-is-nowhere\n": None,
        "#!/bin/sh\n": None,
        "#!\n": None,
        "": None,
    }
    for line, expected in lines.items():
        put(tmp_path / "vllm-of-a-test", line)
        assert python_of("vllm-of-a-test") == expected, line


def test_its_process_sees_none_of_our_packages(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    theirs = environment_of("/srv/engine/bin/python")
    assert "PYTHONPATH" not in theirs and theirs["HF_HUB_OFFLINE"] == "1"
    assert environment_of(sys.executable)["PYTHONPATH"] == "/ours"
