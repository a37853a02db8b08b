"""outcome.json: what a worker says of its end, and what the command makes of it."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest

from llmpipe import faults
from llmpipe.errors import DONE, NUMERIC, SIGTERM, Stopped, UserError
from llmpipe.front.launch import finish
from llmpipe.run.artifact import Artifact
from llmpipe.run.outcome import BEGUN, EAR, ENDING, Outcome, listening, say_to_command
from llmpipe.ties import PARENT
from tests.life import guarded


@pytest.fixture
def artifact(tmp_path):
    return Artifact(tmp_path)


@pytest.mark.parametrize(
    ("outcome", "written"),
    [
        (Outcome(DONE), {"code": 0}),
        (Outcome(SIGTERM, "stopped at step 3"), {"code": 143, "message": "stopped at step 3"}),
        (
            Outcome.of(UserError("loss is NaN", "lower it", NUMERIC)),
            {"code": 4, "message": "loss is NaN", "hint": "lower it"},
        ),
    ],
)
def test_what_is_written_is_read_again(artifact, outcome, written):
    outcome.write(artifact)
    assert json.loads((artifact.path / "outcome.json").read_text()) == written
    assert Outcome.read(artifact) == outcome


def test_what_no_file_can_hold_is_read_as_a_question_mark(artifact):
    Outcome(2, "half a \ud83d pair").write(artifact)
    assert Outcome.read(artifact) == Outcome(2, "half a ? pair")


def test_what_it_raises():
    Outcome(DONE).check()
    with pytest.raises(Stopped) as stopped:
        Outcome(SIGTERM, "stopped at step 3").check()
    assert (stopped.value.code, stopped.value.message) == (143, "stopped at step 3")
    with pytest.raises(UserError) as failed:
        Outcome(NUMERIC, "loss is NaN", "lower it").check()
    assert (failed.value.code, failed.value.hint) == (4, "lower it")


@pytest.mark.parametrize("text", ["", "[]", '{"message": "no code"}', '{"code": "4"}', "{"])
def test_a_damaged_one_is_none(artifact, text):
    (artifact.path / "outcome.json").write_text(text)
    assert Outcome.read(artifact) is None
    Outcome.clear(artifact)
    Outcome.clear(artifact)  # nothing to forget
    assert Outcome.read(artifact) is None


def test_who_cannot_write_it_down_says_it_to_who_waits(tmp_path, monkeypatch):
    """Also through a launcher between, which hands on the environment alone."""
    nowhere = Artifact(tmp_path / "no" / "such")
    with listening() as ear:
        assert ear.heard() is None
        code = "from llmpipe.run.outcome import Outcome; from llmpipe.run.artifact import Artifact;"
        code += "from pathlib import Path; import sys;"
        code += "Outcome(5, 'full', 'make room').deliver(Artifact(Path(sys.argv[1])))"
        command = [sys.executable, "-c", code, str(nowhere.path)]
        subprocess.run(command, check=True, env=os.environ | ear.environment)
        monkeypatch.setenv(*ear.environment.popitem())
        Outcome(3, "later").deliver(nowhere)
        assert ear.heard() == Outcome(5, "full", "make room")


@pytest.mark.parametrize("plan", ["{", "a folder"])
def test_a_worker_says_how_it_ended_whatever_its_plan_is(artifact, plan):
    """The command has written it just now, and something has damaged it since."""
    path = artifact.path / "plan.json"
    if plan == "a folder":
        path.mkdir()
    else:
        path.write_text(plan)
    command = [sys.executable, "-m", "llmpipe.front.start_worker", "prepare", str(artifact.path)]
    here = os.environ | {PARENT: str(os.getpid())}
    worker = subprocess.run(command, env=here, capture_output=True, text=True, check=False)
    outcome = Outcome.read(artifact)
    assert (worker.returncode, outcome and outcome.code) == (3, 3), worker.stderr
    assert "plan.json: damaged: no JSON object" in outcome.message
    assert "Traceback" not in worker.stderr


def test_who_dies_without_a_word_is_explained_by_the_disk_or_a_limit(tmp_path, monkeypatch):
    artifact = Artifact(tmp_path)
    with pytest.raises(UserError, match="ended with status 1") as bug:
        finish(None, 1, artifact, "less")
    assert bug.value.code == 1
    monkeypatch.setattr(faults, "unwritable", lambda _: errno.ENOSPC)
    with pytest.raises(UserError, match=r"No space left on device; .* are free") as full:
        finish(None, 1, artifact, "less")
    monkeypatch.undo()
    monkeypatch.setattr(faults.resource, "getrlimit", lambda _: (600_000_000, -1))
    monkeypatch.setattr(faults, "unwritable", lambda _: None)
    with pytest.raises(UserError, match=r"600\.0 MB of memory \(ulimit -v\)\n  less") as short:
        finish(None, 1, artifact, "less")
    assert full.value.code == short.value.code == 5


def test_an_end_is_told_where_no_more_files_can_be_opened(tmp_path):
    """By a worker that has opened as many as it may."""
    (tmp_path / "plan.json").write_text("{}")
    artifact = Artifact(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def work():
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        (tmp_path / "metrics.jsonl").open("a")

    try:
        outcome = guarded(artifact, work)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert outcome.code == 5 and "Too many open files" in outcome.message


def test_what_a_worker_is_at_is_no_end(monkeypatch):
    with listening() as ear:
        monkeypatch.setenv(EAR, ear.environment[EAR])
        assert not ear.has_heard(BEGUN)
        say_to_command(BEGUN)
        assert ear.has_heard(BEGUN) and not ear.has_heard(ENDING)
        assert ear.heard() is None and ear.said() == []
        say_to_command(Outcome(code=4, message="no").values())
        say_to_command(ENDING)
        assert ear.heard().code == 4 and len(ear.said()) == 1
