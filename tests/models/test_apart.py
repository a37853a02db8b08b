"""Whether texts of one row stay apart is told by a miniature of the architecture, whatever the
model's size and precision.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmpipe import upstream
from llmpipe.models import apart, miniature
from llmpipe.models.hardware import Hardware
from tests import life

HARDWARE = Hardware("cpu", 1, 1, 1, 1, False, "sdpa")

KEEP = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 32},
    "mistral": {"sliding_window": 32},
    "gpt2": {},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 8},
    "granite": {"logits_scaling": 8.0},
}
MIX = {
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "falcon": {},
    "bloom": {},
    "gpt_oss": {"head_dim": 16},  # whose masks are made without the positions
    "lfm2": {"layer_types": ["conv", "full_attention"] * 6, "conv_L_cache": 3},
    "mamba": {},
}
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def often(*kinds):
    """Every architecture, and of these a test in every run of the suite."""
    return [kind if kind in kinds else life.by_the_dozen(kind) for kind in (*KEEP, *MIX)]


def model_of(kind, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE | (KEEP | MIX)[kind] | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.set_attn_implementation(upstream.supported_attention(model, "sdpa"))
    upstream.speed_up(model, device_type="cpu")
    return model


def packed(model, texts):
    ids = torch.tensor([[i for text in texts for i in text]])
    places = torch.tensor([[i for text in texts for i in range(len(text))]])
    logits = model(input_ids=ids, position_ids=places, use_cache=False).logits[0]
    return list(logits.float().split([len(text) for text in texts]))


def alone(model, text):
    return model(input_ids=torch.tensor([text]), use_cache=False).logits[0].float()


ROAD = apart.Road(packed, alone, row=1024)


def ask(model):
    said = []
    return apart.keeps_apart(model, ROAD, HARDWARE, said.append), said


@pytest.mark.parametrize("kind", often("gemma2", "gpt_oss", "lfm2"))
def test_each_architecture_is_told(kind):
    assert ask(model_of(kind)) == (kind in KEEP, [])


@pytest.mark.parametrize("kind", ["llama", life.by_the_dozen("opt")])
def test_depth_and_precision_make_no_difference(kind):
    assert ask(model_of(kind, torch.bfloat16, num_hidden_layers=70)) == (kind in KEEP, [])


@pytest.mark.parametrize("kind", often("llama", "opt"))
def test_the_answer_is_far_from_its_threshold(kind):
    model = model_of(kind)
    with torch.no_grad():
        share = apart.mixed_share(next(miniature.miniatures(model, 1024)), ROAD)
    assert share < 1e-5 if kind in KEEP else share > 0.1


def test_a_miniature_has_a_layer_of_each_kind_and_few_of_all_else():
    model = model_of("gemma2", sliding_window=4096)
    (small, *_) = miniature.miniatures(model, row=1024)
    config = small.config
    assert config.num_hidden_layers == 2
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.sliding_window == 4096, "as in training, where it is longer than a row"
    assert next(miniature.miniatures(model, row=8192)).config.sliding_window < 21
    assert small.num_parameters() < model.num_parameters() / 4
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert config._attn_implementation == model.config._attn_implementation
    assert model.config.num_hidden_layers == 12, "the model's own stays as it is"


def test_kinds_of_layers_that_follow_from_their_places():
    shape = {"attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2}
    config = AutoConfig.for_model("jamba", **SHAPE, **shape, num_experts=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kinds = {miniature._kind(layer) for layer in miniature._layers(model)}
    small = next(miniature.miniatures(model, 1024, torch.device("cpu")))
    assert {miniature._kind(layer) for layer in miniature._layers(small)} == kinds
    assert len(kinds) == 3 and small.config.num_hidden_layers == 3


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT asks transformers under an old name
def test_an_adapter_or_few_bits_around_a_layer_are_no_other_kind():
    from peft import LoraConfig, get_peft_model

    model = model_of("mixtral")
    before = {miniature._kind(layer) for layer in miniature._layers(model)}
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    adapted = get_peft_model(model, LoraConfig(r=2, **targets)).get_base_model()
    assert {miniature._kind(layer) for layer in miniature._layers(adapted)} == before
    assert ask(adapted) == (True, [])


@pytest.mark.parametrize("kind", ["opt", life.by_the_dozen("llama")])
def test_where_none_can_be_made_the_model_itself_is_asked_and_that_is_said(monkeypatch, kind):
    monkeypatch.setattr(miniature, "MOST", 0)
    model = model_of(kind).train()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2) if weight.ndim > 1 else None
    keeps, said = ask(model)
    assert keeps == (kind in KEEP) and model.training
    assert len(said) == 1 and "asked of the model itself, within rounding" in said[0]


def test_nothing_is_drawn_from_the_generators_of_training():
    model = model_of("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ask(model)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("which", ["alone", "packed"])
def test_want_of_memory_is_no_verdict(which):
    def fails(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 MiB")

    def alone(_, text):
        return torch.tensor(text).cumsum(0).float()

    road = apart.Road(fails, fails if which == "alone" else alone, 64)
    with pytest.raises(RuntimeError, match="out of memory"):
        apart.mixed_share(None, road)
