"""What can be known ahead is known before the first stage starts: every problem, with its line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from llmpipe.errors import UserError
from llmpipe.front import ahead
from llmpipe.recipe.check import load_pipeline
from llmpipe.stages import schema
from tests import ggufs, life

TINY = life.TINY

FIRST = f"""\
run: run
stages:
  - stage: sft
    model: {TINY}/model
    data: {{train: [{{path: {TINY}/rows.jsonl}}], max_length: 64}}
    optim: {{learning_rate: 1e-3, batch_size: 4, steps: 2, precision: fp32}}
    checkpoint: {{every: 1}}
    launch: {{processes: 1, threads: 1}}
  - stage: reward
    model: artifact:sft
    data: {{train: [{{path: {TINY}/pairs.jsonl}}], max_length: 64}}
    optim: {{learning_rate: 1e-3, batch_size: 4, steps: 2, precision: fp32}}
    launch: {{processes: 1, threads: 1}}
"""

DPO = f"""\
  - stage: dpo
    model: artifact:sft
    data:
      train:
        - path: {TINY}/pairs.jsonl
      max_length: 64
      template: auto
    optim:
      learning_rate: 1e-3
      batch_size: 4
      steps: 2
      precision: fp32
    log: {{trackers: []}}
    launch: {{processes: 1, threads: 1, micro_batch_size: auto}}
"""

PPO = f"""\
  - stage: ppo
    model: artifact:sft
    data:
      train:
        - path: {TINY}/pairs.jsonl
      max_length: 64
    reward:
      - model: artifact:reward
      - function: ./rewards.py:length
    rollout: {{max_new_tokens: 8}}
    optim: {{learning_rate: 1e-3, batch_size: 4, steps: 1}}
    launch: {{processes: 1, threads: 1}}
"""

EVAL = f"""\
  - stage: eval
    models:
      base: {TINY}/model
      sft: artifact:sft
    tasks:
      - task: perplexity
        data: [{{path: {TINY}/rows.jsonl}}]
      - task: generate
        score: [exact_match, rouge]
        data: [{{path: {TINY}/rows.jsonl}}]
    gate:
      perplexity: {{max_ratio_to_parent: 2}}
      generate.exact_match: {{min: 0.0}}
    launch: {{threads: 1}}
"""

REWARDS = """\
def length(prompts, completions, reference, **columns):
    return [float(len(text)) for text in completions]

def bare(texts):
    return [0.0 for _ in texts]

async def later(prompts, completions, reference):
    return [0.0 for _ in prompts]

NUMBER = 3
raise RuntimeError("this file is not to be run to be looked at")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with a file of rewards, and no Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.docx").write_text("no rows")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jinja").write_text("{% if x %}\n{% endfr %}")
    (tmp_path / "broken.py").write_text("def length(:\n")
    return tmp_path


class Mistake(NamedTuple):
    """One change to a sound stage, and what is said of it."""

    stage: str
    changes: dict[str, str]
    words: str
    """A pattern of the complaint."""
    at: str = ""
    """What stands on its line; the first change, unless said."""


def write(mistake: Mistake) -> int:
    """Write pipe.yaml, the changed stage behind two sound ones; the line of the complaint."""
    last = mistake.stage
    for old, new in mistake.changes.items():
        assert old in last
        last = last.replace(old, new, 1)
    Path("pipe.yaml").write_text(FIRST + last)
    at = mistake.at or next(iter(mistake.changes.values()))
    return (FIRST + last[: last.index(at)]).count("\n") + 1


MISTAKES = {
    "an artifact that no stage makes": Mistake(
        DPO,
        {"model: artifact:sft": "model: artifact:sfft"},
        "model: artifact:sfft: there is no such artifact in run.*did you mean 'sft'",
    ),
    "a kind of artifact that the stage does not take": Mistake(
        DPO,
        {"model: artifact:sft": "model: artifact:reward"},
        "stage 2 makes a reward-model of it; this stage takes model or adapter",
    ),
    "itself": Mistake(
        DPO, {"model: artifact:sft": "model: artifact:dpo"}, "is what this stage itself makes"
    ),
    "a checkpoint behind the last step": Mistake(
        DPO, {"model: artifact:sft": "model: artifact:sft@9"}, "stage 1 ends at step 2"
    ),
    "a model folder": Mistake(
        DPO, {"model: artifact:sft": "model: ./modle"}, "no such file or folder"
    ),
    "a model without ./": Mistake(
        DPO,
        {"model: artifact:sft": "model: data"},
        r"is a folder here, and a path starts with \./; did you mean \./data\?",
    ),
    "an address": Mistake(
        DPO,
        {"model: artifact:sft": "model: https://huggingface.co/org/name"},
        "is an address.*write org/name",
    ),
    "a model that the cache does not have, offline": Mistake(
        DPO,
        {"model: artifact:sft": "model: nobody/nothing"},
        "the Hub cannot be reached and the model is not in the local cache",
    ),
    "a GGUF file": Mistake(
        DPO, {"model: artifact:sft": "model: ./m.gguf"}, "no such file or folder"
    ),
    "a data file": Mistake(
        DPO, {f"path: {TINY}/pairs.jsonl": "path: ./pairs.jsonl"}, "no such file"
    ),
    "a glob that matches nothing": Mistake(
        DPO, {f"path: {TINY}/pairs.jsonl": "path: ./data/*.jsonl"}, "no such file"
    ),
    "a folder without rows": Mistake(
        DPO, {f"path: {TINY}/pairs.jsonl": "path: ./data"}, "no data files in this folder"
    ),
    "an unknown kind of file": Mistake(
        DPO,
        {f"path: {TINY}/pairs.jsonl": "path: ./data/notes.docx"},
        ".docx is not a known kind of file",
    ),
    "an empty file": Mistake(
        DPO, {f"path: {TINY}/pairs.jsonl": "path: ./empty.jsonl"}, "the file is empty"
    ),
    "rows of another format": Mistake(
        DPO,
        {f"path: {TINY}/pairs.jsonl": f"path: {TINY}/rows.jsonl"},
        "rows.jsonl: format messages does not fit this stage; it takes preference",
    ),
    "items of another format": Mistake(
        EVAL,
        {"task: generate": "task: choice", "score: [exact_match, rouge]": "name: generate"}
        | {"generate.exact_match": "generate.acc"},
        "rows.jsonl: format messages does not fit this stage; it takes choice",
        at=f"        data: [{{path: {TINY}/rows.jsonl}}]\n    gate",
    ),
    "rows of an artifact": Mistake(
        DPO,
        {f"path: {TINY}/pairs.jsonl": "path: artifact:sft"},
        "artifact:sft: stage 1 makes a model of it; this stage takes dataset",
    ),
    "a data set of the Hub, offline": Mistake(
        DPO, {f"path: {TINY}/pairs.jsonl": "path: nobody/nothing"}, "HF_HUB_OFFLINE is set"
    ),
    "a template": Mistake(
        DPO,
        {"template: auto": "template: chatlm"},
        "not one of auto, chatml, alpaca, llama3; did you mean 'chatml'",
    ),
    "a template that is none": Mistake(
        DPO, {"template: auto": "template: ./broken.jinja"}, "chat template, line 2"
    ),
    "a tracker": Mistake(
        DPO,
        {"log: {trackers: []}": "log: {trackers: [tensorboard, mlflow]}"},
        "log.trackers.1: mlflow is not installed; pip install 'mlflow'",
    ),
    "a batch that does not divide": Mistake(
        DPO,
        {"batch_size: 4": "batch_size: 6", "micro_batch_size: auto": "micro_batch_size: 4"},
        r"optim.batch_size \(6\) must be a multiple of launch.micro_batch_size \(4\)",
    ),
    "an objective that needs whole steps": Mistake(
        DPO,
        {
            "    optim:": "    objective: aot\n    optim:",
            "batch_size: 4": "batch_size: 8",
            "max_length: 64": "max_length: 1024",
        },
        "aot depends on how a step is cut",
    ),
    "more processes than a batch has rows": Mistake(
        DPO,
        {"processes: 1": "processes: 3"},
        r"optim.batch_size \(4\) must be a multiple of launch.processes \(3\)",
        at="batch_size: 4",
    ),
    "a layer for an adapter": Mistake(
        DPO,
        {"    log:": "    adapter: {targets: [v_proj, qproj]}\n    log:"},
        r"adapter.targets: no linear layer is called qproj; did you mean 'q_proj'\?",
        at="adapter:",
    ),
    "answers that leave no room": Mistake(
        EVAL,
        {"score: [exact_match, rouge]": "score: [exact_match]\n        max_new_tokens: 512"},
        "tasks.1.max_new_tokens: 512 tokens, and .* takes 512 with the prompt",
        at="        max_new",
    ),
    "a reward that is no reward model": Mistake(
        PPO,
        {"model: artifact:reward": "model: artifact:sft@2"},
        "stage 1 makes a model of it; this stage takes reward-model",
    ),
    "a file of rewards": Mistake(
        PPO,
        {"function: ./rewards.py:length": "function: ./reward.py:length"},
        r"\./reward.py: no such file",
    ),
    "a reward function": Mistake(
        PPO,
        {"function: ./rewards.py:length": "function: ./rewards.py:lenght"},
        "no attribute 'lenght'; did you mean 'length'",
    ),
    "a reward function of other arguments": Mistake(
        PPO,
        {"function: ./rewards.py:length": "function: ./rewards.py:bare"},
        "line 4: bare does not take prompts, completions, reference",
    ),
    "a reward function that is async": Mistake(
        PPO,
        {"function: ./rewards.py:length": "function: ./rewards.py:later"},
        "line 7: later is async",
    ),
    "a reward function that is none": Mistake(
        PPO,
        {"function: ./rewards.py:length": "function: ./rewards.py:NUMBER"},
        "line 10: NUMBER is no function",
    ),
    "a file of rewards that is no Python": Mistake(
        PPO,
        {"function: ./rewards.py:length": "function: ./broken.py:length"},
        "line 1: invalid syntax",
    ),
    "a gate on what no task measures": Mistake(
        EVAL,
        {"generate.exact_match: {min: 0.0}": "generate.exact_mach: {min: 0.0}"},
        "no task measures it; did you mean 'generate.exact_match'",
    ),
    "a gate on what two tasks measure": Mistake(
        EVAL,
        {
            "task: generate": "task: perplexity",
            "score: [exact_match, rouge]": "name: again",
            "generate.exact_match: {min: 0.0}": "again.perplexity: {min: 0.0}",
        },
        "several tasks have it; say of which one: perplexity.perplexity, again.perplexity",
        at="perplexity: {max_ratio",
    ),
    "a gate on what is not measured of a reward model": Mistake(
        EVAL,
        {
            "sft: artifact:sft": "sft: artifact:reward",
            "perplexity: {max": "accuracy: {max",
            "\n      generate.exact_match: {min: 0.0}": "",
        },
        "gate.accuracy: no task measures it",
        at="accuracy: {max",
    ),
    "a gate on a parent that is not measured": Mistake(
        EVAL,
        {f"base: {TINY}/model": "base: artifact:reward"},
        "the parent of sft is not among models; add it to `models:`",
        at="perplexity: {max_ratio",
    ),
    "a misspelt field": Mistake(EVAL, {"gate:": "gates:"}, "unknown key; did you mean 'gate'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_last_stage_is_known_before_the_first_one_starts(llmpipe, here, name):
    mistake = MISTAKES[name]
    line = write(mistake)
    code, out, err = llmpipe("run", "pipe.yaml")
    assert (code, out) == (2, ""), err
    [complaint] = err.splitlines()
    assert complaint.startswith(f"error: pipe.yaml:{line}: ")
    assert re.search(mistake.words, complaint)
    assert not Path("run").exists()


@pytest.mark.parametrize("last", [DPO, PPO, EVAL], ids=["dpo", "ppo", "eval"])
def test_a_sound_pipeline_has_no_mistake(here, last):
    write(Mistake(last, {"stage:": "stage:"}, ""))
    ahead.check(load_pipeline(Path("pipe.yaml"), schema).stages)
    assert Path("run").is_dir()


def test_a_file_that_is_converted_first_has_no_mistake(here):
    """A GGUF, as in the quickstart: its header is known, and the rest once it is read."""
    ggufs.write(life.TINY / "model", here / "m.gguf")
    (here / "pipe.yaml").write_text((FIRST + PPO + EVAL).replace(f"{TINY}/model", "./m.gguf"))
    pipeline = load_pipeline(here / "pipe.yaml", schema)
    ahead.check(pipeline.stages, pipeline=pipeline)


def test_what_a_run_in_a_home_starts_from_is_known_as_well(llmpipe, here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    text = FIRST.replace("run: run", "run: ~/run") + DPO
    said = complaints(llmpipe, text + "    adapter: {targets: [qproj]}\n")
    assert len(said) == 1 and "no linear layer is called qproj" in said[0]


def complaints(llmpipe, text: str) -> list[str]:
    """What is said of a pipeline that may not start."""
    Path("pipe.yaml").write_text(text)
    code, out, err = llmpipe("run", "pipe.yaml")
    assert (code, out) == (2, "") and not Path("run").exists(), err
    return err.removeprefix("error: ").splitlines()


def test_every_mistake_of_every_stage_at_once_in_the_order_of_the_file(llmpipe, here):
    text = FIRST + DPO + EVAL
    text = text.replace("batch_size: 4", "batch_sise: 4", 1)  # of sft, which is then not read
    text = text.replace(f"{TINY}/pairs.jsonl", "./a.jsonl", 1).replace(
        "artifact:sft", "artifact:stf"
    )
    said = complaints(llmpipe, text)
    wrong = ("batch_sise", "artifact:stf", "./a.jsonl")
    lines = [i for i, line in enumerate(text.split("\n"), 1) if any(one in line for one in wrong)]
    assert [line.partition(" ")[0] for line in said] == [f"pipe.yaml:{i}:" for i in lines]
    assert len(lines) == 5
    assert "batch_sise: unknown key" in said[0] and "artifact:stf" in said[-1]


def test_stages_in_the_wrong_order_and_of_one_name(llmpipe, here):
    head, sft, reward = re.split(r"(?m)^(?=  - stage)", FIRST)
    [said] = complaints(llmpipe, head + reward + sft)
    assert said.startswith("pipe.yaml:4: model: artifact:sft: is made later, by stage 2")
    [said] = complaints(llmpipe, head + sft + sft.replace("sft\n", "sft\n    seed: 7\n", 1))
    assert said.startswith("pipe.yaml:9: name: sft: stage 1 makes one of that name, too")
    merged = sft.replace("sft\n", "sft\n    adapter: {merge: true}\n", 1)
    named = sft.replace("sft\n", "sft\n    name: sft-merged\n", 1)
    [said] = complaints(llmpipe, head + merged + named)
    assert said.startswith("pipe.yaml:11: name: sft-merged: stage 1 makes one of that name, too")


@pytest.mark.parametrize(
    ("adapter", "reference", "words"),
    [
        ("", "artifact:sft@1", None),
        ("", "artifact:sft@2", None),
        ("", "./run/sft", None),
        ("", "./run/sft/model", None),
        ("", "artifact:sft-merged", "there is no such artifact in run"),
        ("{merge: true}", "artifact:sft", None),
        ("{merge: true}", "artifact:sft-merged", None),
        ("{merge: true}", "artifact:sft@1", "is a checkpoint of an adapter"),
    ],
)
def test_what_an_earlier_stage_makes_is_there_in_time(llmpipe, here, adapter, reference, words):
    text = FIRST + DPO.replace("artifact:sft", reference)
    if adapter:
        text = text.replace("stage: sft\n", f"stage: sft\n    adapter: {adapter}\n")
    if words:
        [said] = complaints(llmpipe, text.replace("artifact:sft\n", "./run/sft\n", 1))
        assert words in said
        return
    Path("pipe.yaml").write_text(text)
    ahead.check(load_pipeline(Path("pipe.yaml"), schema).stages)


def test_rows_that_an_earlier_stage_writes_are_there_in_time(here):
    text = FIRST + DPO.replace(f"{TINY}/pairs.jsonl", "./run/sft/rejected.jsonl")
    Path("pipe.yaml").write_text(text)
    ahead.check(load_pipeline(Path("pipe.yaml"), schema).stages)


def test_a_checkpoint_needs_no_finished_artifact(llmpipe, here):
    path = life.write(here / "run", optim__steps=3, checkpoint={"every": 1}, evaluation={})
    assert llmpipe("sft", path)[0] == 0
    (here / "run" / "sft" / "manifest.json").unlink()
    for reference, words in (("artifact:sft@2", ""), ("artifact:sft@9", "there are: 2, 3")):
        path = life.write(here / "run", name="again", model=reference, evaluation={}, samples={})
        code, _, err = llmpipe("prepare", path)
        assert code == (2 if words else 0) and words in err
    assert "is not finished" in llmpipe("prepare", path, "--set", "model=artifact:sft")[2]


def test_a_stage_that_starts_from_itself_ends_no_search(llmpipe, here):
    """It is said of that stage, and a gate on what comes of it does not go round and round."""
    ring = FIRST.replace("model: artifact:sft", "model: artifact:reward")
    measured = f"""\
  - stage: eval
    models: {{base: {TINY}/model, reward: artifact:reward}}
    tasks: [{{task: preference, data: [{{path: {TINY}/pairs.jsonl}}]}}]
    gate: {{accuracy: {{max_ratio_to_parent: 2}}}}
"""
    [said] = complaints(llmpipe, ring + measured)
    assert said.startswith("pipe.yaml:10: model: artifact:reward: is what this stage itself makes")


def test_checkpoints_that_are_removed_again_are_not(llmpipe, here):
    text = FIRST.replace("steps: 2", "steps: 9", 1).replace("every: 1", "every: 3")
    for step, words in ((4, "writes a checkpoint every 3 steps"), (3, "keeps its last 2")):
        [said] = complaints(llmpipe, text + DPO.replace("artifact:sft", f"artifact:sft@{step}"))
        assert words in said
    Path("pipe.yaml").write_text(text + DPO.replace("artifact:sft", "artifact:sft@6"))
    ahead.check(load_pipeline(Path("pipe.yaml"), schema).stages)


def test_what_lies_there_finished_is_as_good_as_made(llmpipe, here):
    """And is looked at: its kind, and what a gate compares it with."""
    Path("pipe.yaml").write_text(FIRST)
    assert llmpipe("run", "pipe.yaml")[0] == 0
    head, _, _ = re.split(r"(?m)^(?=  - stage)", FIRST)
    Path("pipe.yaml").write_text(head + DPO + EVAL)
    ahead.check(load_pipeline(Path("pipe.yaml"), schema).stages)

    for text, words in (
        (DPO.replace(":sft", ":reward"), "is of kind 'reward-model'; this stage takes model or"),
        (DPO.replace(":sft", ":reword"), "did you mean 'reward'?; there are: "),
        (EVAL.replace(f"{TINY}/model", "artifact:reward"), "the parent of sft is not among"),
    ):
        Path("pipe.yaml").write_text(head + text)
        code, out, err = llmpipe("run", "pipe.yaml")
        assert words in err and out == ""
        assert code == (3 if "kind" in words else 2)

    # with --fresh nothing of what is made anew lies there
    Path("pipe.yaml").write_text(head + DPO + FIRST.removeprefix(head))
    ahead.check(load_pipeline(Path("pipe.yaml"), schema).stages)
    code, _, err = llmpipe("run", "pipe.yaml", "--fresh")
    assert code == 2 and "is made later, by stage 2" in err


def test_a_file_of_equal_content_may_be_the_parent(here):
    """Two paths may hold the same model, which only reading them tells."""
    Path("pipe.yaml").write_text(FIRST + EVAL.replace(f"base: {TINY}/model", f"base: {here}/copy"))
    shutil.copytree(TINY / "model", here / "copy")
    ahead.check(load_pipeline(Path("pipe.yaml"), schema).stages)


def test_one_stage_is_looked_at_before_its_rows_are_prepared(llmpipe, here):
    wrong = {"log": {"trackers": ["mlflow"]}, "data__template": "chatlm", "model": "./modle"}
    path = life.write(here / "run", optim__batch_size=3, **wrong)
    code, out, err = llmpipe("sft", path)
    assert (code, out) == (2, "") and not (here / "run").exists()
    for words in ("./modle: no such", "mlflow is not", "'chatml'", "optim.batch_size (3) must be"):
        assert words in err
    assert len(err.splitlines()) == 4 and err.count(f"{path}:") == 4


def test_an_engine_that_is_not_installed_is_named_without_torch(here):
    """With the line of the field, what to install, and exit code 2."""
    from tests.rl.test_ppo import write

    path = write(here / "run", rollout={"engine": "vllm", "max_new_tokens": 12})
    text = json.dumps(json.loads(path.read_text()), indent=1)
    path.write_text(text)
    line = text[: text.index('"engine"')].count("\n") + 1
    code = "import sys\nfrom llmpipe.front.cli import main\ntry:\n    main()\nfinally:\n"
    code += "    print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "ppo", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "False\n")
    what = "rollout.engine: vllm is not installed; pip install vllm && pip install llmpipe"
    assert done.stderr.strip().endswith(f"{path}:{line}: {what}")


def test_prepare_needs_no_tracker(llmpipe, here):
    """It is for a cheap machine."""
    path = life.write(here / "run", log={"trackers": ["mlflow"]})
    assert llmpipe("prepare", path)[0] == 0
    assert "mlflow is not installed" in llmpipe("sft", path)[2]


def test_what_is_finished_asks_nothing_of_this_machine(llmpipe, here, monkeypatch):
    path = life.write(here / "run", optim__steps=1, evaluation={}, samples={})
    assert llmpipe("sft", path)[0] == 0
    again = llmpipe("sft", path, "--set", "log.trackers=[mlflow]")
    assert again[0] == 0 and "skip: finished" in again[1]


@pytest.mark.parametrize(
    ("environment", "netrc", "passes"),
    [
        ({}, None, False),
        ({"WANDB_API_KEY": "x"}, None, True),
        ({"WANDB_MODE": "offline"}, None, True),
        ({}, "machine api.wandb.ai login user password x", True),
        ({}, "machine elsewhere.org login user password x", False),
    ],
)
def test_a_tracker_without_a_key(llmpipe, here, monkeypatch, environment, netrc, passes):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(here))
    if netrc:
        (here / ".netrc").write_text(netrc)
        (here / ".netrc").chmod(0o600)
    (here / "wandb").mkdir()
    (here / "wandb" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(here)
    path = life.write(here / "run", log={"trackers": ["wandb"]}, model="./modle")
    assert ("wandb has no key" in llmpipe("sft", path)[2]) == (not passes)


def test_more_processes_than_gpus(llmpipe, here, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    path = life.write(here / "run", launch__processes=4, launch__micro_batch_size="auto")
    code, _, err = llmpipe("sft", path)
    assert code == 2 and "launch.processes: 4 processes, and this machine has 2 GPUs" in err


def test_nothing_heavy_is_imported_and_the_answer_comes_at_once(here):
    """The last line of three stages, in a process of its own."""
    write(MISTAKES["an artifact that no stage makes"])
    probe = (
        "import sys, time; begun = time.process_time()\n"
        "sys.argv = ['llmpipe', 'run', 'pipe.yaml']\n"
        "from llmpipe.front.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'accelerate', 'datasets', 'pyarrow'}\n"
        "print(code, sorted(heavy & set(sys.modules)), time.process_time() - begun < 1)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(life.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", probe], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "2 [] True\n", done.stderr


def test_a_damaged_model_is_said_of_itself_alone(tmp_path, monkeypatch):
    """And not of the answers that would have to fit into its context."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY / "model", "cut")
    os.truncate("cut/model.safetensors", 1000)
    Path("p.yaml").write_text(
        "run: run\nstages:\n"
        + EVAL.replace(f"base: {TINY}/model", "base: ./cut")
        .replace("artifact:sft", f"{TINY}/model")
        .partition("    gate:")[0]
    )
    asked = load_pipeline(Path("p.yaml"), schema, [])
    with pytest.raises(UserError) as refused:
        ahead.check(asked.stages, pipeline=asked)
    lines = str(refused.value).split("\n")
    assert len(lines) == 1, lines
    assert lines[0].startswith("p.yaml:5: models.base: cut/model.safetensors: is no whole safeten")
    assert refused.value.code == 3
