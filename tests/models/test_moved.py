"""A result that equals its parent is none: exit 4, in every stage, and only then."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llmpipe.errors import UserError
from llmpipe.models.moved import Start
from llmpipe.models.pretrained import load_model
from tests import life

TOO_SMALL = {"optim__learning_rate": 1e-30, "optim__steps": 2, "samples": {}, "evaluation": {}}


def model():
    return AutoModelForCausalLM.from_pretrained(life.TINY / "model")


def adapted(**settings):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own, of an old name
        return get_peft_model(model(), config)


def test_one_element_of_one_tensor_is_enough():
    trained = model()
    start = Start.of(trained)
    assert not start.moved(trained)
    with torch.no_grad():
        trained.model.norm.weight[3] *= 1 + 1e-6
    assert start.moved(trained)


def test_a_zero_that_becomes_nearly_zero_is_none():
    """A pad token's row and biases are 0, and move at any rate; fp32 hides it in all others."""
    trained = model()
    trained.model.embed_tokens.weight.data[0] = 0
    start = Start.of(trained)
    with torch.no_grad():
        for sign in (1, -1):
            trained.model.embed_tokens.weight[0] += sign * 1e-30
            assert not start.moved(trained)
            trained.model.embed_tokens.weight[0] = sign * 1e-5
            assert start.moved(trained)
            trained.model.embed_tokens.weight[0] = 0


def test_what_is_frozen_does_not_count():
    trained = model()
    trained.requires_grad_(False)
    trained.lm_head.weight.requires_grad_(True)  # tied: the embeddings
    start = Start.of(trained)
    with torch.no_grad():
        trained.model.norm.weight += 1
    assert not start.moved(trained)
    with torch.no_grad():
        trained.model.embed_tokens.weight[0, 0] += 1
    assert start.moved(trained)


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 3), (2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_counts(shape, dtype):
    """Tensors whose bytes are no multiple of eight, and views that begin within eight, too."""
    base = torch.nn.Module()
    numbers = torch.randn(64).to(dtype)[1 : 1 + torch.Size(shape).numel()].view(shape)
    base.weight = torch.nn.Parameter(numbers)
    start = Start.of(base)
    for place in range(numbers.numel()):
        before = copy.deepcopy(base.weight.data)
        base.weight.data.view(-1)[place] += 1
        assert start.moved(base)
        base.weight.data = before
        assert not start.moved(base)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "orthogonal"}])
def test_an_update_counts_where_it_changes_a_weight(settings):
    trained = adapted(**settings)
    start = Start.of(trained)
    layer = trained.base_model.model.model.layers[0].self_attn.q_proj
    assert not start.moved(trained)
    with torch.no_grad():
        layer.lora_B.default.weight += 1e-30
    assert not start.moved(trained)
    with torch.no_grad():
        layer.lora_B.default.weight += 1e-3
    assert start.moved(trained)


def test_what_learns_beside_an_update_counts_alone():
    for settings, part in (
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"trainable_token_indices": [5]}, "trainable_tokens_delta"),
    ):
        trained = adapted(**settings)
        start = Start.of(trained)
        with torch.no_grad():
            name = next(name for name in start.sums if part in name)
            trained.get_parameter(name).mul_(1.01)
        assert start.moved(trained), part


def test_the_head_of_a_reward_model_counts():
    trained = load_model(life.TINY / "model", scores=True)
    start = Start.of(trained)
    with torch.no_grad():
        trained.score.weight[0, 0] += 1e-3
    assert start.moved(trained)


def of_stage(run, stage, **changes):
    """A recipe of a stage that ends after two steps."""
    rows = {"sft": "rows.jsonl", "reward": "pairs.jsonl", "dpo": "pairs.jsonl"}
    data = {"train": [{"path": str(life.TINY / rows[stage])}], "max_length": 64}
    given = {} if stage == "reward" else {"samples": {}}
    values = TOO_SMALL | given | {"stage": stage, "data": data} | changes
    path = life.write(run, **values)
    if stage == "reward":
        path.write_text(path.read_text().replace("samples: {}\n", ""))
    return path


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("sft", {}),
        ("sft", {"optim__learning_rate": 1e-60}),
        ("sft", {"adapter": {"rank": 2}}),
        life.by_the_dozen("sft", {"adapter": {"rank": 2, "dora": True}}),
        life.by_the_dozen("sft", {"adapter": {"rank": 2, "init": "pissa"}}),
        life.by_the_dozen("sft", {"adapter": {"rank": 2, "init": "olora"}}),
        ("reward", {}),
        life.by_the_dozen("reward", {"adapter": {"rank": 2}}),
        life.by_the_dozen("dpo", {}),
        ("dpo", {"adapter": {"rank": 2}}),
    ],
)
def test_a_stage_that_moves_nothing_ends_with_4(tmp_path, stage, changes):
    path = of_stage(tmp_path / "run", stage, **changes)
    with pytest.raises(UserError, match=r"not one weight moved.*learning_rate \(1e-\d0\)") as told:
        life.command(path)
    assert told.value.code == 4
    made = tmp_path / "run" / stage
    assert not (made / "manifest.json").exists() and not (made / "model").exists()
    with pytest.raises(UserError, match="not one weight moved"):  # resumed at its end
        life.command(path)


def test_a_continued_adapter_that_moves_nothing_ends_with_4(tmp_path):
    adapter = {"rank": 2}
    life.command(life.write(tmp_path / "run", name="one", adapter=adapter, optim__steps=2))
    path = life.write(
        tmp_path / "run", name="two", model="artifact:one", adapter=adapter, **TOO_SMALL
    )
    with pytest.raises(UserError, match=r"not one weight moved.*equals artifact:one"):
        life.command(path)


def test_a_policy_without_gradients_ends_with_4(tmp_path):
    """Every answer is worth 0, and nothing holds the policy to its parent."""
    (tmp_path / "rewards.py").write_text(
        "def nothing(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    values = TOO_SMALL | {
        "stage": "ppo",
        "data": {"train": [{"path": str(life.TINY / "rows.jsonl")}], "max_length": 64},
        "optim__learning_rate": 1e-3,
        "reward": [{"function": f"{tmp_path}/rewards.py:nothing"}],
        "reference": {"coefficient": 0.0},
        "rollout": {"max_new_tokens": 8},
        "algorithm": {"epochs": 1, "minibatches": 2},
    }
    with pytest.raises(UserError, match=r"not one weight moved.*the gradients were 0") as told:
        life.command(life.write(tmp_path / "run", **values))
    assert told.value.code == 4


def test_two_processes_end_alike(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)exit code 4.*not one weight moved"):
        life.pair(life.write(tmp_path / "run", **TOO_SMALL))
