"""What is done with files and folders, whatever lies there."""

import os
from pathlib import Path

import pytest

from llmpipe.files.json import write_json
from llmpipe.files.writing import publishing, remove


@pytest.fixture
def order(monkeypatch):
    """(what was done, the path) of everything that was synced or renamed, as it came."""
    seen, rename = [], os.rename

    def synced(descriptor):
        seen.append(("synced", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def renamed(source, target):
        seen.append(("renamed", Path(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    return seen


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, order):
    """And its name is there before anything relies on it."""
    path = tmp_path / "a.json"
    write_json(path, {})
    (first, temporary), *then = order
    assert first == "synced" and temporary.parent == tmp_path and temporary != path
    assert then == [("renamed", path), ("synced", tmp_path)]


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, order):
    target = tmp_path / "made"
    with publishing(target) as staging:
        (staging / "below").mkdir()
        (staging / "a").write_text("a")
        (staging / "below" / "b").write_text("b")
    at = order.index(("renamed", target))
    everything = {staging, staging / "a", staging / "below", staging / "below" / "b"}
    assert {path for done, path in order[:at] if done == "synced"} == everything
    assert order[at + 1 :] == [("synced", tmp_path)]


def test_a_folder_is_removed_however_deep_and_with_its_links_alone(tmp_path):
    """`shutil.rmtree` calls itself for every folder in another, and dies of a thousand."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("stays")
    deep = tmp_path / "deep"
    for _ in range(1200):
        deep.mkdir()
        deep = deep / "d"
    (deep.parent / "file").write_text("goes")
    (tmp_path / "deep" / "link").symlink_to(kept)
    (tmp_path / "deep" / "dangling").symlink_to(tmp_path / "nowhere")
    remove(tmp_path / "deep")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]
    assert (kept / "file").read_text() == "stays"
    (tmp_path / "link").symlink_to(kept)
    remove(tmp_path / "link")
    remove(tmp_path / "nothing")
    assert (kept / "file").read_text() == "stays" and not (tmp_path / "link").is_symlink()
