"""What is done with files and folders, whatever lies there."""

from llmpipe import files


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
    files.remove(tmp_path / "deep")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]
    assert (kept / "file").read_text() == "stays"
    (tmp_path / "link").symlink_to(kept)
    files.remove(tmp_path / "link")
    files.remove(tmp_path / "nothing")
    assert (kept / "file").read_text() == "stays" and not (tmp_path / "link").is_symlink()
