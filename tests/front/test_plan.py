"""`llmpipe plan`: what each process would hold, by the shape of a model."""

from __future__ import annotations

from tests import life

RECIPES = life.ROOT / "recipes"


def test_a_plan_says_what_fits(llmpipe):
    config = RECIPES / "shapes" / "llama-3.1-8b.json"
    code, out, err = llmpipe("plan", str(RECIPES / "llama-8b-fsdp.yaml"), "--config", str(config))
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("sft: 8.03 B weights; 4,096 tokens a pass in bf16")
    assert lines[7].split() == ["in", "all", "179.9", "37.8"]
    assert lines[8].split()[-2:] == ["-107.9", "34.2"] and lines[9] == "ddp does not fit"


def test_a_plan_reads_the_model_that_lies_there(llmpipe, tmp_path):
    code, out, _ = llmpipe("plan", str(life.write(tmp_path / "run")), "--processes", "2")
    assert code == 0 and "2 processes" in out and "does not fit" not in out
    recipe = life.write(tmp_path / "other", model="some/model")
    code, _, err = llmpipe("plan", str(recipe))
    assert code == 2 and "give its config.json with --config" in err
    code, _, err = llmpipe("plan", str(recipe), "--config", str(recipe))
    assert code == 2 and "no shape of a model" in err and "Traceback" not in err
