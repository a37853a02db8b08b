"""One run directory or one on each machine: what is seen, who keeps a mirror, what goes there."""

from types import SimpleNamespace

import pytest

from llmpipe.front import mirrored, outside
from llmpipe.front.mirrored import Sight
from llmpipe.run.artifact import Artifact
from llmpipe.run.machine import file_system


@pytest.fixture
def artifact(tmp_path):
    (tmp_path / ".locks").mkdir()
    return Artifact(tmp_path / "sft")


@pytest.mark.parametrize(("kind", "seconds"), [("nfs4", mirrored.SIGHT), ("ext4", 1)])
def test_what_rank_0_writes_is_seen_or_not(artifact, monkeypatch, kind, seconds):
    """Two folders that have one name on two machines, or one that both have. A server of files may
    show it late, this machine's own disk does not.
    """
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("GROUP_RANK", "3")
    monkeypatch.setattr(mirrored, "file_system", lambda folder: kind)
    mirrored.look_path(artifact, 0).write_text("this")
    waits = []
    assert mirrored.look(artifact, "this", waits.append) == Sight(True, "3")
    assert not waits
    assert mirrored.look(artifact, "another launch", waits.append) == Sight(False, "3")
    assert sum(waits) == pytest.approx(seconds)
    assert [path.name for path in (artifact.run / ".locks").iterdir()] == ["sft.0.look"]


def test_a_machine_without_the_run_makes_none(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    artifact = Artifact(tmp_path / "runs" / "tiny" / "sft")
    assert not mirrored.look(artifact, "this", lambda seconds: None).sees
    assert not list(tmp_path.iterdir())


def test_the_kind_of_a_file_system_is_that_of_the_nearest_folder(tmp_path):
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    number = f"{device >> 8}:{device & 0xFF}"
    mounts.write_text(
        "22 1 99:1 / / rw - tmpfs none rw\n"
        f"36 35 {number} / /mnt rw,noatime master:1 shared:2 - nfs4 server:/home rw\n"
    )
    assert file_system(tmp_path / "not" / "there", mounts) == "nfs4"
    assert file_system(tmp_path, tmp_path / "none") == ""


def test_the_first_rank_of_each_blind_machine_keeps_its_mirror():
    seen, one, two = Sight(True, "0"), Sight(False, "1"), Sight(False, "2")
    assert mirrored.keepers([seen, seen]) == {}
    assert mirrored.keepers([seen, one, one, two]) == {2: "1", 4: "2"}


class Told:
    """Other processes, in their words."""

    launch = "this"

    def __init__(self, **sights):
        self.sights = sights
        self.said = {}

    def turn(self):
        return "this.1"

    def say(self, key, text):
        self.said[key] = text

    def hear(self, key, of):
        return self.sights[key.rpartition("/")[2]].told()


@pytest.mark.parametrize("sees", [True, False])
def test_a_machine_that_does_not_see_the_run_is_named_with_what_it_means(
    artifact, monkeypatch, sees
):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    turn = outside.Turn(Told(**{"1": Sight(True, "0"), "2": Sight(sees, "1")}))
    lines = []
    outside.find_mirrors(SimpleNamespace(artifact=artifact, say=lines.append), turn)
    assert turn.peers.said == {"this.1/word/1": "look 0"}
    assert not list((artifact.run / ".locks").iterdir())
    if sees:
        assert turn.mirrors is None and not lines
        return
    assert turn.mirrors.machines == {2: "1"} and turn.mirrors.run == artifact.run
    (line,) = lines
    assert "is not seen on machine 1" in line and f".{artifact.run.name}.mirror" in line


def test_one_machine_is_not_asked_what_it_sees(artifact, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    turn = outside.Turn(Told())
    outside.find_mirrors(SimpleNamespace(artifact=artifact, say=None), turn)
    assert turn.peers.said == {} and turn.mirrors is None
