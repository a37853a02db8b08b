"""What can be known ahead is known before the first stage starts: every problem, with its line."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import life

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
    "rows of an artifact": Mistake(
        DPO,
        {f"path: {TINY}/pairs.jsonl": "path: artifact:sft"},
        "rows are read from files and from the Hub",
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
