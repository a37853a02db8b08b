"""A copy of the policy draws: what it is given, how it is held to the policy, how it resumes."""

import shutil
import signal
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmpipe import upstream
from llmpipe.errors import UserError
from llmpipe.models.drawing.draw import Sampling
from llmpipe.models.hardware import Hardware
from llmpipe.rl.actors import Actors, Cast, Distribution, Role
from llmpipe.rl.rollout import vllm
from llmpipe.rl.rollout.engine import Terms
from llmpipe.rl.rollout.weights import weights_of
from llmpipe.rl.seeds import Place, Use
from tests import life
from tests.rl.rollout import fake
from tests.rl.test_ppo import HOW, updates, write

ROLLOUT = {"engine": "vllm", "max_new_tokens": 12, "temperature": 0.7}


@pytest.fixture
def sleeps(monkeypatch):
    """As on a GPU, weights and cache are given back while the policy learns."""
    monkeypatch.setattr(vllm, "SLEEPS", {"cpu"})


@pytest.mark.parametrize("how", ["full", "lora"])
def test_a_training_draws_with_it(tmp_path, monkeypatch, capsys, sleeps, how):
    """Weights are pushed before each rollout and each evaluation, and what it says of its answers
    is what the policy says."""
    made = fake.installed(monkeypatch)
    changes = {"data__eval": {"holdout": 0.1}, "samples": {"prompts": ["Warm?"]}}
    path = write(tmp_path / "run", **HOW[how], **changes, rollout=ROLLOUT, optim__steps=3)
    artifact = life.command(path)
    [engine] = made
    assert capsys.readouterr().out.count("answers: drawn by vLLM") == 1
    rollouts = 3 + 2  # an evaluation before and one after
    assert set(engine.pushed.values()) == {rollouts} and engine.asleep
    held_out = engine.answered[1]
    assert engine.answered == [4, held_out, 4, 8, 4, 8, 4, 8, 4, held_out], "each after a probe"
    lines = updates(artifact)
    assert len(lines) == 3 and max(line["val/rollout_difference"] for line in lines) < 1e-4
    scores = [line["objective/scores"] for line in lines]
    local = life.command(
        write(tmp_path / "local", **HOW[how], optim__steps=3, rollout__engine="local")
    )
    assert [line["objective/scores"] for line in updates(local)] != scores, "it draws by itself"


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore")  # whatever vLLM says of its kernels
@pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed")
@pytest.mark.parametrize("how", ["full", "lora"])
def test_the_real_one_says_what_the_policy_says(tmp_path, how):
    """After every push, or the run would end with 3; heads of 32, the fewest that it has."""
    model = tmp_path / "model"
    shutil.copytree(life.TINY / "model", model)
    config = AutoConfig.from_pretrained(
        model, num_attention_heads=2, num_key_value_heads=1, head_dim=32
    )
    config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    changes = {"model": str(model), "optim__steps": 3, "data__eval": {"holdout": 0.1}}
    artifact = life.command(write(tmp_path / "run", **HOW[how], **changes, rollout=ROLLOUT))
    lines = updates(artifact)
    assert len(lines) == 3 and max(line["val/rollout_difference"] for line in lines) < 1e-4


def test_the_same_seed_draws_the_same_however_it_is_asked(tmp_path, monkeypatch):
    """Also where it does not sleep, and in two runs."""
    made = fake.installed(monkeypatch)
    paths = [write(tmp_path / name, rollout=ROLLOUT, optim__steps=2) for name in "ab"]
    one, other = (life.essence(life.command(path)) for path in paths)
    assert one == other and not any(
        engine.asleep or engine.options.enable_sleep_mode for engine in made
    )
    another = write(tmp_path / "c", rollout=ROLLOUT, optim__steps=2, seed=7)
    assert life.essence(life.command(another))["metrics"] != one["metrics"]


def test_a_response_is_its_places_alone(monkeypatch):
    """Whatever is asked beside it, and in which order; another place draws another one."""
    fake.installed(monkeypatch)
    engine = vllm.VLLM(terms_of(tiny()), [[5]], 3)
    places = [Place(Use.DRAW, 0, 0), Place(Use.DRAW, 0, 1), Place(Use.DRAW, 1, 0)]
    places += [Place(Use.HELD_OUT, 0, 0)]
    with engine.begun():
        drawn = engine.draw([[5, 6]] * 4, places)
        again = engine.draw([[9], [5, 6]], [places[1], places[2]])
    assert len({tuple(episode.response) for episode in drawn}) == 4
    assert again[1].response == drawn[2].response
    assert torch.equal(again[1].log_probs, drawn[2].log_probs)


def test_the_cache_has_room_for_what_is_drawn_at_a_time(monkeypatch):
    """Beside a policy that learns: never more than half of what is free."""
    engine = object.__new__(vllm.VLLM)
    engine.terms = terms_of(tiny())  # 4 answers at a time, in fp32
    config, total = engine.terms.actors.causal.config, 80 << 30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for free in (40 << 30, 1 << 14):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, total))
        room = engine._memory(100)
        width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
        asked = 4 * (7 + 1) * 16 * 2 * config.num_hidden_layers * width * 4
        assert room["kv_cache_memory_bytes"] == min(asked, free // 2)
        spare = room["gpu_memory_utilization"] * total - room["kv_cache_memory_bytes"]
        assert 2 << 30 < spare < 3 << 30


@pytest.mark.parametrize("how", ["full", *map(life.by_the_dozen, ["lora"])])
def test_resume_is_bitwise_the_straight_run(tmp_path, monkeypatch, sleeps, how):
    fake.installed(monkeypatch)
    whole = life.command(write(tmp_path / "whole", **HOW[how], rollout=ROLLOUT))
    path = write(tmp_path / "run", **HOW[how], rollout=ROLLOUT)
    trial = life.Trial(path, hook="ppo_vllm_kill_after_2")
    assert trial.wait() == -signal.SIGKILL, trial.text()
    made = life.command(path)
    assert life.essence(made) == life.essence(whole)
    assert (made.path / "rollouts.jsonl").read_text() == (whole.path / "rollouts.jsonl").read_text()


@pytest.mark.parametrize("rate", [2e-3, 1e-4])
def test_stale_weights_stop_the_run(tmp_path, monkeypatch, rate):
    """Whether the policy has moved far since, or a little."""
    fake.installed(monkeypatch, fake.Deaf)
    path = write(tmp_path / "run", rollout=ROLLOUT, optim__learning_rate=rate)
    with pytest.raises(UserError, match=r"vllm has stale weights.* after push [23] ") as stopped:
        life.command(path)
    assert stopped.value.code == 3 and "\n" not in stopped.value.message
    lines = metrics_of(tmp_path / "run/ppo").splitlines()
    assert 1 <= len(lines) <= 2 and not (tmp_path / "run/ppo/model").exists()


def test_little_is_rounding_and_no_move_is_none(monkeypatch):
    """An answer that is the last one bit by bit is stale only where the policy moved."""
    fake.installed(monkeypatch)
    terms = terms_of(tiny())
    engine = vllm.VLLM(terms, [[5, 6, 7], [8]], 3)
    for _ in range(2):
        with engine.begun():
            pass
    monkeypatch.setattr(vllm, "weights_of", lambda actors: [])
    with torch.no_grad():
        terms.actors.causal.lm_head.weight.mul_(1 + 1e-6)
    with engine.begun():
        pass
    monkeypatch.setattr(vllm, "ROUNDING_FP32", 10.0)
    with torch.no_grad():
        terms.actors.causal.lm_head.weight.mul_(1.2)
    with pytest.raises(UserError, match="bit by bit, and the policy has moved by"), engine.begun():
        pass


def test_another_distributions_log_probabilities_are_seen_at_once(tmp_path, monkeypatch):
    fake.installed(monkeypatch, fake.Raw)
    with pytest.raises(UserError, match="after the first push on a probe it is") as stopped:
        life.command(write(tmp_path / "run", rollout=ROLLOUT))
    assert stopped.value.code == 3
    assert not metrics_of(tmp_path / "run/ppo")


def metrics_of(folder):
    path = folder / "metrics.jsonl"
    return path.read_text() if path.exists() else ""


def test_a_model_that_vllm_does_not_take(tmp_path, monkeypatch):
    fake.installed(monkeypatch, fake.Unwilling)
    with pytest.raises(UserError, match=r"does not take the model: .*not supported") as refused:
        life.command(write(tmp_path / "run", rollout=ROLLOUT))
    assert refused.value.code == 2 and "local" in refused.value.hint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout__top_k": 5}, "which tokens top_k and top_p left"),
        ({"rollout__top_p": 0.9}, "which tokens top_k and top_p left"),
        (HOW["qlora"], "a quantized model would be rounded"),
        ({"launch__processes": 2}, "in one process, and launch.processes is 2"),
    ],
)
def test_what_cannot_be_right_is_refused(tmp_path, monkeypatch, changes, words):
    fake.installed(monkeypatch)
    changes = {"rollout__engine": "vllm"} | changes
    with pytest.raises(UserError, match=words) as refused:
        life.command(write(tmp_path / "run", **changes))
    assert refused.value.code == 2


# --- weights ---


def tiny():
    return AutoModelForCausalLM.from_pretrained(life.TINY / "model", dtype=torch.float32).eval()


def actors_of(causal, published=None):
    role = Role(causal)
    value = torch.nn.Linear(causal.config.get_text_config().hidden_size, 1)
    cast = Cast(published or causal, role, role, role, value)
    return Actors(cast, Distribution(1.0, False))


def terms_of(model):
    from llmpipe.models.pretrained import load_tokenizer

    hardware = Hardware("cpu", 1, 1, 1, 1, bf16=False, attention="sdpa")
    tokenizer = load_tokenizer(life.TINY / "model")
    return Terms(actors_of(model), tokenizer, hardware, Sampling(6, 1.0), 4, 1, print)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_are_merged_beside_the_policy(dora, dtype):
    """As PEFT merges them, the policy's alone, and nothing of the policy moves by a bit."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=dora)
    adapted = get_peft_model(tiny().to(dtype), lora)
    adapted.add_adapter(
        "critic", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    before = {name: weight.clone() for name, weight in adapted.named_parameters()}
    actors = actors_of(adapted.get_base_model(), adapted)
    pushed = {name: weight for group in weights_of(actors) for name, weight in group}
    after = dict(adapted.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    adapted.delete_adapter("critic")
    merged = dict(adapted.float().merge_and_unload(safe_merge=True).named_parameters())
    assert pushed.keys() == merged.keys()
    assert all(torch.equal(pushed[name], weight) for name, weight in merged.items())


def test_names_are_those_of_a_checkpoint(tmp_path):
    """Experts that transformers computes together are saved one by one; tied weights once."""
    from safetensors.torch import load_file
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    groups = list(weights_of(actors_of(model)))
    pushed = {name: weight for group in groups for name, weight in group}
    assert pushed.keys() == saved.keys() and any(".experts.3." in name for name in pushed)
    assert all(torch.equal(pushed[name], weight) for name, weight in saved.items())
    assert len(groups) == 4, "embeddings, two layers, the norm"
    assert upstream.as_saved(tiny(), {"lm_head.weight": saved.popitem()[1]}).keys() == {
        "lm_head.weight"
    }
