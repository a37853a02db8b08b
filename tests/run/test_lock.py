"""Who may write, and what is said of a run in which nobody can."""

import errno
from pathlib import Path

import pytest

from llmpipe.errors import UserError
from llmpipe.run import lock
from llmpipe.run.artifact import Artifact, make_run
from llmpipe.run.lock import Lock
from tests import life


@pytest.mark.parametrize("run", ["/proc/run", "/sys/run", "file/run", "file", "n" * 300, "nul\0"])
def test_a_run_that_cannot_be_made(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(UserError, match=r"cannot be made: .+\n.*--run DIR") as refused:
        make_run(Path(run))
    assert refused.value.code == 5


def refuse(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied", "run/.locks")


def test_a_run_of_somebody_else(tmp_path, monkeypatch):
    """Root may write everywhere, so the refusal is played."""
    artifact = Artifact(tmp_path / "run" / "sft")
    artifact.path.mkdir(parents=True)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="run: cannot be written: Permission denied") as refused:
        Lock(artifact).acquire()
    assert refused.value.code == 5


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """As Lustre is mounted here and there."""

    def unlocked(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unlocked)
    with pytest.raises(UserError, match="run: cannot be written: No locks available") as refused:
        Lock(Artifact(tmp_path / "run" / "sft")).acquire()
    assert refused.value.code == 5


def test_a_parent_that_is_only_read_may_be_somebody_elses(tmp_path, monkeypatch):
    artifact = Artifact(tmp_path / "run" / "sft")
    artifact.path.mkdir(parents=True)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(lock, "make_run", refuse)
        with Lock(artifact, shared=True).acquire():
            pass
    assert not (artifact.run / ".locks").exists()


@pytest.mark.parametrize("plan", ["{", "a link"])
def test_one_that_is_busy_is_said_to_be_whatever_its_plan_is(tmp_path, plan):
    """A mistake is told with the paths of its plan, which may be damaged itself."""
    artifact = Artifact(tmp_path / "run" / "sft")
    artifact.path.mkdir(parents=True)
    if plan == "a link":
        (artifact.path / "plan.json").symlink_to(life.TINY / "rows.jsonl")
    else:
        (artifact.path / "plan.json").write_text(plan)
    with Lock(artifact).acquire(), pytest.raises(UserError, match="busy: pid") as busy:
        life.command(life.write(artifact.run))
    assert busy.value.code == 75
