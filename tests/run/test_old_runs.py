"""A run of llmpipe 0.1.0 (tests/fixtures/run-0.1) is skipped, resumed, continued and reported.

Of its artifacts sft and eval are finished; lora and ppo were stopped at step 9 of 12.
"""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmpipe.errors import UserError
from llmpipe.files.json import write_json
from llmpipe.report.page import write_report
from llmpipe.report.terminal import show_run
from llmpipe.run.artifact import Artifact
from llmpipe.run.manifest import Parent
from llmpipe.training import schedule
from tests import life

OLD = life.ROOT / "tests" / "fixtures" / "run-0.1"
RUN = Path("runs/old")


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A current folder that is as the old code left it."""
    shutil.copytree(OLD / "run", tmp_path / RUN)
    shutil.copytree(life.TINY, tmp_path / "recipes" / "tiny")
    monkeypatch.chdir(tmp_path)
    return RUN


def recipe(made, **changes):
    """The recipe that an old artifact was made with, changed."""
    values = life.put(json.loads((OLD / "recipes" / f"{made}.yaml").read_text()), changes)
    path = Path(f"{made}.yaml")
    path.write_text(json.dumps(values))
    return path


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", ["sft", "eval"])
def test_finished_work_is_skipped(old, capsys, stage):
    before = files_of(old / stage)
    artifact = life.command(recipe(stage))
    assert f"{artifact.path}: skip: finished" in capsys.readouterr().out
    assert files_of(old / stage) == before
    artifact.verify()


def test_an_adapter_is_resumed_as_it_was_begun(old, capsys, monkeypatch):
    """Behind the warm-up the rates are what they were; within it step 1 had none. To the bit only
    on the machine that wrote the checkpoint."""
    resumed = life.command(recipe("lora"))
    out = capsys.readouterr().out
    assert f"{resumed.path}: resume: not finished" in out
    assert "step-9: what comes of it is not exact, bit by bit: it does not say" in out
    training = resumed.manifest().training
    assert not training.exact_resume and [leg.after for leg in training.legs] == [9]
    assert "; resumed, and not exactly" in show_run(resumed.path)
    anew = life.command(recipe("lora", name="anew"))
    monkeypatch.setattr(schedule, "share_of_peak", lambda step, warmup, then: then(step))
    straight = life.command(recipe("lora", name="straight"))
    assert apart(resumed, straight) < 1e-5
    assert apart(anew, straight) > 1e-4


def apart(one, other):
    """The greatest difference of a weight of two adapters."""
    one, other = (load_file(made.model / "adapter_model.safetensors") for made in (one, other))
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_ppo_is_refused(old):
    """Its learning rates and random numbers were others: no bit would be the straight run's."""
    with pytest.raises(UserError) as refused:
        life.command(recipe("ppo"))
    assert refused.value.code == 3
    assert "\n" not in refused.value.message and "step-9" in refused.value.message
    assert "--fresh" in refused.value.hint
    assert not Artifact(old / "ppo").finished


def test_a_new_stage_begins_on_old_work(old):
    pairs = [{"path": "./recipes/tiny/pairs.jsonl"}]
    changes = {"name": "dpo", "model": "artifact:sft", "data__train": pairs, "optim__steps": 2}
    dpo = life.command(recipe("sft", stage="dpo", **changes))
    assert dpo.verify().parents == [Parent("sft", Artifact(old / "sft").verify().fingerprint)]


def test_old_work_is_shown_and_reported(old):
    shown = show_run(old)
    for name in ("sft", "lora", "ppo", "eval"):
        assert name in shown
    assert show_run(old / "sft")
    page = write_report([old], None).read_text()
    for text in ("exact_match", "What is 2 + 2?", "artifact:sft"):
        assert text in page


def test_a_manifest_that_lacks_a_field_is_refused(tmp_path):
    """One line with code 3, whoever wrote it, and no traceback."""
    from llmpipe.sums import fingerprint

    shutil.copytree(OLD / "run", tmp_path / "run")
    artifact = Artifact(tmp_path / "run" / "sft")
    document = json.loads((artifact.path / "manifest.json").read_text())
    del document["data"]["rows"]["train"]
    document["fingerprint"] = fingerprint(document)
    write_json(artifact.path / "manifest.json", document)
    with pytest.raises(UserError, match=r"manifest.json: data.rows.train: is missing") as refused:
        artifact.manifest()
    assert refused.value.code == 3
