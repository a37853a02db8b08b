"""No work ends for want of a reader, and no print ends in a traceback."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from llmpipe.run.artifact import Artifact
from tests import life

ROWS = [
    '{"prompt": "Où est la sœur ?", "completion": "À l’école — 学校 🙂."}',
    '{"prompt": "Wie heißt du?", "completion": "Größer als „Öl“."}',
] * 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, with samples in no ASCII."""
    folder = tmp_path_factory.mktemp("terminal")
    (folder / "rows.jsonl").write_text("\n".join(ROWS), encoding="utf-8")
    data = {"train": [{"path": str(folder / "rows.jsonl")}], "max_length": 128}
    samples = {"prompts": ["Où est la sœur ?"], "max_new_tokens": 4}
    path = life.write(
        folder / "run", data=data, samples=samples, evaluation={}, optim__steps=2, log={"every": 1}
    )
    life.command(path)
    return folder / "run"


def shell(line, **environment):
    """A line of bash in which $llmpipe is the command; what it ends with and prints."""
    environment = os.environ | {
        "PYTHONPATH": str(life.ROOT),
        "llmpipe": f"{sys.executable} -m llmpipe",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return subprocess.run(
        ["bash", "-c", line],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("command", ["--help", "schema sft", "show {run}", "sft {run}.yaml"])
def test_a_terminal_that_cannot_show_it_shows_something_else(run, encoding, command):
    line = f"$llmpipe {command.format(run=run)}"
    done = shell(line, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    if command.startswith("show"):
        assert "?" in done.stdout  # in place of the curve


@pytest.mark.faults
def test_a_training_in_ascii_says_its_samples(run, tmp_path):
    """Which a worker prints, in a process of its own; the log has them as they are."""
    line = f"$llmpipe sft {run}.yaml --run {tmp_path}/run"
    done = shell(line, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "before | O? est la s?ur ?" in done.stdout
    log = (tmp_path / "run" / "sft" / "log.txt").read_text(encoding="utf-8")
    assert "before | Où est la sœur ?" in log


@pytest.mark.parametrize("command", ["--help", "schema sft", "show {run}", "sft {run}.yaml"])
def test_a_reader_that_goes_is_no_error(run, command):
    command = command.format(run=run)
    done = shell(f"$llmpipe {command} | true; echo ${{PIPESTATUS[0]}}")
    assert done.stdout.strip() in ("0", "141") and done.stderr == ""
    done = shell(f"$llmpipe {command} >&- 2>&-; echo $?")
    assert done.stdout == "0\n" and done.stderr == ""


@pytest.mark.faults  # `make test` has what prints, and a reader that goes, without a process tree
def test_a_training_goes_on_without_its_reader(run, tmp_path):
    done = shell(f"$llmpipe sft {run}.yaml --run {tmp_path}/run | true; echo ${{PIPESTATUS[0]}}")
    assert done.stdout == "141\n" and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "sft" / "manifest.json").exists()
    assert "model published" in (tmp_path / "run" / "sft" / "log.txt").read_text()


AUDIENCES = {
    "head": ("| head -2; echo ${PIPESTATUS[0]} >&2", {}, ("0", "141")),
    "full": ("> /dev/full; echo $? >&2", {}, ("5",)),
    "closed": (">&- <&-; echo $? >&2", {}, ("0",)),
    "ascii": ("; echo $? >&2", {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, ("0",)),
}


@pytest.mark.faults
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("audience", AUDIENCES)
def test_a_training_ends_whoever_listens(run, tmp_path, audience, processes):
    """One rank or two, of which one prints."""
    rest, environment, codes = AUDIENCES[audience]
    values = yaml.safe_load(run.with_suffix(".yaml").read_text())
    values["samples"]["prompts"] = ["学校在哪里？"]
    recipe = json.dumps(values, ensure_ascii=False)
    (tmp_path / "mine.yaml").write_text(recipe, encoding="utf-8")
    sets = f"--run {tmp_path}/run --set launch.processes={processes}"
    line = f"$llmpipe sft {tmp_path}/mine.yaml {sets} {rest}"
    done = shell(line, PYTHONUTF8="0", **environment)
    assert done.stderr.splitlines()[-1] in codes and "Traceback" not in done.stderr, done.stderr
    if audience == "ascii":
        assert "before | ?????? -> " in done.stdout
    made = Artifact(tmp_path / "run" / "sft")
    assert made.verify().hardware["processes"] == processes
    assert "before | 学校在哪里？ -> " in (made.path / "log.txt").read_text(encoding="utf-8")


def test_a_full_disk_behind_standard_output_is_said(run):
    done = shell(f"$llmpipe show {run} > /dev/full")
    assert done.returncode == 5
    assert done.stderr == "error: standard output: No space left on device\n"


def test_a_mistake_is_told_on_whatever_there_is(tmp_path):
    done = shell(f"$llmpipe sft {tmp_path}/é.yaml", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 2 and "/?.yaml: no such recipe" in done.stderr
    assert shell(f"$llmpipe sft {tmp_path}/x.yaml 2>&-").returncode == 2


@pytest.mark.faults
def test_nothing_is_silent_on_a_terminal(tmp_path):
    """Three seconds are meant; a machine that does other things gets more."""
    from tests.test_screen import in_terminal

    code = (
        "import sys; sys.argv = ['llmpipe', 'sft', 'recipes/tiny/sft.yaml', '--run', "
        f"{str(tmp_path / 'run')!r}]; from llmpipe.front.cli import main; main()"
    )
    said = in_terminal(code, NO_COLOR="1", PYTHONPATH=str(life.ROOT))
    assert in_terminal.longest < 12
    live = [text for text in said.split("\r\033[K") if "\n" not in text]
    for shown in ("importing the libraries", "loading a model", "answering 3 prompts", "ETA"):
        assert any(shown in text for text in live), shown
    assert "\033[2m" not in said
    lines = (tmp_path / "run" / "sft" / "log.txt").read_text(encoding="utf-8").splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 10 and max(map(len, steps)) < 80
