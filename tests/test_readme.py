"""What README.md says can be typed is typed here, as written, in a copy of the checkout."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmpipe import errors
from llmpipe.front import cli, launch
from llmpipe.recipe.check import load
from llmpipe.stages import STAGES, schema
from tests import life

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
COPIED = ("llmpipe", "recipes")
NOT_HERE = {"source .venv/bin/activate": "the tests run in an environment already"}
SECONDS = 600  # for one command, on a machine that does other things as well


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(text: str) -> list[str]:
    lines = [line for block in blocks(text, "bash") for line in block.split("\n")]
    return [line for line in lines if line and not line.startswith("#")]


TYPED = [line for line in commands(README) if not line.startswith("make ") and line not in NOT_HERE]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the commands use, and the environment that a person would have after
    activating .venv."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    if not shutil.which("llmpipe", path=Path(sys.executable).parent):
        pytest.skip("llmpipe is not installed in this environment; make setup installs it")
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("LLMPIPE_", "ACCELERATE_"))
    }
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return folder, environment | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "hub"),
    }


def test_the_readme_shows_the_whole_front_door():
    for command in (
        "make quickstart",
        "make test",
        "llmpipe sft",
        "llmpipe show",
        "llmpipe schema",
        "llmpipe init",
    ):
        assert any(line.startswith(command) for line in commands(README)), command


@pytest.mark.parametrize(
    "line", [line for line in commands(README + CONTRIBUTING) if line.startswith("make ")]
)
def test_make_targets_exist(line):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in line.split()[1:]:
        assert re.search(rf"^{target}:", makefile, re.M), line


SHELL = re.compile(r"[|>]|^(?!llmpipe )")  # lines that need one, or another program
LAUNCHED = "accelerate launch"
IN_A_SHELL = ("llmpipe show runs/tiny", "llmpipe schema sft", "llmpipe init my-first-run")


def typed(line: str, folder: Path, environment: dict[str, str]) -> None:
    """Type a line in a shell."""
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stdout + done.stderr, f"{line}\n{done.stderr[-3000:]}"


def called(line: str, monkeypatch, capsys) -> None:
    """The same command with its workers, in this process, where the heavy libraries are imported
    once."""
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    assert not end.value.code, f"{line}\n{printed.out[-3000:]}\n{printed.err[-3000:]}"


def promised_files_are_there(run: Path) -> None:
    assert (run / "sft" / "manifest.json").exists()
    of_a_run = README.split("## What a run directory holds")[1]
    for name in set(re.findall(r"^\| `([\w.]+)/?` \|", of_a_run, re.M)):
        assert (run / "sft" / name).exists(), f"README's table of a run names {name}"


def test_commands_run_in_their_order(checkout, monkeypatch, capsys):
    """Every command of llmpipe's in this process; in a shell what needs one, and three of the
    front door's. Other launchers are started by tests/front/test_processes.py, and by `make
    faults`, which types every line."""
    folder, environment = checkout
    monkeypatch.chdir(folder)
    monkeypatch.setattr(launch, "start", life.start_here)
    monkeypatch.setattr(launch, "begun_early", life.nobody_early)
    for line in TYPED:
        if line in IN_A_SHELL or (SHELL.search(line) and "llmpipe" not in line):
            typed(line, folder, environment)
        elif not SHELL.search(line):
            called(line, monkeypatch, capsys)
        elif piped := re.fullmatch(r"echo '(.*)' \| (llmpipe chat .*)", line):
            monkeypatch.setattr(sys, "stdin", io.StringIO(piped[1] + "\n"))
            called(piped[2], monkeypatch, capsys)
        else:
            assert line.startswith(LAUNCHED), line
    promised_files_are_there(folder / "runs" / "tiny")


@pytest.mark.faults
def test_commands_run_as_written(checkout):
    folder, environment = checkout
    shutil.rmtree(folder / "runs", ignore_errors=True)
    for line in TYPED:
        typed(line, folder, environment)
    promised_files_are_there(folder / "runs" / "tiny")


def test_recipes_in_the_readme_are_valid(tmp_path):
    shown = [block for block in blocks(README, "yaml") if "stage:" in block]
    assert shown
    for block in shown:
        path = tmp_path / "mine.yaml"
        path.write_text(block, encoding="utf-8")
        name = re.search(r"^stage: (\w+)", block, re.M)[1]
        assert block.startswith(f"# llmpipe {name} mine.yaml\n")
        load(path, schema(name))


def test_the_mistake_in_the_readme_is_answered_so(tmp_path):
    block = next(block for block in blocks(README, "yaml") if "stage:" in block)
    path = tmp_path / "mine.yaml"
    path.write_text(block.replace("learning_rate", "learning_rte"), encoding="utf-8")
    with pytest.raises(errors.UserError) as caught:
        load(path, schema("sft"))
    (promised,) = re.findall(r"`mine\.yaml(:\d+: .*?\?)`", README)
    assert promised in str(caught.value)


def test_exit_codes_are_the_real_ones():
    told = [
        int(code)
        for cell in re.findall(r"^\| ([\d, ]+) \|", README, re.M)
        for code in cell.split(",")
    ]
    real = [
        value for name, value in vars(errors).items() if name.isupper() and isinstance(value, int)
    ]
    assert sorted(told) == sorted([*real, 1])


def test_what_is_not_there_yet_is_not_promised():
    """Every `llmpipe WORD` that can be typed from the README is a command."""
    from llmpipe.front.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(STAGES) <= known
    for line in commands(README):
        if match := re.match(r"(?:accelerate launch )?llmpipe (\w+)", line):
            assert match[1] in known, line


def test_links_lead_somewhere():
    for name, text in (("README.md", README), ("CONTRIBUTING.md", CONTRIBUTING)):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{name}: {target}"
