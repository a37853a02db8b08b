"""Links that somebody planted in a run: nothing is written through them, and none is published."""

import os

import pytest

from llmpipe.errors import UserError
from llmpipe.files.tables import FileEntry, differences, sha256_file, table
from llmpipe.files.writing import publishing, to_write
from llmpipe.run.artifact import Artifact
from tests import life

WRITTEN = (
    *("recipe.yaml", "plan.json", "prepared.json", "outcome.json", "log.txt"),
    *("metrics.jsonl", "samples.jsonl", "rollouts.jsonl", "rejected.jsonl", "seen.safetensors"),
    *("manifest.json", "model", "notes", ".metrics.jsonl"),
)
"""What a run writes into an artifact, and what somebody may have put beside it."""


def plant(path, how, target):
    """Something at `path` that is no file of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if how == "link":
        path.symlink_to(target)
    elif how == "dangling":
        path.symlink_to(target.with_name("nothing"))
    elif how == "second name":
        path.hardlink_to(target)
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("mode", ["w", "a", "wb", "ab"])
@pytest.mark.parametrize("how", ["link", "dangling", "second name", "pipe", "folder"])
def test_nothing_is_written_through_what_is_no_file(tmp_path, how, mode):
    target = tmp_path / "target"
    target.write_text("mine")
    plant(tmp_path / "log.txt", how, target)
    with pytest.raises(UserError, match=r"log.txt: .*nothing is written") as refused:
        to_write(tmp_path / "log.txt", mode)
    assert refused.value.code == 3
    assert target.read_text() == "mine" and not (tmp_path / "nothing").exists()


def test_a_file_is_written(tmp_path):
    path = tmp_path / "log.txt"
    for mode, text in (("w", "long"), ("w", "one "), ("a", "ÿ")):
        with to_write(path, mode) as file:
            file.write(text)
    with to_write(path, "ab") as file:
        file.truncate(4)
    assert path.read_text(encoding="utf-8") == "one "
    assert not path.stat().st_mode & 0o111


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *[("log.txt", "link"), ("metrics.jsonl", "dangling"), ("manifest.json", "link")],
        *[life.by_the_dozen(name, how) for name in WRITTEN for how in ("link", "dangling")],
    ],
)
def test_a_link_in_an_artifact_is_refused_at_the_start(tmp_path, name, how):
    target = tmp_path / "target"
    target.write_text("mine")
    plant(tmp_path / "run" / "sft" / name, how, target)
    path = life.write(tmp_path / "run")
    with pytest.raises(UserError) as refused:
        life.command(path)
    assert refused.value.code == 3 and f"{name}: a link" in str(refused.value)
    assert target.read_text() == "mine" and not (tmp_path / "nothing").exists()
    assert {entry.name for entry in (tmp_path / "run" / "sft").iterdir()} == {name}


def test_fresh_moves_links_aside_and_an_artifact_may_lie_elsewhere(tmp_path):
    """The folder of an artifact may itself be a link, as to a greater disk."""
    target = tmp_path / "target"
    target.write_text("mine")
    plant(tmp_path / "run" / "sft" / "log.txt", "link", target)
    (tmp_path / "disk").mkdir()
    (tmp_path / "run" / "elsewhere").symlink_to(tmp_path / "disk")
    life.command(life.write(tmp_path / "run", optim__steps=1, samples={}), fresh=True)
    Artifact(tmp_path / "run" / "sft").verify()
    made = life.command(life.write(tmp_path / "run", name="elsewhere", optim__steps=1, samples={}))
    made.verify()
    assert (tmp_path / "disk" / "manifest.json").is_file()
    assert target.read_text() == "mine"


def test_publishing_replaces_a_link_and_not_what_it_names(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "a").write_text("mine")
    for name in ("t", ".t.staging", ".t.old"):
        (tmp_path / name).symlink_to(kept)
    with publishing(tmp_path / "t") as staging:
        (staging / "a").write_text("new")
    assert (tmp_path / "t" / "a").read_text() == "new"
    assert (kept / "a").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"t", "kept"}


@pytest.mark.parametrize("how", ["link", "dangling", "pipe", "folder"])
def test_what_is_no_file_differs_from_every_table(tmp_path, how):
    """Also where an empty file is recorded, which a pipe has the size of; nothing is waited for."""
    home, copy = tmp_path / "home", tmp_path / "copy"
    for folder in (home, copy):
        (folder / "model").mkdir(parents=True)
        (folder / "empty").touch()
        (folder / "model" / "x").write_text("x")
    recorded = table(home)
    assert differences(home, recorded) == []
    (home / "empty").unlink()
    plant(home / "empty", how, copy / "empty")
    (problem,) = differences(home, recorded)
    assert problem.startswith("empty: ")


def test_a_linked_folder_differs_though_all_in_it_is_the_same(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("x")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "model").symlink_to(tmp_path / "other")
    sha256 = sha256_file(tmp_path / "other" / "x")
    assert differences(tmp_path / "home", {"model/x": FileEntry(1, sha256)}) == ["model: a link"]


def test_checkpoints_may_lie_on_another_disk(tmp_path):
    """A folder that they are linked to is written, read and gone on from like any other."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (tmp_path / "run" / "sft").mkdir(parents=True)
    (tmp_path / "run" / "sft" / "checkpoints").symlink_to(scratch)
    path = life.write(tmp_path / "run", optim__steps=6)
    killed = life.Trial(path, hook="kill_after_checkpoint_3")
    assert killed.wait() == -9, killed.text()
    assert {folder.name for folder in scratch.iterdir()} == {"step-3"}
    resumed = life.Trial(path)
    assert resumed.wait() == 0 and "resuming from step-3" in resumed.text(), resumed.text()
    artifact = Artifact(tmp_path / "run" / "sft")
    assert not [name for name in artifact.verify().files if name.startswith("checkpoints")]
    straight = life.command(life.write(tmp_path / "straight", optim__steps=6))
    assert life.essence(artifact) == life.essence(straight)
    assert {folder.name for folder in scratch.iterdir()} == {"step-3", "step-6"}
