"""`llmpipe plan`: what each process would hold, by the shape of a model."""

from __future__ import annotations

import pytest

from tests import life

RECIPES = life.ROOT / "recipes"


def test_a_plan_says_what_fits(llmpipe):
    config = RECIPES / "shapes" / "llama-3.1-8b.json"
    code, out, err = llmpipe("plan", str(RECIPES / "llama-8b-fsdp.yaml"), "--config", str(config))
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("sft: 8.03 B weights; 4,096 tokens a pass in bf16")
    assert lines[7].split() == ["in", "all", "179.9", "37.8"]
    assert lines[8].split()[-2:] == ["-107.9", "34.2"]
    assert lines[9].split() == ["host's", "memory,", "a", "checkpoint", "89.7", "11.2"]
    assert lines[10] == "ddp does not fit"


def test_a_plan_is_of_as_many_processes_as_the_recipe_has(llmpipe, tmp_path):
    for changes, options, count in (
        ({"launch__processes": 4}, (), 4),
        ({"launch__processes": 4}, ("--processes", "2"), 2),
        ({"launch__processes": "auto"}, (), 8),
    ):
        recipe = life.write(tmp_path / "run", **changes, optim__batch_size=16)
        code, out, err = llmpipe("plan", str(recipe), *options)
        assert code == 0 and f"GiB of each of {count} processes" in out, err


def test_a_plan_of_several_machines(llmpipe):
    """Two models in eight parts each: as much in each process as of one in eight."""
    recipe = str(RECIPES / "llama-8b-fsdp.yaml")
    config = ("--config", str(RECIPES / "shapes" / "llama-3.1-8b.json"), "--machines", "2")
    code, out, err = llmpipe("plan", recipe, *config, "--processes", "16")
    assert code == 0, err
    assert out.splitlines()[1].split()[-3:] == ["ddp", "fsdp", "hsdp"]
    assert out.splitlines()[7].split()[2:] == ["179.9", "30.3", "37.8"]
    code, _, err = llmpipe("plan", recipe, *config, "--processes", "9")
    assert code == 2 and "9 processes are not as many on each of 2 machines" in err


def test_a_plan_of_what_lies_in_the_hosts_memory(llmpipe):
    """A device has what is whole for a moment, and activations."""
    recipe = str(RECIPES / "llama-8b-fsdp.yaml")
    config = ("--config", str(RECIPES / "shapes" / "llama-3.1-8b.json"))
    code, out, err = llmpipe("plan", recipe, *config, "--set", "launch.offload=true")
    assert code == 0, err
    rows = {line[:28].strip(): line[28:].split() for line in out.splitlines()}
    for name in ("weights", "gradients", "moments"):
        assert float(rows[name][0]) > 20 and rows[name][1] == "0.0"
    assert rows["in the host's memory"] == ["0.0", "15.0"], "16 bytes a weight, over 8 processes"
    assert rows["in all"] == ["179.9", "22.8"]
    assert rows["host's memory, a checkpoint"] == ["89.7", "11.2"], "12 bytes a weight"
    code, out, _ = llmpipe("plan", recipe, *config, "--set", "checkpoint.asynchronous=false")
    assert code == 0 and "host" not in out


@pytest.mark.parametrize(("stage", "models"), [("ppo", "critic and reward"), ("grpo", "reward")])
def test_a_plan_counts_all_of_the_models(llmpipe, stage, models):
    code, out, err = llmpipe("plan", str(RECIPES / "tiny" / f"{stage}.yaml"))
    assert code == 0 and f"\n{models} models are counted as large as the policy" in out, err


def test_a_plan_reads_the_model_that_lies_there(llmpipe, tmp_path):
    code, out, _ = llmpipe("plan", str(life.write(tmp_path / "run")), "--processes", "2")
    assert code == 0 and "2 processes" in out and "does not fit" not in out
    recipe = life.write(tmp_path / "other", model="some/model")
    code, _, err = llmpipe("plan", str(recipe))
    assert code == 2 and "give its config.json with --config" in err
    code, _, err = llmpipe("plan", str(recipe), "--config", str(recipe))
    assert code == 2 and "no shape of a model" in err and "Traceback" not in err


@pytest.mark.parametrize("stage", ["eval", "sample"])
def test_what_does_not_train_has_no_plan(llmpipe, stage):
    code, out, err = llmpipe("plan", str(RECIPES / "tiny" / f"{stage}.yaml"))
    assert (code, out) == (2, "") and f"{stage}: plan knows stages that train" in err
