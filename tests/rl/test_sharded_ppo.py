"""`launch.strategy: fsdp` in ppo and grpo: policy, critic and reference in parts, on two gloo
processes and against two whole ones."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from llmpipe.errors import LOST, UserError
from llmpipe.front import ahead
from llmpipe.recipe.check import locate
from llmpipe.run import checkpoints
from llmpipe.run.artifact import Artifact
from llmpipe.stages import schema
from tests import life
from tests.rl import test_ppo
from tests.training import test_preference
from tests.training.test_sharded import model_folder, untied, weights

SETTINGS = {
    "launch__processes": "auto",
    "launch__micro_batch_size": 1,
    "launch__activation_checkpointing": "none",
    "optim__steps": 3,
    "data__eval": {"holdout": 0.1},
    "samples": {"prompts": ["What is 2 + 2?"], "max_new_tokens": 4},
}
UNEVEN = {  # a rank without a row of a mixture, of a minibatch, or of what is held out
    "mixture": test_ppo.MIXTURE | {"batch_size": 1},
    "algorithm": {"epochs": 1, "minibatches": 4},
    "data__eval": {"sources": [{"path": str(test_ppo.ROWS), "limit": 1}]},
}
NEAR = ("loss", "grad_norm", "val/grad_norm", "objective/kl", "objective/scores", "eval_score")


def write(run, strategy="fsdp", **changes):
    run.parent.mkdir(exist_ok=True)
    return test_ppo.write(run, **(SETTINGS | changes), launch__strategy=strategy)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_alike(one, other, adrift=1e-5, lines=("samples.jsonl", "rollouts.jsonl")):
    """Losses to 1e-5, weights to 1e-4, the same answers and the very same files."""
    for mine, theirs in zip(*map(test_ppo.metrics, (one, other)), strict=True):
        for name in NEAR:
            near = pytest.approx(theirs.get(name, 0), abs=adrift, rel=adrift)
            assert mine.get(name, 0) == near, (name, mine, theirs)
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], atol=1e-4, rtol=0), name
    for name in lines:
        for mine, theirs in zip(*(read(each.path / name) for each in (one, other)), strict=True):
            score = pytest.approx(theirs.pop("score", 0), abs=1e-5)  # of a model, within rounding
            assert mine.pop("score", 0) == score and mine == theirs
    assert {p.name for p in one.model.iterdir()} == {p.name for p in other.model.iterdir()}
    configs = [json.loads(path.read_text()) for path in map(configuration, (one, other))]
    assert configs[0] == configs[1]


def configuration(artifact):
    paths = [artifact.model / name for name in ("config.json", "adapter_config.json")]
    return next(path for path in paths if path.exists())


def both(tmp_path, **changes):
    """The same in parts and whole."""
    return [life.pair(write(tmp_path / name, name, **changes)) for name in ("fsdp", "ddp")]


def ranker(tmp_path):
    """A reward model of the policy's shape, with random weights."""
    config = LlamaConfig.from_pretrained(life.TINY / "model", num_labels=1)
    torch.manual_seed(1)
    return str(
        model_folder(tmp_path / "ranker", AutoModelForSequenceClassification.from_config(config))
    )


def test_two_processes_in_parts_are_two_whole_ones(tmp_path):
    parts, whole = both(tmp_path)
    assert parts.manifest().hardware["sharded"] is True
    assert_alike(parts, whole)


CASES = {
    "trunk": {
        "critic": {"start": "trunk"},
        "algorithm__entropy": 0.01,
        "rollout": {"max_new_tokens": 12, "top_k": 20},
        "launch__activation_checkpointing": "selective",
    },
    "uneven": UNEVEN | {"launch__activation_checkpointing": "full"},
    "grpo": test_ppo.GRPO | test_ppo.RESAMPLED | {"algorithm__ratio": "sequence"},
    "grpo, no reference": test_ppo.GRPO | UNEVEN | {"reference__coefficient": 0.0},
}


@pytest.mark.faults
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_critic_and_of_rows(tmp_path, case):
    assert_alike(*both(tmp_path, model=untied(tmp_path), **CASES[case]))


@pytest.mark.faults
def test_a_reward_model_in_parts(tmp_path):
    """The critic begins as that one."""
    sources = [{"model": ranker(tmp_path)}, {"function": f"{tmp_path}/rewards.py:letters"}]
    parts, whole = both(tmp_path, reward=sources)
    assert (
        "critic: a model of its own, from the reward model" in (parts.path / "log.txt").read_text()
    )
    assert_alike(parts, whole)


@pytest.mark.faults
def test_an_optimizer_step_reads_one_tensor(tmp_path):
    path = write(tmp_path / "run", **UNEVEN | {"optim__steps": 1})
    for code, text in life.ranks(path, hooks=("ppo_counted_reads",) * 2):
        seen = [line for line in text.splitlines() if line.startswith("reads:")]
        assert code == 0 and seen == ["reads: ['tolist']"] * 4, text


@pytest.mark.faults
def test_arithmetic_in_bf16(tmp_path):
    """What is rounded is not what autocast rounds, and other answers are drawn soon."""
    made = both(tmp_path, optim__precision="bf16", optim__steps=1)
    for mine, theirs in zip(*map(test_ppo.updates, made), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=5e-2)
    assert {tensor.dtype for tensor in weights(made[0]).values()} == {torch.float32}


ADAPTERS = {
    "critic apart": {"adapter": {"rank": 4, "alpha": 8, "merge": True}},
    "trunk, uneven": {
        "adapter": {"rank": 4, "alpha": 8},
        "critic": {"start": "trunk"},
        "launch__activation_checkpointing": "full",
        **UNEVEN,
    },
    "grpo": test_ppo.HOW["grpo, lora"],
}


@pytest.mark.faults
@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_beside_a_base_in_parts(tmp_path, case):
    """It lies whole in every process, as under ddp, and its checkpoints are the same."""
    parts, whole = both(tmp_path, **ADAPTERS[case])
    assert_alike(parts, whole)
    steps = [(each.checkpoints / "step-3") for each in (parts, whole)]
    names = [{path.name for path in step.iterdir()} for step in steps]
    assert names[0] == names[1] and checkpoints.SHARDED not in names[0]
    if "merge" in ADAPTERS[case]["adapter"]:
        merged = [type(parts)(each.run / "ppo-merged") for each in (parts, whole)]
        mine, theirs = map(weights, merged)
        assert all(torch.allclose(mine[name], theirs[name], atol=1e-4, rtol=0) for name in theirs)


@pytest.mark.faults
def test_a_reward_model_that_is_an_adapter(tmp_path):
    """On the policy's base, where the parent's adapter is the reference and the critic's begin, it
    is one more; of its own it would be whole in every process."""
    run, small = tmp_path / "fsdp", {"adapter": {"rank": 4, "alpha": 8}}
    quick = {"optim__steps": 2, "evaluation": {}}
    life.command(test_preference.write(run, "reward", name="ranks", **small, **quick))
    life.command(life.write(run, stage="lora", name="lora", **small, **quick))
    shutil.copytree(run, tmp_path / "ddp")
    rewards = {"reward": [{"model": "artifact:ranks"}], "optim__steps": 2}
    parts, whole = both(tmp_path, model="artifact:lora", **small, **rewards)
    assert "ranks is one more adapter on the policy's base" in (parts.path / "log.txt").read_text()
    assert_alike(parts, whole)
    for code, text in life.ranks(write(run, name="all", **rewards)):
        assert code == 2 and "ranks is an adapter, and not on the policy's base" in text, text


# --- stopped and gone on with ---

LONG = {
    "optim__steps": 4,
    "optim__batch_size": 4,
    "checkpoint__every": 1,
    "rollout": {"max_new_tokens": 6},
    "evaluation": {"every": 2},
    "algorithm__normalize_scores": True,
    "reference__target": 1.0,
    **UNEVEN,
}
LONG_GRPO = LONG | test_ppo.GRPO | {"algorithm": UNEVEN["algorithm"]} | test_ppo.RESAMPLED
del LONG_GRPO["algorithm__normalize_scores"]
SEED = 20261127


@dataclass
class Straight:
    """A run that nobody stops."""

    settings: dict
    made: Artifact
    seconds: float


def run_straight(folder, settings):
    path = write(folder / "run", **settings)
    begun = time.monotonic()
    return Straight(settings, life.pair(path), time.monotonic() - begun)


@pytest.fixture(scope="module", params=["ppo", "grpo"])
def straight(request, tmp_path_factory):
    settings = {"ppo": LONG, "grpo": LONG_GRPO}[request.param]
    return run_straight(tmp_path_factory.mktemp("straight"), settings)


def essence(artifact):
    return life.essence(artifact) | {"rollouts": (artifact.path / "rollouts.jsonl").read_text()}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("hooks", "codes"),
    [
        ((None, "ppo_term_in_3"), {143}),
        (("ppo_term_in_save_2", None), {143}),
        ((None, "ppo_kill_after_2"), {-signal.SIGKILL, LOST}),
        (("ppo_kill_after_4", None), {-signal.SIGKILL, LOST}),
        (("kill_in_stream", None), {-signal.SIGKILL, LOST}),
        ((None, "kill_in_stream"), {-signal.SIGKILL, LOST}),
        (("disk_full_in_parts_2", None), {5}),
    ],
)
def test_a_stop_leaves_no_trace(tmp_path, straight, hooks, codes):
    """Also one in the middle of publishing, which no other rank waits for."""
    path = write(tmp_path / "run", **straight.settings)
    begun = time.monotonic()
    ends = life.ranks(path, hooks=hooks)
    assert time.monotonic() - begun < 60 + straight.seconds
    assert {code for code, _ in ends} <= codes, ends
    resumed = life.pair(path)
    assert "resuming from step-" in path.with_suffix(".0.out").read_text()
    assert resumed.manifest().training.exact_resume
    assert essence(resumed) == essence(straight.made)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_anywhere(tmp_path, straight, number):
    """One process or both, and gone on with, thirty times at night: what is made is what a run
    makes that nobody stops."""
    rng = random.Random(f"{SEED} {number}")
    stops, path = 0, write(tmp_path / "run-0", **straight.settings)
    while stops < (30 if life.FULL else 3):
        processes = life.started(path)
        any_end = [process.sentinel for process in processes]
        wait(any_end, rng.uniform(0.2, straight.seconds))
        chosen = rng.choice([processes[:1], processes[1:], processes])
        hit = [process for process in chosen if process.is_alive()]
        for process in hit:
            process.kill() if number == signal.SIGKILL else process.terminate()
        stops += bool(hit)
        codes = {ended(process, processes) for process in processes}
        said = "\n".join(out.read_text() for out in sorted(tmp_path.glob(f"{path.stem}.*.out")))
        assert codes <= {0, LOST, 143, -signal.SIGKILL, -signal.SIGTERM}, said
        if codes == {0}:
            assert_straight(path, straight.made)
            path = write(tmp_path / f"run-{stops}", **straight.settings)
    life.pair(path)
    assert_straight(path, straight.made)


def assert_straight(path, straight):
    made = Artifact(Path(json.loads(path.read_text())["run"]) / straight.name)
    assert made.manifest().training.exact_resume
    assert essence(made) == essence(straight)
    assert not list(made.path.glob(".*"))


def ended(process, processes):
    """The exit code of a rank. As llmpipe's launcher does, the others are ended where one is gone;
    they have five seconds to notice themselves."""
    deadline = time.monotonic() + 120
    while process.exitcode is None:
        assert time.monotonic() < deadline, "a rank hangs"
        if any(each.exitcode for each in processes):
            process.join(5)
            process.terminate()
            process.join(5)
            process.kill()
        process.join(0.1)
    return process.exitcode


@pytest.mark.faults
def test_checkpoints_lie_in_parts_and_hold_what_learns(straight):
    step = straight.made.checkpoints / "step-4"
    parts = sorted((step / checkpoints.SHARDED).iterdir())
    assert [path.name for path in parts] == [
        f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)
    ]
    sizes = [path.stat().st_size for path in parts]
    assert max(sizes) < 0.6 * sum(sizes)
    models = 2 if straight.made.name == "ppo" else 1  # a critic
    learned = models * sum(tensor.nbytes for tensor in weights(straight.made).values())
    assert 2.9 * learned < sum(sizes) < 3.2 * learned, "weights and moments, and no reference"
    assert not checkpoints.verify(step)


@pytest.mark.faults
def test_another_number_of_processes_goes_on_where_that_is_allowed(tmp_path):
    """Three, by which no width divides, then two, then three: other sums, and the same training
    within rounding."""
    settings = {"optim__batch_size": 6, "model": untied(tmp_path), "optim__steps": 4}
    straight = life.pair(write(tmp_path / "straight", **settings))
    path = write(tmp_path / "run", **settings)
    three = (None, None, None)
    for hooks in (("ppo_term_in_2", *three[1:]), ("ppo_term_in_3", None)):
        assert {code for code, _ in life.ranks(path, hooks=hooks, inexact=True)} == {143}
    for code, text in life.ranks(path, hooks=three):
        assert code == 3 and "processes 2 there, 3 now" in text, text
    for code, text in life.ranks(path, hooks=three, inexact=True):
        assert code == 0, text
    resumed = type(straight)(tmp_path / "run" / "ppo")
    assert not resumed.verify().training.exact_resume
    shown = ["samples.jsonl"]  # rollouts.jsonl shows the first process's, which are others of three
    assert_alike(resumed, straight, 1e-4, shown)


@pytest.mark.faults
@pytest.mark.parametrize(("one", "other"), [("fsdp", "ddp"), ("ddp", "fsdp")])
def test_another_strategy_does_not_go_on(tmp_path, one, other):
    stopped = life.ranks(write(tmp_path / "run", one), hooks=(None, "ppo_term_in_2"))
    assert {code for code, _ in stopped} == {143}, stopped
    for code, text in life.ranks(write(tmp_path / "run", other), inexact=True):
        assert code == 3 and f"were written with launch.strategy: {one}" in text, text


# --- what is refused, or goes wrong ---


@pytest.mark.faults
def test_what_one_process_raises_all_do(tmp_path):
    """A reward that fails in one rank alone, where the others wait for what it scores."""
    (tmp_path / "odd.py").write_text(
        "import os\ndef odd(prompts, completions, **columns):\n"
        "    return [1.0] * (len(prompts) - int(os.environ['RANK']))\n"
    )
    sources = [{"function": f"{tmp_path}/odd.py:odd"}, {"model": ranker(tmp_path)}]
    for code, text in life.ranks(write(tmp_path / "run", reward=sources)):
        assert code == 2 and "gave" in text and "scores for" in text, text


@pytest.mark.faults
def test_weights_that_stayed_whole_are_no_training(tmp_path):
    path = write(tmp_path / "run")
    for code, text in life.ranks(path, hooks=("ppo_whole_before_the_optimizer",) * 2):
        assert code == 2 and "weights are not in parts" in text, text
    adapted = write(tmp_path / "adapted", adapter={"rank": 4, "alpha": 8})
    for code, text in life.ranks(adapted, hooks=("ppo_whole_before_the_optimizer",) * 2):
        assert code == 2 and "of the frozen layers are not in parts" in text, text


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_process_cannot_read_all_pass_over(tmp_path, straight, rank):
    """Each reads its own part, which it has hashed."""
    path = write(tmp_path / "run", **straight.settings)
    assert {code for code, _ in life.ranks(path, hooks=(None, "ppo_term_in_3"))} == {143}
    home = Path(json.loads(path.read_text())["run"]) / straight.made.name / "checkpoints"
    newest = max(home.iterdir(), key=checkpoints.step_of)
    part = sorted((newest / checkpoints.SHARDED).iterdir())[rank]
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    resumed = life.pair(path)
    said = path.with_suffix(".0.out").read_text()
    assert f"checkpoint {newest.name} is damaged (sharded/{part.name}" in said
    assert essence(resumed) == essence(straight.made)


def test_what_is_not_obeyed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    changes = {"launch__processes": 2, "launch__micro_batch_size": "auto"}
    path = write(tmp_path / "run", **changes, rollout={"engine": "vllm"})
    values = json.loads(path.read_text())
    values["launch"] |= {"processes": "auto", "offload": True}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError) as refused:
        ahead.check([locate(path, schema("ppo"))])
    text = str(refused.value)
    assert "fsdp: rollout.engine: vllm draws in one process" in text
    assert "fsdp: what fits in a GPU's memory is not measured with it in ppo" in text
    assert "launch.offload: not built in ppo, whose models are whole for a while" in text
