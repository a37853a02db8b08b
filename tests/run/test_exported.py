"""One format of an export is named by its folder, and verified alone."""

import shutil

import pytest
import yaml

from llmpipe.errors import DATA, INTEGRITY, UserError
from llmpipe.run.artifact import Artifact
from llmpipe.run.exported import exported
from tests import life, store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An adapter, and its export in three formats."""
    run = tmp_path_factory.mktemp("exported") / "run"
    adapter = {"rank": 4, "embeddings": "none"}
    quick = {"optim__steps": 2, "evaluation": {}, "samples": {}}
    store.made(life.write(run, name="low-rank", adapter=adapter, **quick))
    values = {
        "stage": "export",
        "run": str(run),
        "model": "artifact:low-rank",
        "formats": {"merged": ["fp32"], "adapter": True, "gguf": ["f16"]},
    }
    path = run.parent / "export.yaml"
    path.write_text(yaml.safe_dump(values))
    return store.made(path)


@pytest.fixture
def export(made, tmp_path):
    """A copy to spoil."""
    run = tmp_path / "run"
    shutil.copytree(made.run, run)
    return Artifact(run / made.name)


def test_each_format_is_what_its_folder_holds(made):
    merged, adapter, gguf = (
        exported(str(made.path / name), "chat") for name in ("merged-fp32", "adapter", "gguf-f16")
    )
    assert [one.kind for one in (merged, adapter, gguf)] == ["merged", "adapter", "gguf"]
    assert [one.model.kind for one in (merged, adapter, gguf)] == ["folder", "artifact", "gguf"]
    assert merged.model.base is None and merged.model.folder == merged.folder
    assert adapter.model.is_adapter and adapter.model.base.reference.endswith("model")
    file = gguf.folder / "model-f16.gguf"
    assert gguf.model.folder == file
    assert exported(str(file), "chat") == gguf
    source = Artifact(made.run / "low-rank").manifest()
    assert merged.manifest.probe.stops == source.probe.stops
    texts = [[said.text for said in one.probe.said] for one in (merged.manifest, source)]
    assert texts[0] == texts[1]


def test_what_is_no_part_of_an_export_is_none(made):
    for path in (made.run, made.run / "low-rank", made.run / "low-rank" / "model", "nowhere/x"):
        assert exported(str(path), "chat") is None


def test_a_whole_export_and_another_folder_of_it_are_told_what_there_is(export):
    names = ", ".join(str(export.path / name) for name in ("merged-fp32", "adapter", "gguf-f16"))
    with pytest.raises(UserError, match="is an export, and one format of it is taken") as whole:
        exported(str(export.path), "chat")
    assert whole.value.hint == f"there are: {names}" and whole.value.code == DATA
    (export.path / "notes").mkdir()
    with pytest.raises(UserError, match=r"^push: .*notes: is no format of ") as other:
        exported(str(export.path / "notes"), "push")
    assert other.value.hint == "there are: merged-fp32, adapter, gguf-f16"


@pytest.mark.parametrize("name", ["merged-fp32/model.safetensors", "exports.jsonl"])
def test_what_is_not_as_it_was_written_is_refused(export, name):
    path = export.path / name
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: sha256") as caught:
        exported(str(export.path / "merged-fp32"), "chat")
    assert caught.value.code == INTEGRITY


def test_another_format_may_be_damaged(export):
    (export.path / "gguf-f16" / "model-f16.gguf").unlink()
    assert exported(str(export.path / "merged-fp32"), "chat").kind == "merged"
    with pytest.raises(UserError, match=r"model-f16.gguf: missing"):
        exported(str(export.path / "gguf-f16"), "chat")


def test_an_export_that_is_not_finished_is_refused(export):
    (export.path / "manifest.json").unlink()
    for path in (export.path, export.path / "merged-fp32"):
        with pytest.raises(UserError, match=r"export.*not finished") as caught:
            exported(str(path), "serve")
        assert caught.value.code == INTEGRITY
