"""PPO as a stage: the same distribution in rollout and training, closed forms, exact resume, any
cut of a batch. What GRPO shares with it is tried here as well; test_grpo.py has what is its own."""

import json
import math
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

from llmpipe.errors import UserError
from llmpipe.recipe.check import load
from llmpipe.run.artifact import Artifact
from llmpipe.stages import schema
from tests import hooks, life, store

ROWS = life.TINY / "rows.jsonl"
GRPO = {"stage": "grpo", "rollout__group": 4, "algorithm__clip_high": 0.3}
HOW = {
    "full": {},
    "trunk": {"critic": {"start": "trunk"}, "launch__micro_batch_size": "auto"},
    "lora": {"adapter": {"rank": 4, "alpha": 8}},
    "lora, trunk": {"adapter": {"rank": 4, "alpha": 8}, "critic": {"start": "trunk"}},
    "qlora": {"adapter": {"rank": 4, "alpha": 8}, "quantization": {"bits": 4}},
    "grpo": GRPO,
    "grpo, lora": GRPO | {"adapter": {"rank": 4, "alpha": 8}, "reference__place": "reward"},
}
"""Ways to be trained: ppo's, and those of grpo, which has the same loop."""
NORMALIZED = {"algorithm__normalize_scores": True}
RESAMPLED = {  # groups of two, of which some have no spread
    "rollout__group": 2,
    "rollout__without_spread": "resample",
    "reward": [{"verifier": "regex", "pattern": "w"}],
}
MIXTURE = {"train": [{"path": str(ROWS)}], "max_length": 64, "batch_size": 2}
LONGER = {  # for the faults: checkpoints at 3, 6, 9 and 12, and everything that has a state
    "optim__steps": 12,
    "checkpoint__every": 3,
    "data__eval": {"holdout": 0.1},
    "evaluation": {"every": 5},
    "algorithm__normalize_scores": True,
    "reference__target": 1.0,
    "samples": {"prompts": ["What is 2 + 2?"]},
    "reward": [{"function": f"{life.TINY}/rewards.py:brevity"}],
    "mixture": MIXTURE,
}
LONGER_GRPO = LONGER | GRPO | RESAMPLED
del LONGER_GRPO["algorithm__normalize_scores"]
REWARD = """
def brevity(prompts, completions, **columns):
    return [-len(text) / 10 for text in completions]


def letters(prompts, completions, **columns):
    return [text.count("e") / 4 for text in completions]


def none(prompts, completions, **columns):
    return [0.0] * len(completions)


def fails(prompts, completions, **columns):
    raise ValueError("no such thing")


def short(prompts, completions, **columns):
    return [1.0]


def nan(prompts, completions, **columns):
    return [float("nan")] * len(completions)


def words(prompts, completions, **columns):
    return ["much"] * len(completions)
"""


def write(run, **changes):
    (run.parent / "rewards.py").write_text(REWARD)
    values = {
        "stage": "ppo",
        "run": str(run),
        "model": str(life.TINY / "model"),
        "data": {"train": [{"path": str(ROWS)}], "max_length": 64},
        "reward": [{"function": f"{run.parent}/rewards.py:letters"}],
        "rollout": {"max_new_tokens": 12},
        "algorithm": {"epochs": 2, "minibatches": 2},
        "optim": {"learning_rate": 2e-3, "batch_size": 8, "steps": 6, "precision": "fp32"},
        "checkpoint": {"every": 2},
        "log": {"every": 1},
        "launch": {"processes": 1, "threads": 1, "micro_batch_size": 4},
    }
    life.put(values, changes)
    path = run.parent / f"{run.name}-{values.get('name', values['stage'])}.yaml"
    path.write_text(json.dumps(values))
    return path


def metrics(artifact):
    return [json.loads(line) for line in (artifact.path / "metrics.jsonl").read_text().splitlines()]


def test_passes_are_filled():
    """By count, or with `auto` by tokens: every episode once, like lengths together; a long one
    goes alone."""
    from types import SimpleNamespace as Some

    from llmpipe.rl.passes import PassSize

    lengths = [n + 10 for n in (90, 400, 3000, 20, 490, 500, 5)]
    assert PassSize(3, None).cut(lengths) == [[6, 3, 0], [1, 4, 5], [2]]
    filled = [[6, 3, 0, 1], [4, 5], [2]]  # 555, 1,010 and 3,010 tokens
    assert PassSize(3, 1024).cut(lengths) == filled
    assert PassSize(3, 1024).cut([]) == []
    machines = [("cpu", "sdpa"), ("cuda", "sdpa"), ("cuda", "eager")]
    hardware = [Some(device=on, attention=by, micro_batch_size=4) for on, by in machines]
    launches = [Some(micro_batch_size=size) for size in ("auto", 4)]
    tokens = [[PassSize.of(launch, each).tokens for each in hardware] for launch in launches]
    assert tokens == [[1024, 8192, 2048], [None] * 3]


def test_half_a_pass():
    from llmpipe.rl.passes import PassSize

    size = PassSize(4, 1024)
    half = size.halved(300)
    assert half == PassSize(4, 512) and half.halved(300) is None, "which holds one of them"
    assert PassSize(4, None).halved(300) is None, "the recipe says how many"
    launch, hardware = SimpleNamespace(micro_batch_size="auto"), SimpleNamespace(micro_batch_size=4)
    assert PassSize.of(launch, hardware, half.in_checkpoint) == half
    assert PassSize(4, None).in_checkpoint == 4


AUTO = {"launch__micro_batch_size": "auto", "optim__steps": 4}


@pytest.fixture
def short(monkeypatch):
    """`short(most)`: memory for passes of so many tokens."""
    from llmpipe.rl import fitting
    from llmpipe.rl.grpo import GRPO
    from llmpipe.rl.ppo import PPO

    monkeypatch.setattr(fitting, "DEVICES", fitting.DEVICES)
    for method in (PPO, GRPO):
        monkeypatch.setattr(method, "learn", method.learn)
    return hooks.ppo_short_of_memory


def said(artifact):
    lines = (artifact / "log.txt").read_text().splitlines()
    return [line for line in lines if line.startswith("memory:")]


@pytest.mark.parametrize("how", ["full", *map(life.by_the_dozen, ("lora", "grpo"))])
def test_passes_that_do_not_fit_are_cut_without_a_trace(tmp_path, monkeypatch, short, how):
    """As if the run had begun with smaller ones, and a resumed run goes on with these."""
    from llmpipe.rl import passes

    changes = {name: value for name, value in HOW[how].items() if not name.startswith("launch")}
    with monkeypatch.context() as context:
        context.setattr(passes, "full_pass", lambda on_gpu: 256)
        straight = life.command(write(tmp_path / "straight", **changes | AUTO))
    path = write(tmp_path / "killed", **changes | AUTO)
    assert life.Trial(path, hook="ppo_killed_when_short_256").wait() == -signal.SIGKILL
    resumed = life.command(path)
    assert resumed.manifest().training.exact_resume
    short(256)
    made = life.command(write(tmp_path / "cut", **changes | AUTO))
    assert said(made.path) == [
        f"memory: passes of {2 * n:,} tokens do not fit; trying {n} tokens" for n in (512, 256)
    ]
    for artifact in (resumed, made):
        assert life.essence(artifact) == life.essence(straight)
        rollouts = [(each.path / "rollouts.jsonl").read_text() for each in (artifact, straight)]
        assert rollouts[0] == rollouts[1]


def test_an_episode_that_does_not_fit(tmp_path, short):
    """Then activations are computed again, and after that it is out of memory."""
    short(1)
    with pytest.raises(UserError, match=r"out of memory: CUDA out of memory") as refused:
        life.command(write(tmp_path / "run", **AUTO))
    assert refused.value.code == 5
    assert [line.split("trying ")[1] for line in said(tmp_path / "run" / "ppo")][-2:] == [
        *("activation_checkpointing: selective", "activation_checkpointing: full")
    ]


def test_what_not_one_episode_fits_without(tmp_path, monkeypatch):
    """Is computed again."""
    from llmpipe.rl import fitting
    from llmpipe.rl.ppo import PPO
    from llmpipe.upstream import checkpointing

    learn, contexts, computed = PPO.learn, checkpointing.contexts, []

    def too_much(self, chosen, total):
        before = len(computed)
        metrics = learn(self, chosen, total)
        if len(computed) == before:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return metrics

    changes = AUTO | {"optim__steps": 2}
    plain = life.command(write(tmp_path / "plain", **changes | {"launch__micro_batch_size": 1}))
    monkeypatch.setattr(checkpointing, "contexts", lambda: computed.append(1) or contexts())
    monkeypatch.setattr(fitting, "DEVICES", {"cpu", "cuda"})
    monkeypatch.setattr(PPO, "learn", too_much)
    made = life.command(write(tmp_path / "run", **changes | {"launch__micro_batch_size": 1}))
    assert made.manifest().hardware["activation_checkpointing"] == "selective"
    assert life.essence(made) == life.essence(plain)
    assert said(made.path) == [
        "memory: not one episode fits; trying activation_checkpointing: selective"
    ]


def test_processes_agree_on_their_passes(tmp_path):
    path = write(tmp_path / "run", **AUTO | {"launch__processes": "auto", "optim__steps": 2})
    ends = life.ranks(path, hooks=("ppo_short_of_memory_99999", "ppo_short_of_memory_256"))
    assert [code for code, _ in ends] == [0, 0], ends
    assert said(tmp_path / "run" / "ppo")[-1].endswith("trying 256 tokens")


def updates(artifact):
    return [line for line in metrics(artifact) if "loss" in line]


# --- the closed form ---

WORDS = [f"w{i}" for i in range(28)]


def bandit(folder, seed):
    """A model that says one of a few dozen words, and rewards for them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "ask", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        initializer_range=0.3,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    (folder.parent / "asks.jsonl").write_text(json.dumps({"prompt": "ask"}) + "\n")
    rewards = torch.randn(len(vocabulary)).tolist()
    rewards[:2] = [0.0, 0.0]  # pad and end have no text
    table = {"": 0.0} | {word: rewards[i] for word, i in vocabulary.items() if i > 1}
    (folder.parent / "rewards.py").write_text(
        f"TABLE = {table!r}\n\n\n"
        "def look(prompts, completions, **_):\n"
        "    return [TABLE[text] for text in completions]\n"
    )
    with torch.no_grad():
        return model(torch.tensor([[2]])).logits[0, -1].log_softmax(-1), torch.tensor(rewards)


BETA = 0.7  # of the bandits' KL penalty


def learned_bandit(tmp_path, seed, **changes):
    """What a bandit's parent says, what words are worth, what the policy says that a stage made,
    and its artifact."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "bandit"
    folder.mkdir()
    reference, rewards = bandit(folder, seed)
    values = {
        "run": str(tmp_path / "run"),
        "model": str(folder),
        "seed": seed,
        "data": {"train": [{"path": str(tmp_path / "asks.jsonl")}], "max_length": 8},
        "reward": [{"function": f"{tmp_path}/rewards.py:look"}],
        "reference": {"coefficient": BETA},
        "rollout": {"max_new_tokens": 1},
        "algorithm": {"epochs": 2, "minibatches": 2},
        "optim": {
            "learning_rate": 1e-2,
            "batch_size": 256,
            "steps": 100,
            "precision": "fp32",
            "warmup": 0,
        },
        "checkpoint": {"every": 1000},
        "log": {"every": 10},
        "launch": {
            "processes": 1,
            "threads": 1,
            "micro_batch_size": 256,
            "rollout_batch_size": 256,
        },
    }
    path = tmp_path / "bandit.yaml"
    path.write_text(json.dumps(life.put(values, changes)))
    made = life.command(path)
    model = AutoModelForCausalLM.from_pretrained(made.model)
    with torch.no_grad():
        policy = model(torch.tensor([[2]])).logits[0, -1].softmax(-1)
    return reference, rewards, policy, made


def apart(some, others):
    """Total variation between two distributions."""
    return float((some - others).abs().sum() / 2)


@pytest.mark.parametrize("seed", [0, *map(life.by_the_dozen, range(1, 5))])
def test_one_step_bandits_converge_to_the_closed_form(tmp_path, seed):
    """pi(a) ~ pi_ref(a) exp(r(a) / beta): the optimum of reward less beta KL (Rafailov 2023, eq.
    4)."""
    how = {
        "stage": "ppo",
        "critic": {"clip": None, "coefficient": 1.0},
        "reference__estimator": "k1",
        "algorithm__whiten": False,
    }
    reference, rewards, policy, made = learned_bandit(tmp_path, seed, **how)
    target = (reference + rewards / BETA).softmax(-1)
    assert apart(reference.exp(), target) > 0.2, "there is something to learn"
    assert apart(policy, target) < 0.03
    last = updates(made)[-1]
    optimum = float(BETA * torch.logsumexp(reference + rewards / BETA, 0))
    assert last["objective/rlhf_reward"] == pytest.approx(optimum, abs=0.1)


# --- rollout and training see one distribution ---


@pytest.fixture
def spied(monkeypatch):
    """What the first minibatch and the first rollout of a stage saw."""
    from llmpipe.rl import loop, policy_gradient

    seen = {"rollout": [], "ratio": [], "kl": []}
    judge, losses, penalty = (
        loop.Loop.judge,
        policy_gradient.policy_losses,
        policy_gradient.kl_penalty,
    )

    def judged(self, answers):
        experiences, line = judge(self, answers)
        if self.state.step == 0:
            seen["rollout"] += [
                float((e.old - e.episode.log_probs).exp().sub(1).abs().max())
                for e in experiences.values()
            ]
            seen["episodes"] = [answer.episode for answer in answers]
        return experiences, line

    def lost(log_ratio, *others):
        if len(seen["ratio"]) < 1:
            seen["ratio"].append(float(log_ratio.detach().exp().sub(1).abs().max()))
        return losses(log_ratio, *others)

    def held(log_probs, reference, estimator):
        if not seen["kl"]:
            seen["kl"].append(float((log_probs - reference).abs().max()))
        return penalty(log_probs, reference, estimator)

    monkeypatch.setattr(loop.Loop, "judge", judged)
    monkeypatch.setattr(policy_gradient, "policy_losses", lost)
    monkeypatch.setattr(policy_gradient, "kl_penalty", held)
    return seen


DRAWN = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-p": {"temperature": 1.4, "top_p": 0.8},
    "top-k": {"top_k": 7},
    "entropy bonus": {"bonus": True},
}


RATIOS = [("full", drawn) for drawn in DRAWN]
RATIOS += [(how, "plain") for how in ("trunk", "lora", "grpo", "grpo, lora")]
"""Every way to draw, and every policy."""
OTHER_RATIOS = [(how, drawn) for how in ("trunk", "lora") for drawn in DRAWN if drawn != "plain"]


@pytest.mark.parametrize(
    ("how", "drawn"), [*RATIOS, *(life.by_the_dozen(*case) for case in OTHER_RATIOS)]
)
def test_the_first_ratio_is_one(tmp_path, spied, how, drawn):
    """On every token, with prompts of several lengths and so padding on the left of most."""
    settings = dict(DRAWN[drawn])
    extra = {"algorithm__entropy": 0.01} if settings.pop("bonus", False) else {}
    extra |= {f"rollout__{name}": value for name, value in settings.items()}
    extra |= {"rollout__group": 2} if "grpo" in how else {}
    life.command(write(tmp_path / "run", **HOW[how] | extra, optim__steps=1))
    assert len(spied["rollout"]) == 8 and max(spied["rollout"]) < 1e-5
    assert spied["ratio"][0] < 1e-5
    prompts = {tuple(episode.prompt) for episode in spied["episodes"]}
    assert len(prompts) == (4 if "grpo" in how else 8) and len({*map(len, prompts)}) > 1
    if drawn in ("plain", "temperature"):
        assert spied["kl"][0] < 1e-5, "the reference begins as the policy"


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """What ppo starts from: sft, an adapter on it, merged as well, one on 4 bits, and reward
    models."""
    from tests.training import test_preference

    run = tmp_path_factory.mktemp("parents") / "run"
    quick = {"optim__steps": 4, "evaluation": {}}
    store.made(life.write(run, optim__steps=8, optim__learning_rate=5e-3, evaluation={}))
    adapter = {"adapter": {"rank": 4, "alpha": 8, "merge": True}, "optim__learning_rate": 2e-2}
    store.made(life.write(run, stage="lora", name="lora", model="artifact:sft", **adapter, **quick))
    four = {
        "quantization": {"bits": 4},
        "optim__precision": "bf16",
        "name": "qlora",
        "stage": "qlora",
    }
    store.made(life.write(run, model="artifact:sft", **four, **adapter, **quick))
    pairs = {"model": "artifact:sft", "optim__steps": 4, "evaluation": {}}
    store.made(test_preference.write(run, "reward", **pairs))
    store.made(
        test_preference.write(
            run,
            "reward",
            name="reward-lora",
            adapter={"rank": 4, "alpha": 8, "dropout": 0.3},
            **pairs,
        )
    )
    return run


STARTS = {
    "full": ("artifact:sft", {}),
    "new adapter": ("artifact:sft", HOW["lora"]),
    "adapter continued": ("artifact:lora", HOW["lora"]),
    "adapter merged": ("artifact:lora-merged", {}),
    "adapter, all weights": ("artifact:lora", {}),
    "4 bits continued": ("artifact:qlora", HOW["qlora"]),
}


@pytest.mark.parametrize(
    ("start", "reward"),
    [
        *((start, "reward") for start in STARTS),
        *((start, "reward-lora") for start in ("full", "adapter continued")),
    ],
)
def test_every_start_with_a_reward_model(parents, spied, start, reward):
    """The reference is the parent, what should move moves, and the artifact names the true base."""
    reference, changes = STARTS[start]
    name = f"{start}-{reward}".replace(" ", "-").replace(",", "")
    sources = [{"model": f"artifact:{reward}"}, {"verifier": "contains", "weight": 0.5}]
    made = life.command(
        write(parents, name=name, model=reference, reward=sources, optim__steps=3, **changes)
    )
    assert spied["kl"][0] < 1e-5
    manifest = made.verify()
    assert {parent.name for parent in manifest.parents} == {
        reference.removeprefix("artifact:"),
        reward,
    }
    lines = updates(made)
    assert all(f"scores/artifact:{reward}" in line and "scores/contains" in line for line in lines)
    assert lines[-1]["objective/kl"] != 0
    if changes:
        assert manifest.kind == "adapter" and manifest.base.reference == "artifact:sft"
    else:
        assert manifest.kind == "model" and manifest.verified["max_logit_difference"] < 1e-5
    said = (made.path / "log.txt").read_text()
    assert ("one more adapter on the policy's base" in said) == (
        start != "full" and reward == "reward-lora"
    )
    assert ("from the reward model" in said) == (
        start in ("full", "adapter merged", "adapter, all weights") and reward == "reward"
    )


@pytest.fixture
def scored(monkeypatch):
    """(rows, answers, scores) of every call of the rewards."""

    from llmpipe.rl import heldout, loop

    seen, call = [], loop.scored_together

    def spied(rewards, said, world):
        out = call(rewards, said, world)
        seen.append(([each.row for each in said], [each.response for each in said], out.total))
        return out

    for module in (loop, heldout):
        monkeypatch.setattr(module, "scored_together", spied)
    return seen


def as_by(model, tokenizer, scored):
    """What was scored is what a reward model gives the plain text, up to the end of the turn."""

    for rows, answers, scores in scored:
        for row, answer, score in zip(rows, answers, scores, strict=True):
            turns = row["prompt"] + [{"role": "assistant", "content": answer}]
            ids = tokenizer.apply_chat_template(turns, return_dict=False)
            ids = ids[: len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))]
            with torch.no_grad():
                assert float(model(torch.tensor([ids])).logits[0, 0]) == pytest.approx(
                    score, abs=1e-5
                )
    assert len({score for *_, scores in scored for score in scores}) > 8


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>"])
def test_a_shared_reward_adapter_scores_as_its_own_model(parents, scored, monkeypatch, pad):
    """One base for policy and reward model: the scores are those of the reward model in memory by
    itself."""
    from safetensors.torch import load_file

    from llmpipe.models.load import load_any
    from llmpipe.models.pretrained import load_tokenizer
    from llmpipe.rl.sources import models

    loaded = load_tokenizer

    def padding(folder):
        tokenizer = loaded(folder)
        tokenizer.pad_token = pad if "reward" in str(folder) else tokenizer.pad_token
        return tokenizer

    monkeypatch.setattr(models, "load_tokenizer", padding)
    how = {
        "reward": [{"model": "artifact:reward-lora"}],
        "optim__learning_rate": 2e-2,
        "optim__steps": 4,
    }
    name = f"shared-{pad.strip('<|>')}"
    made = life.command(write(parents, name=name, model="artifact:sft", **HOW["lora"], **how))
    folder, base = parents / "reward-lora" / "model", parents / "sft" / "model"
    tokenizer = padding(folder)
    as_by(load_any(folder, base, tokenizer, bf16=False), tokenizer, scored)
    assert json.loads((made.model / "adapter_config.json").read_text())["r"] == 4
    learned = load_file(made.checkpoints / "step-4" / "learned.safetensors")
    assert learned and not any("reward" in name for name in learned), "it is frozen"


def test_scores_are_those_of_the_plain_text(parents, scored, tmp_path):
    """A reward model with another tokenizer and template than the policy's reads what a person
    would."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from tests.training import test_preference, test_pretrain

    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(30):
        (texts / f"{i}.txt").write_text(f"Question {i}: what is {i} plus one? It is {i + 1}. " * 20)
    run = tmp_path / "run"
    life.command(test_pretrain.write(run, texts, data__max_length=256, optim__batch_tokens=2048))
    more = {"data__max_length": 256, "data__max_rejected": 1.0, "optim__steps": 4, "evaluation": {}}
    ranker = life.command(test_preference.write(run, "reward", model="artifact:pretrain", **more))
    life.command(write(run, reward=[{"model": "artifact:reward"}], optim__steps=2))
    tokenizer = AutoTokenizer.from_pretrained(ranker.model)
    own = AutoTokenizer.from_pretrained(life.TINY / "model")
    assert len(tokenizer("What is 2 + 2?")["input_ids"]) != len(own("What is 2 + 2?")["input_ids"])
    as_by(
        AutoModelForSequenceClassification.from_pretrained(ranker.model).eval(), tokenizer, scored
    )


# --- durable ---


@pytest.mark.parametrize(
    "how", ["full", "grpo", *map(life.by_the_dozen, ("lora", "trunk", "qlora", "grpo, lora"))]
)
def test_resume_is_bitwise_the_straight_run(tmp_path, how):
    """R1, R5: killed after a checkpoint, then told to stop in an update and in a save."""
    changes = HOW[how] | {"reference__target": 1.0, "data__eval": {"holdout": 0.1}}
    changes |= {"mixture": MIXTURE} | (RESAMPLED if "grpo" in how else NORMALIZED)
    whole = life.command(write(tmp_path / "whole", **changes))
    path = write(tmp_path / "run", **changes)
    for hook, code in (
        ("ppo_kill_after_2", -signal.SIGKILL),
        ("ppo_term_in_3", 143),
        ("ppo_term_in_save_4", 143),
    ):
        trial = life.Trial(path, hook=hook)
        assert trial.wait() == code, trial.text()
        cut = 2 if "launch__micro_batch_size" in changes else "auto"
        with pytest.raises(UserError, match=r"micro_batch_size.*auto \(1,024 tokens\)") as refused:
            life.command(path, [f"launch.micro_batch_size={cut}"])
        assert refused.value.code == 3
    made = life.command(path)
    assert life.essence(made) == life.essence(whole)
    assert (made.path / "rollouts.jsonl").read_text() == (whole.path / "rollouts.jsonl").read_text()


@pytest.mark.parametrize("optimizer", [life.by_the_dozen("paged_adamw"), "adamw_8bit"])
def test_other_optimizers_resume_exactly(tmp_path, optimizer):
    whole = life.command(write(tmp_path / "whole", optim__optimizer=optimizer))
    path = write(tmp_path / "run", optim__optimizer=optimizer)
    trial = life.Trial(path, hook="ppo_kill_after_2")
    assert trial.wait() == -signal.SIGKILL, trial.text()
    assert life.essence(life.command(path)) == life.essence(whole)


@pytest.mark.parametrize(
    "how", ["full", *map(life.by_the_dozen, ("trunk", "lora", "grpo", "grpo, lora"))]
)
def test_a_batch_cut_any_way_is_one_trajectory(tmp_path, monkeypatch, how):
    """Micro-batches of 1, 2, 8 and by tokens, rollouts of 3 at a time, two processes: losses, and
    what is published."""
    from llmpipe.rl import passes
    from tests.training.test_trl import probe_logits

    monkeypatch.setattr(passes, "full_pass", lambda on_gpu: 90)  # `auto`: two or three episodes
    same = {name: value for name, value in HOW[how].items() if not name.startswith("launch")}
    same |= {"data__eval": {"holdout": 0.1}, "mixture": MIXTURE}
    made = [
        life.command(
            write(
                tmp_path / f"run{micro}",
                **same,
                launch__micro_batch_size=micro,
                launch__rollout_batch_size=size,
            )
        )
        for micro, size in ((8, 64), (2, 3), (1, 1), ("auto", 5))
    ]
    two = write(tmp_path / "two", **same, launch__micro_batch_size=4, launch__processes="auto")
    made.append(life.pair(two))
    for artifact in made[1:]:
        for one, other in zip(metrics(made[0]), metrics(artifact), strict=True):
            for name in (
                "loss",
                "objective/kl",
                "objective/scores",
                "val/explained_variance",
                "groups/mixed",
                "grad_norm",
                "eval_score",
            ):
                assert other.get(name) == pytest.approx(one.get(name), abs=1e-4), (
                    name,
                    one["step"],
                )
    if "adapter" in HOW[how]:
        from safetensors.torch import load_file

        adapters = [load_file(artifact.model / "adapter_model.safetensors") for artifact in made]
        assert all(
            (found[n] - t).abs().max() < 1e-4
            for found in adapters[1:]
            for n, t in adapters[0].items()
        )
        return
    logits = [probe_logits(artifact) for artifact in made]
    assert max(float((found - logits[0]).abs().max()) for found in logits[1:]) < 1e-4


@pytest.mark.parametrize("how", ["lora", *map(life.by_the_dozen, ("full", "grpo"))])
def test_recomputed_activations_change_nothing(tmp_path, how):
    """Also where the critic is an adapter of another rank on the policy's base."""
    made = [
        life.command(
            write(
                tmp_path / kind,
                **HOW[how],
                optim__steps=3,
                launch__activation_checkpointing=kind,
            )
        )
        for kind in ("none", "selective", "full")
    ]
    of_none, *others = map(updates, made)
    for one, other in [pair for each in others for pair in zip(of_none, each, strict=True)]:
        for name in ("loss", "grad_norm", "objective/kl", "val/explained_variance"):
            assert other.get(name) == pytest.approx(one.get(name), abs=1e-5), name


def test_passes_end_when_the_policy_has_moved(tmp_path):
    """The first minibatch finds the policy where it was; the second finds what the first did."""
    moving = {"optim__steps": 1, "optim__warmup": 0}
    made = life.command(write(tmp_path / "run", **moving, algorithm__stop_kl=1e-6))
    assert updates(made)[0]["optimizer_steps"] == 2


def test_rewards_of_any_size_leave_the_policys_step_as_long(tmp_path):
    """The gradients of policy and critic are clipped apart."""
    from safetensors.torch import load_file

    once = {"optim__steps": 1, "optim__warmup": 0, "algorithm": {"epochs": 1, "minibatches": 1}}
    once |= {"optim__epsilon": 1.0, "optim__max_grad_norm": 0.01, "optim__learning_rate": 1.0}
    made = []
    for weight in (1.0, 300.0):
        reward = [{"function": f"{tmp_path}/rewards.py:letters", "weight": weight}]
        path = write(tmp_path / f"run{weight}", **once, reward=reward, reference__coefficient=0.0)
        made.append(life.command(path))
    (small,), (large,) = map(updates, made)
    assert large["grad_norm"] == pytest.approx(small["grad_norm"], rel=1e-3)
    assert large["val/grad_norm"] == pytest.approx(300 * small["val/grad_norm"], rel=1e-3)
    before = load_file(life.TINY / "model" / "model.safetensors")
    one, other = (load_file(artifact.model / "model.safetensors") for artifact in made)
    for name, tensor in one.items():
        moved = tensor - before[name]
        assert (other[name] - before[name] - moved).abs().max() < 1e-2 * moved.abs().max()


def test_one_score_alone_teaches_nothing(tmp_path, capsys):
    """It is said after ten updates, and is no success at the end; with a checkpoint between."""
    same = {
        "reward": [{"function": f"{tmp_path}/rewards.py:none"}],
        "optim__steps": 11,
        "algorithm": {"epochs": 1, "minibatches": 1},
        "checkpoint": {"every": 9},
    }
    path = write(tmp_path / "run", **same)
    trial = life.Trial(path, hook="ppo_term_in_5")
    assert trial.wait() == 143, trial.text()
    with pytest.raises(UserError, match="every answer of 11 updates scored 0: nothing") as refused:
        life.command(path)
    assert refused.value.code == 4
    assert "every answer of 10 updates scored 0: there is nothing" in capsys.readouterr().out
    assert not Artifact(tmp_path / "run" / "ppo").finished


def test_kl_of_answers_from_a_part_of_the_distribution_is_explained(tmp_path, capsys):
    life.command(write(tmp_path / "run", rollout={"max_new_tokens": 4, "top_k": 5}, optim__steps=1))
    assert "KL: answers are drawn from a part of the distribution" in capsys.readouterr().out
    life.command(write(tmp_path / "whole", rollout={"max_new_tokens": 4}, optim__steps=1))
    assert "KL: answers are drawn" not in capsys.readouterr().out


def test_clipped_scores(tmp_path):
    """What is learned from has them clipped; what is reported has not."""
    lines = []
    for limit in (None, 0.25):
        changes = {"optim__steps": 1, "reference__coefficient": 0.0}
        path = write(tmp_path / f"run{limit}", algorithm__clip_scores=limit, **changes)
        lines += updates(life.command(path))
    assert lines[0]["objective/scores"] == lines[1]["objective/scores"] > 0.25
    assert lines[0]["objective/rlhf_reward"] == pytest.approx(lines[0]["objective/scores"])
    assert lines[0]["loss/value"] != lines[1]["loss/value"]


def test_the_auto_micro_batch_counts_answers_and_the_mixture(tmp_path):
    from llmpipe.run.machine import micro_batch_size

    sizes = []
    for changes in ({"max_new_tokens": 64}, {"max_new_tokens": 960}):
        path = write(
            tmp_path / "run", rollout=changes, launch={"processes": 1}, optim__batch_size=64
        )
        sizes.append(micro_batch_size(load(path, schema("ppo")), 1, False))
    path = write(
        tmp_path / "run",
        launch={"processes": 1},
        optim__batch_size=64,
        mixture=MIXTURE | {"max_length": 512},
    )
    assert [*sizes, micro_batch_size(load(path, schema("ppo")), 1, False)] == [8, 1, 2]


def test_a_critic_begins_as_the_parents_adapter(parents, monkeypatch):
    """Where the policy goes on with an adapter, so does what predicts its return."""

    from llmpipe.rl.loop import Loop

    seen = {}
    judge = Loop.judge

    def judged(self, answers):
        if self.state.step == 0:
            weights = dict(self.actors.cast.published.named_parameters())
            pairs = [
                (name, name.replace(".critic.", ".default."))
                for name in weights
                if ".critic." in name
            ]
            seen["equal"] = [torch.equal(weights[name], weights[other]) for name, other in pairs]
        return judge(self, answers)

    monkeypatch.setattr(Loop, "judge", judged)
    life.command(
        write(
            parents, name="critic-continued", model="artifact:lora", optim__steps=1, **HOW["lora"]
        )
    )
    assert len(seen["equal"]) == 28 and all(seen["equal"])


def test_a_signal_before_a_due_evaluation(tmp_path):
    """The evaluation waits for the resumed run, the last update's too; one that is done is not done
    again."""
    changes = {"data__eval": {"holdout": 0.1}, "evaluation": {"every": 2}}
    whole = life.command(write(tmp_path / "whole", **changes))
    path = write(tmp_path / "run", **changes)
    for hook, code in (
        ("ppo_term_in_2", 143),
        ("ppo_kill_after_4", -signal.SIGKILL),
        ("ppo_term_in_6", 143),
    ):
        trial = life.Trial(path, hook=hook)
        assert trial.wait() == code, trial.text()
    assert life.essence(life.command(path)) == life.essence(whole)


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2"])
def test_other_architectures(tmp_path, kind):
    """Learned positions; a head that a file has under another name (Pythia's)."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
    }
    shape |= {"max_position_embeddings": 128} | (
        {"intermediate_size": 64} if kind == "gpt_neox" else {}
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=512, **shape))
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(life.TINY / "model").save_pretrained(tmp_path / "model")
    made = life.command(write(tmp_path / "run", model=str(tmp_path / "model"), optim__steps=2))
    assert made.verify().verified["max_logit_difference"] < 1e-5
    assert all(line["val/rollout_difference"] < 1e-5 for line in updates(made))


def test_models_whose_answers_would_mix_are_refused(tmp_path):
    """Falcon keeps rows apart by padding alone: laid end to end they would see one another."""
    from transformers import AutoTokenizer, FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    FalconForCausalLM(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(life.TINY / "model").save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="does not know how FalconForCausalLM keeps answers apart"):
        life.command(write(tmp_path / "run", model=str(tmp_path / "model")))
    with pytest.raises(UserError, match="neither embeddings nor head"):
        life.command(
            write(tmp_path / "head", adapter={"rank": 4, "targets": ["q_proj", "lm_head"]})
        )


@pytest.mark.parametrize(("where", "how"), [("loss", "full"), ("gradient", "grpo")])
def test_nan_stops_before_the_optimizer(tmp_path, where, how):
    """R13."""
    trial = life.Trial(write(tmp_path / "run", **HOW[how]), hook=f"ppo_nan_{where}_3")
    assert trial.wait() == 4, trial.text()
    assert "stopped before the optimizer step" in trial.text()
    assert not Artifact(tmp_path / "run" / HOW[how].get("stage", "ppo")).finished


# --- what users get wrong ---


@pytest.mark.parametrize("how", ["full", "grpo"])
@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("fails", 2, "line 15: ValueError: no such thing"),
        ("short", 2, "gave 1 scores for 8 answers"),
        ("nan", 4, "gave nan for"),
        ("words", 2, "gave 'much' for"),
        ("missing", 2, "has no attribute 'missing'"),
    ],
)
def test_a_reward_function_that_fails(tmp_path, name, code, words, how):
    path = write(tmp_path / "run", **HOW[how])
    recipe = json.loads(path.read_text())
    recipe["reward"] = [{"function": f"{tmp_path}/rewards.py:{name}"}]
    path.write_text(json.dumps(recipe))
    with pytest.raises(UserError) as refused:
        life.command(path)
    assert (
        refused.value.code == code
        and words in refused.value.message
        and "\n" not in refused.value.message
    )
    assert not Artifact(tmp_path / "run" / HOW[how].get("stage", "ppo")).finished


def test_a_reward_function_is_given_every_column(tmp_path):
    """Of each step, also where none of its rows has the column."""
    rows = [{"prompt": f"What is {i} + 1?"} for i in range(40)]
    rows[-1]["level"] = "hard"
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    function = tmp_path / "levels.py"
    function.write_text(
        "def score(prompts, completions, level, **others):\n"
        "    assert len(level) == len(prompts) and set(level) <= {None, 'hard'}\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    changes = {"data__train": [{"path": str(data)}], "optim__steps": 2}
    reward = [{"function": f"{function}:score"}]
    assert life.command(write(tmp_path / "run", reward=reward, **changes)).finished


def test_prompts_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match=r"max_new_tokens: 2,000 tokens.*takes 512"):
        life.command(write(tmp_path / "run", rollout__max_new_tokens=2000))
    with pytest.raises(UserError, match="an answer of 500 exceed the model's 512"):
        life.command(write(tmp_path / "run", rollout__max_new_tokens=500))
    with pytest.raises(UserError, match="too long"):
        life.command(write(tmp_path / "other", data__max_length=8))


def test_empty_answers_are_scored(parents, monkeypatch):
    from llmpipe.rl.sampling import Sampler

    monkeypatch.setattr(Sampler, "text", lambda self, episode: "")
    made = life.command(
        write(parents, name="empty", reward=[{"model": "artifact:reward"}], optim__steps=1)
    )
    assert math.isfinite(updates(made)[0]["objective/scores"])


def test_a_verifier_reads_the_answer_beside_the_prompt(tmp_path):
    rows = [{"prompt": f"{i} + 1 =", "answer": i + 1, "kind": "sum"} for i in range(9)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data__train": [{"path": str(tmp_path / "sums.jsonl")}], "optim__steps": 1}
    letters = {"verifier": "regex", "pattern": "[a-m]"}  # so that there is something to learn
    made = life.command(
        write(tmp_path / "run", reward=[{"verifier": "number"}, letters], **changes)
    )
    assert 0 <= updates(made)[0]["scores/number"] <= 1
    (tmp_path / "sums.jsonl").write_text(
        "".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows)
    )
    with pytest.raises(UserError, match="no answer to compare with"):
        life.command(write(tmp_path / "bare", reward=[{"verifier": "number"}], **changes))


def test_recipes(tmp_path):
    for changes, message in [
        ({"reward": []}, "at least 1"),
        (
            {"reward": [{"model": "artifact:rm", "verifier": "number"}]},
            "give one of model, function, verifier",
        ),
        ({"reward": [{"function": "rewards.py"}]}, "is not ./file.py:name"),
        ({"reward": [{"verifier": "regex"}]}, "needs it"),
        ({"adapter": {"rank": 4, "init": "pissa"}}, "which is the reference"),
        ({"algorithm__minibatches": 3}, "must be a multiple of algorithm.minibatches"),
        ({"critic": {"start": "reward"}}, "there is no reward model"),
        ({"trainer": {"x": 1}}, "unknown key"),
        ({"reward": [{"verifier": "regex", "pattern": "("}]}, "unterminated"),
        ({"critic": {"start": "reward"}, "adapter": {"rank": 4}}, "there is no reward model"),
        ({"quantization": {"bits": 8}, "adapter": {"rank": 4}}, "ppo takes 4"),
    ]:
        with pytest.raises(UserError) as refused:
            load(write(tmp_path / "run", **changes), schema("ppo"))
        assert message in str(refused.value)


def test_a_folder_that_is_no_reward_model(tmp_path):
    with pytest.raises(UserError, match="is not a reward model") as refused:
        life.command(write(tmp_path / "run", reward=[{"model": str(life.TINY / "model")}]))
    assert refused.value.code == 3


def test_a_changed_reward_function_is_another_artifact(tmp_path):
    path = write(tmp_path / "run", optim__steps=1)
    life.command(path)
    (tmp_path / "rewards.py").write_text(REWARD.replace("/ 4", "/ 5"))
    with pytest.raises(UserError, match=r"rewards\.py") as refused:
        life.command(path)
    assert refused.value.code == 3


@pytest.mark.parametrize("how", ["full", "lora"])
def test_a_mixture_is_learned_beside(tmp_path, how):
    """PPO-ptx: its first loss is plain transformers' of the same rows, and it falls although no
    score asks for it."""
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    from llmpipe.training.rows import dataset

    same = {**HOW[how], "reward": [{"function": f"{tmp_path}/rewards.py:none"}], "optim__steps": 12}
    same["data__train"] = [{"path": str(ROWS), "limit": 10}]
    every = {"train": [{"path": str(ROWS)}], "max_length": 64, "batch_size": 37, "coefficient": 2.0}
    made = life.command(
        write(tmp_path / "run", **same, mixture=every, algorithm={"epochs": 1, "minibatches": 1})
    )
    first, *_, last = updates(made)
    assert last["loss/mixture"] < first["loss/mixture"] - 0.2
    manifest = made.verify()
    mixed = manifest.data.mixture
    assert mixed["rows"]["kept"] == 72 and mixed["sequences"]["train"] == 37, (
        "a step reads every row once"
    )
    table = dataset(made.run / ".prepared" / mixed["data"] / "train.arrow")
    model = AutoModelForCausalLM.from_pretrained(life.TINY / "model")
    total = count = 0
    for row in table:
        at = 0
        for length in row["seq_lengths"]:
            ids, labels = (
                torch.tensor([row[name][at : at + length]]) for name in ("input_ids", "labels")
            )
            with torch.no_grad():
                learned = int((labels[:, 1:] != -100).sum())
                total += float(model(ids, labels=labels).loss) * learned
            count, at = count + learned, at + length
    assert first["loss/mixture"] == pytest.approx(total / count, abs=1e-5)
    assert first["loss"] == pytest.approx(
        first["loss/policy"] + 0.1 * first["loss/value"] + 2 * total / count, abs=1e-4
    )
    assert len(load_file(made.path / "seen.safetensors")["asks"]) == 70, (
        "of the prompts and the mixture, two of which are asked twice"
    )


def test_a_score_that_rises(tmp_path):
    """It learns, held out too; every weight of the policy moved; the rows of the table can be
    read."""
    from safetensors.torch import load_file

    made = life.command(
        write(
            tmp_path / "run",
            optim__steps=25,
            optim__batch_size=16,
            optim__learning_rate=4e-3,
            data__eval={"holdout": 0.1},
            reference__coefficient=0.01,
            samples={"prompts": ["What is 2 + 2?"]},
        )
    )
    final = made.verify().final
    assert final["eval_score"] > final["eval_score_before"] + 0.3
    before, after = (
        load_file(life.TINY / "model" / "model.safetensors"),
        load_file(made.model / "model.safetensors"),
    )
    assert all((after[name] != tensor).any() for name, tensor in before.items() if name in after)
    table = [json.loads(line) for line in (made.path / "rollouts.jsonl").read_text().splitlines()]
    assert len(table) == 100 and {"step", "prompt", "answer", "score", "ended", "tokens"} == set(
        table[0]
    )
    shutil.rmtree(made.path / "checkpoints")
    assert made.verify()
