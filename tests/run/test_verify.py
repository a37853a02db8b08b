"""`llmpipe verify`: every file of a run that is in a table, damaged in every way, is named."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llmpipe.errors import UserError
from llmpipe.files import json as documents
from llmpipe.files.json import write_json
from llmpipe.files.tables import table
from llmpipe.run import verify
from llmpipe.run.artifact import SCRATCH, Artifact, fingerprint
from llmpipe.run.verify import verify_run
from llmpipe.sums import seal
from tests import life, store

HURTS = ("flipped", "cut", "emptied", "swapped", "a link")


def verified(path) -> tuple[int, list[str]]:
    """The exit code of `llmpipe verify PATH`, and what it prints."""
    lines: list[str] = []
    try:
        verify_run(path, lines.append, lines.append)
    except UserError as error:
        return error.code, [*lines, error.message]
    return 0, lines


def hurt(path: Path, how: str, other: Path, aside: Path) -> bool:
    """Damage a file; whether that made it another one. `other` is what it is swapped with, and
    `aside` what a link leads to."""
    data = path.read_bytes()
    if how == "flipped":
        changed = bytearray(data)
        if data:
            changed[len(data) // 3] ^= 4
        path.write_bytes(changed)
    elif how == "cut":
        path.write_bytes(data[:-1])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "swapped":
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    else:
        path.rename(aside)
        path.symlink_to(aside)
        return True
    return path.read_bytes() != data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model with its checkpoints."""
    return store.made(life.write(tmp_path_factory.mktemp("verify") / "run"))


@pytest.fixture
def run(made, tmp_path):
    without = shutil.ignore_patterns(".*")  # not all that the store gives has it
    shutil.copytree(made.run, tmp_path / "run", ignore=without)
    return tmp_path / "run"


def test_a_whole_run(run):
    (run / "report.html").write_text("x")
    (run / "sft" / ".outcome.json.12").write_text("left by a kill")
    code, lines = verified(run)
    assert code == 0, lines
    files = len(Artifact(run / "sft").manifest().files)
    checkpoints = [path for path in (run / "sft" / "checkpoints").rglob("*") if path.is_file()]
    assert lines[0].startswith(f"{run}/sft  model by sft: {files} files, ")
    assert f"{run}/sft/checkpoints/step-12  checkpoint: " in lines[2]
    assert lines[-1].startswith(f"{run}: {files + len(checkpoints) - 2} files, ")  # less the sums
    assert lines[-1].endswith("all as recorded")
    assert verified(run / "sft")[0] == 0


def test_what_is_no_run(run, tmp_path):
    for path in (tmp_path, tmp_path / "nothing", run / "sft" / "log.txt", run / "sft" / "model"):
        assert verified(path)[0] == 2


@pytest.mark.parametrize("how", HURTS)
@pytest.mark.parametrize(
    "name",
    ["model/model.safetensors", "metrics.jsonl", "manifest.json", "checkpoints/step-12/sums.json"],
)
def test_a_damaged_file_is_named(run, name, how):
    home = run / "sft"
    other = run.parent / "config.json"
    shutil.copy(home / "model" / "config.json", other)
    assert hurt(home / name, how, other, run.parent / "aside")
    code, lines = verified(run)
    assert code == 3
    named = [line for line in lines if line.startswith(f"{home / name}: ")]
    assert len(named) == 1, lines
    assert lines[-1].startswith(f"{run}: 1 difference in ")
    assert os.path.basename(name) in "\n".join(verified(home)[1])


def test_each_difference_has_a_line_and_the_rest_is_looked_at(run):
    home = run / "sft"
    (home / "model" / "config.json").unlink()
    (home / "model" / "extra.py").write_text("import os")
    (home / "checkpoints" / "step-9" / "optimizer.pt").write_bytes(b"")
    code, lines = verified(run)
    assert code == 3
    for named in (
        f"{home}/model/config.json: missing",
        f"{home}/model/extra.py: not in the manifest",
        f"{home}/checkpoints/step-9/optimizer.pt: 0 bytes, recorded",
        f"{run}: 3 differences in ",
    ):
        assert any(line.startswith(named) for line in lines), named


@pytest.mark.parametrize(("folder", "named"), [(".", "."), ("sft", ".."), ("sft", ".")])
def test_from_within(run, monkeypatch, folder, named):
    """What is verified is not said to be in no table, by whatever way."""
    monkeypatch.chdir(run / folder)
    code, lines = verified(Path(named))
    assert code == 0
    assert not [line for line in lines if "in no table" in line]
    assert sum("model by sft: " in line for line in lines) == 1


def test_what_is_in_no_table_is_said(run):
    for stray in ("notes.txt", "sft/checkpoints/step-12.bak", "sft/checkpoints/step-x"):
        (run / stray).write_text("x")
    (run / "data").mkdir()
    code, lines = verified(run)
    assert code == 0
    for stray in ("notes.txt", "data", "sft/checkpoints/step-12.bak", "sft/checkpoints/step-x"):
        assert f"{run / stray}: in no table, so not verified" in lines


def test_what_a_run_keeps_is_verified(run):
    """A folder of `.prepared` has a table; one that an older llmpipe made has none, and is said."""
    kept = run / ".prepared" / "tokens"
    kept.mkdir(parents=True)
    (kept / "train.arrow").write_bytes(b"tokens")
    (run / ".prepared" / "older").mkdir()
    seal(kept)
    code, lines = verified(run)
    assert code == 0
    assert f"{kept}  kept to be read again: 1 file, 0.0 MB" in lines
    assert f"{run}/.prepared/older: in no table, so not verified" in lines
    (kept / "train.arrow").write_bytes(b"Tokens")
    code, lines = verified(run)
    assert code == 3 and any(line.startswith(f"{kept}/train.arrow: sha256 ") for line in lines)


def test_the_table_must_be_the_one_that_is_gone_on_with(run):
    """An unfinished artifact names it."""
    kept = run / ".prepared" / "tokens"
    kept.mkdir(parents=True)
    (run / "again").mkdir()
    (run / "again" / "recipe.yaml").touch()
    named = seal(kept)
    write_json(run / "again" / "prepared.json", {"data": "tokens", "sums": named})
    assert verified(run)[0] == 0
    (kept / "train.arrow").write_bytes(b"others")
    seal(kept)
    code, lines = verified(run)
    assert code == 3 and f"{kept}/sums.json: is not the table that was verified" in lines


def test_checkpoints_that_were_exchanged(run):
    home = run / "sft" / "checkpoints"
    (home / "step-9").rename(home / "step-x")
    (home / "step-12").rename(home / "step-9")
    (home / "step-x").rename(home / "step-12")
    code, lines = verified(run)
    assert code == 3
    assert f"{home}/step-9/sums.json: is of step 12" in lines
    sums = json.loads((home / "step-9" / "sums.json").read_text())
    sums |= {"step": 9, "identity": "0" * 64}
    write_json(home / "step-9" / "sums.json", sums | {"fingerprint": fingerprint(sums)})
    _, lines = verified(run)
    assert f"{home}/step-9/sums.json: is of another recipe than the artifact" in lines


def forge(artifact: Artifact, **changes) -> None:
    """Write an artifact's manifest anew, as whoever changed a file would."""
    files = table(artifact.path, SCRATCH | {"checkpoints"})
    manifest = replace(artifact.manifest(), files=files, **changes)
    document = manifest.document()
    write_json(artifact.path / "manifest.json", document | {"fingerprint": fingerprint(document)})


def add_child(run: Path) -> Artifact:
    """An artifact that was made from sft, as far as its manifest knows."""
    shutil.copytree(run / "sft", run / "child")
    parent, child = Artifact(run / "sft").manifest(), Artifact(run / "child")
    shutil.rmtree(child.checkpoints)
    identity = {"reference": "artifact:sft", "artifact": "sft", "fingerprint": parent.fingerprint}
    forge(child, name="child", models={"model": identity})
    return child


def test_a_forged_manifest_agrees_with_itself_and_not_with_its_child(run):
    parent, child = Artifact(run / "sft"), add_child(run)
    assert verified(run)[0] == 0
    (parent.model / "config.json").write_text("{}")
    forge(parent)
    assert verified(parent.path)[0] == 0
    code, lines = verified(run)
    assert code == 3
    (named,) = [line for line in lines if line.startswith(f"{child.path}/manifest.json: ")]
    assert "was made from artifact:sft" in named and "written by somebody else" in named
    assert any(str(child.path) in line for line in verified(child.path)[1][1:])


def test_a_parent_that_was_made_anew_is_no_difference(run):
    """Its old form lies beside it; and one that was taken away is not missed."""
    parent, _ = Artifact(run / "sft"), add_child(run)
    parent.move_aside()
    shutil.copytree(run / "sft.old-1", run / "sft")
    forge(parent, seed=7)
    code, lines = verified(run)
    assert code == 0, lines
    assert any(line.startswith(f"{run}/sft.old-1  model by sft: ") for line in lines)
    shutil.rmtree(run / "sft")
    shutil.rmtree(run / "sft.old-1")
    assert verified(run)[0] == 0


def test_a_manifest_that_was_lost(run):
    """Neither finished nor begun is nothing that llmpipe leaves."""
    (run / "sft" / "manifest.json").unlink()
    code, lines = verified(run)
    assert code == 3 and f"{run}/sft/manifest.json: missing" in lines
    (run / "sft" / "recipe.yaml").unlink()
    assert verified(run)[0] == 3


def test_what_an_unfinished_artifact_goes_on_from(made, tmp_path):
    shutil.copytree(life.ROOT / "tests" / "fixtures" / "run-0.1" / "run", tmp_path / "run")
    run = tmp_path / "run"
    code, lines = verified(run)
    assert code == 0, lines
    assert f"{run}/lora  not finished: no table" in lines
    with (run / "lora" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # it is being written
    assert verified(run)[0] == 0
    text = (run / "lora" / "metrics.jsonl").read_text()
    (run / "lora" / "metrics.jsonl").write_text(text.replace("{", "[", 1))
    (run / "lora" / "log.txt").unlink()
    (run / "lora" / "log.txt").symlink_to(tmp_path / "log")
    code, lines = verified(run)
    assert code == 3
    assert f"{run}/lora/metrics.jsonl: line 1 cannot be read" in lines
    assert f"{run}/lora/log.txt: a link" in lines


@pytest.mark.parametrize("name", ["plan.json", "prepared.json", "recipe.yaml"])
def test_what_two_that_are_begun_exchanged(tmp_path, name):
    """Each is as llmpipe wrote it, and knows whose it is; one that was renamed is no difference."""
    run = tmp_path / "run"
    for begun in ("one", "two"):
        path = life.write(run, name=begun)
        life.command(path, only_prepare=True)
    (run / "two").rename(run / "renamed")
    assert verified(run)[0] == 0
    (run / "renamed").rename(run / "two")
    if name == "prepared.json":
        of_tokens = next((run / ".prepared").glob("*/prepared.json"))
        one = (run / "one" / name).read_bytes()
        (run / "one" / name).write_bytes(of_tokens.read_bytes())
        named = f"{run / 'one' / name}: is that of a folder in .prepared"
        assert named in verified(run)[1]
        (run / "one" / name).write_bytes(one)
    assert hurt(run / "one" / name, "swapped", run / "two" / name, tmp_path / "aside")
    code, lines = verified(run)
    assert code == 3
    for begun in ("one", "two"):
        assert any(line.startswith(f"{run / begun / name}: ") for line in lines), lines


def test_nothing_is_silent_for_long(run, monkeypatch):
    """What takes long says how far it is; each chunk of a large file counts."""
    monkeypatch.setattr(verify, "PATIENCE", 0.0)
    notes: list[str] = []
    verify_run(run, lambda line: None, notes.append)
    assert (
        len(notes) > 20
        and notes[-1] == f"hashed {notes[-1].split(' of ')[1]} of " + notes[-1].split(" of ")[1]
    )


def test_an_evaluation_that_lost_its_manifest(run):
    """It has neither a model nor checkpoints."""
    home = run / "eval"
    home.mkdir()
    for name in ("recipe.yaml", "results.json", "samples.jsonl", "log.txt"):
        (home / name).write_text("stage: eval")
    code, lines = verified(run)
    assert code == 3
    assert f"{home}/manifest.json: missing" in lines


def test_an_artifact_that_nobody_may_look_into(run, monkeypatch):
    """Root may look into all, so the refusal is played."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "sft")
    code, lines = verified(run)
    assert code == 3
    assert f"{run}/sft/manifest.json: cannot be read: Permission denied" in lines


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_a_sector_that_cannot_be_read(run, monkeypatch, name):
    """What else there is, is verified."""
    if name == "plan.json":
        (run / "sft" / "manifest.json").rename(run / "sft" / name)
    model = run / "other"
    shutil.copytree(run / "sft", model)
    (model / "recipe.yaml").write_text("changed")

    def read(path, read_text=documents.read_text):
        if path == run / "sft" / name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read_text(path)

    monkeypatch.setattr(documents, "read_text", read)
    code, lines = verified(run)
    assert code == 3
    assert f"{run}/sft/{name}: cannot be read: Input/output error" in lines
    assert any(line.startswith(f"{run}/other/") for line in lines)


@pytest.mark.parametrize(
    ("add", "code", "hint"),
    [
        (lambda home: (home / ".DS_Store").write_text("x"), 3, "remove what was added"),
        (lambda home: (home / "log.txt").unlink(), 0, ""),
        (lambda home: (home / "recipe.yaml").unlink(), 3, "restore it"),
    ],
    ids=["added", "not part of it", "lost"],
)
def test_the_remedy_is_of_what_is_wrong(run, add, code, hint):
    add(run / "sft")
    if not code:
        Artifact(run / "sft").verify()
        return
    with pytest.raises(UserError) as refused:
        Artifact(run / "sft").verify()
    assert refused.value.code == code
    assert hint in str(refused.value.hint)
