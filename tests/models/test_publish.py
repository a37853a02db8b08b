"""An adapter merged shard by shard is what PEFT makes of the whole model, bit for bit; and what was
not saved as it was trained is found, in a model of any depth and precision.
"""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from llmpipe import upstream
from llmpipe.errors import UserError
from llmpipe.models import adapters, publish
from llmpipe.models.adapters import Base, load_frozen
from llmpipe.models.pretrained import load_model
from llmpipe.recipe.sections import Quantization
from tests import life

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # PEFT asks transformers under an old name
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",  # said once, by `load`
    "ignore:Input and output embeddings are no longer tied:UserWarning",
    "ignore:fan_in_fan_out is set to False but the target:UserWarning",
    "ignore:The following .*_pattern keys:RuntimeWarning",
)

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LINEAR = {"target_modules": ["q_proj", "down_proj"]}
ALL_LINEAR = {"target_modules": "all-linear"}
EXPERTS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
KINDS = {
    "lora": ("llama", {}, LINEAR),
    "all linear, half precision": (
        "llama",
        {"dtype": torch.bfloat16},
        {"target_modules": "all-linear"},
    ),
    "rslora, tied": ("llama", {"tie_word_embeddings": True}, LINEAR | {"use_rslora": True}),
    "dora": ("llama", {"dtype": torch.bfloat16}, LINEAR | {"use_dora": True}),
    "biases": ("qwen2", {}, {"target_modules": ["q_proj", "v_proj"]}),
    "conv1d": ("gpt2", {"tie_word_embeddings": True}, {"target_modules": ["c_attn", "c_fc"]}),
    "embeddings": ("llama", {}, {"target_modules": ["embed_tokens", "v_proj"]}),
    "tied embeddings learn apart": (
        "llama",
        {"tie_word_embeddings": True},
        LINEAR | {"modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "tokens": ("llama", {}, LINEAR | {"trainable_token_indices": {"embed_tokens": [3, 9]}}),
    "tokens, tied": (
        "llama",
        {"tie_word_embeddings": True, "dtype": torch.bfloat16},
        LINEAR | {"trainable_token_indices": [3, 9]},
    ),
    "experts": ("mixtral", {"num_local_experts": 4}, EXPERTS),
    "renamed in the file": ("gpt_neox", {}, {"target_modules": ["dense", "query_key_value"]}),
    "reward": ("llama", {"scores": True}, LINEAR | {"task_type": "SEQ_CLS"}),
}


def a_base(folder, kind, scores=False, dtype=torch.float32, **shape):
    """A model with the tiny model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(life.TINY / "model")
    torch.manual_seed(0)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = {"vocab_size": len(tokenizer), "tie_word_embeddings": False, **SHAPE, **ids, **shape}
    config = AutoConfig.for_model(kind, **shape)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def an_adapter(folder, tokenizer, options, scores=False, **how):
    """An adapter in training, every tensor of it another than it began with."""
    quantization, dtype = how.get("quantization"), how.get("dtype", torch.float32)
    model = load_frozen(folder, quantization, dtype, scores=scores)
    if not scores:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    options = {"task_type": "CAUSAL_LM"} | options
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, **options))
    upstream.with_bias(adapted)
    adapters.upcast_trained(adapted)
    adapters.forget_base(adapted)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    base = Base(folder, "base", None, quantization, dtype)
    return adapted.eval(), base


OFTEN = [("lora", 5000), ("dora", publish.SHARD), ("tokens, tied", 5000)]
MERGES = [(name, shard) for name in KINDS for shard in (publish.SHARD, 5000)]


@pytest.mark.parametrize(
    ("name", "shard"), [life.by_the_dozen(*it) if it not in OFTEN else it for it in MERGES]
)
def test_merged_part_by_part_is_what_peft_merges_at_once(tmp_path, monkeypatch, name, shard):
    kind, shape, options = KINDS[name]
    scores = shape.get("scores", False)
    tokenizer = a_base(tmp_path / "base", kind, **shape)
    adapted, base = an_adapter(tmp_path / "base", tokenizer, options, scores)
    said = []
    verified = publish.publish_adapter(adapted, tokenizer, tmp_path / "adapter", base, said.append)
    assert verified.max_logit_difference == 0 and verified.merged_difference < 1e-4
    monkeypatch.setattr(publish, "SHARD", shard)
    publish.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")

    whole = load_model(tmp_path / "base", scores=scores)
    expected = adapters.on_base(whole, tmp_path / "adapter", tokenizer)
    expected = expected.merge_and_unload(safe_merge=True)
    expected.save_pretrained(tmp_path / "expected")
    saved = [load_file(file) for file in sorted((tmp_path / "merged").glob("*.safetensors"))]
    assert (len(saved) > 1) == (shard == 5000)
    merged = {name: tensor for file in saved for name, tensor in file.items()}
    (file,) = (tmp_path / "expected").glob("*.safetensors")
    peft = load_file(file)
    assert merged.keys() == peft.keys()
    assert all(torch.equal(merged[name], peft[name]) for name in peft)
    configs = [
        json.loads((tmp_path / at / "config.json").read_text()) for at in ("merged", "expected")
    ]
    assert configs[0] == configs[1] | {
        key: configs[0].get(key) for key in ("eos_token_id", "pad_token_id")
    }
    classes = (AutoModelForCausalLM, AutoModelForSequenceClassification)
    loaded = classes[scores].from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.state_dict().items())


TOLD = ["lora", "dora", "conv1d", "tied embeddings learn apart", "tokens, tied", "experts"]


@pytest.mark.parametrize(
    "name",
    [name if name in TOLD else life.by_the_dozen(name) for name in KINDS if name != "reward"],
)
def test_what_an_adapter_adds_is_told_by_the_names_of_the_weights(tmp_path, name):
    """Whatever PEFT calls what learns, and however it is laid; nothing of the base has moved."""
    kind, shape, options = KINDS[name]
    tokenizer = a_base(tmp_path / "base", kind, **shape)
    adapted, _ = an_adapter(tmp_path / "base", tokenizer, options)
    base = load_model(tmp_path / "base").state_dict()
    before = {it: weight.clone() for it, weight in adapted.state_dict().items()}
    updates = adapters.updates_of(adapted)
    after = adapted.state_dict()
    assert all(torch.equal(weight, after[it]) for it, weight in before.items())
    whole = adapted.merge_and_unload().float().state_dict()
    changed = {it for it in base if not torch.equal(base[it].float(), whole[it])}
    assert updates.keys() == changed and changed
    for it, update in updates.items():
        near = 0.01 * update.abs().max().item()  # of sums in the precision of the base
        torch.testing.assert_close(update.float(), whole[it] - base[it].float(), rtol=0, atol=near)


DEEP = {"num_hidden_layers": 70, "initializer_range": 0.1}
BF16 = {"dtype": torch.bfloat16}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """An adapter in bf16 on a base of 70 layers, in a folder of its own."""
    folder = tmp_path_factory.mktemp("deep") / "base"
    tokenizer = a_base(folder, "llama", **DEEP, **BF16)
    adapted, base = an_adapter(folder, tokenizer, LINEAR, **BF16)
    return tokenizer, adapted, base


def published(deep, folder):
    tokenizer, adapted, base = deep
    return publish.publish_adapter(adapted, tokenizer, folder, base, lambda line: None)


@pytest.mark.faults
def test_depth_and_half_precision_are_no_difference(deep, tmp_path):
    verified = published(deep, tmp_path / "adapter")
    assert verified.tensors == 2 * 2 * 70 and verified.max_logit_difference == 0


def change_tensor(folder):
    """One number in one matrix of one of 70 layers, by one unit in its last place."""
    file = folder / adapters.WEIGHTS
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if ".layers.35." in name)
    tensors[name][0, 0] = torch.nextafter(tensors[name][0, 0], torch.tensor(9.0))
    save_file(tensors, file)


def not_a_number(folder):
    file = folder / adapters.WEIGHTS
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, file)


def configured(**changes):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("hurt", "said", "code"),
    [
        (change_tensor, "is not the tensor that was trained", 3),
        (configured(lora_alpha=12.001), "is adapted by 3 in training, and 3.00025 saved", 3),
        life.by_the_dozen(not_a_number, "holds NaN or Inf", 4),
        life.by_the_dozen(configured(use_rslora=True), "by 3 in training, and 6 saved", 3),
        life.by_the_dozen(configured(target_modules=["q_proj"]), "is left over", 3),
        life.by_the_dozen(configured(use_dora=True), "lora_magnitude_vector is missing", 3),
    ],
)
def test_what_was_saved_otherwise_is_found_in_70_layers_of_bf16(
    deep, tmp_path, monkeypatch, hurt, said, code
):
    """The whole of it moves logits by less than bf16 rounds them."""
    compare = publish.compare_adapter

    def compare_after(model, tokenizer, folder, base):
        hurt(folder)
        return compare(model, tokenizer, folder, base)

    monkeypatch.setattr(publish, "compare_adapter", compare_after)
    with pytest.raises(UserError, match=said) as refused:
        published(deep, tmp_path / "adapter")
    assert refused.value.code == code and not (tmp_path / "adapter").exists()


FEW = {"quantization": Quantization(bits=4), **BF16}
ATTENTION, NORM = "model.layers.1.self_attn.o_proj.weight", "model.norm.weight"


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (ATTENTION, FEW),
        *(life.by_the_dozen(ATTENTION, how) for how in (BF16, {})),
        *(life.by_the_dozen(NORM, how) for how in (BF16, FEW, {})),
    ],
)
def test_another_base_than_was_trained_on_is_found(tmp_path, name, how):
    tokenizer = a_base(
        tmp_path / "base", "llama", **{key: how[key] for key in how if key == "dtype"}
    )
    adapted, base = an_adapter(tmp_path / "base", tokenizer, LINEAR, **how)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name] * 1.05
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        UserError, match=f"{name}: what was trained on is not the base's"
    ) as refused:
        publish.publish_adapter(adapted, tokenizer, tmp_path / "adapter", base, lambda line: None)
    assert refused.value.code == 3


@pytest.mark.parametrize(
    ("kind", "bits", "dtype"),
    [
        ("llama", 4, torch.bfloat16),
        ("qwen2", 4, torch.float32),  # whose layers have biases
        ("gpt2", 4, torch.bfloat16),  # and whose have weights the other way round
        life.by_the_dozen("llama", 4, torch.float32),
        life.by_the_dozen("llama", 8, torch.float32),
        life.by_the_dozen("llama", 8, torch.bfloat16),
        life.by_the_dozen("qwen2", 8, torch.bfloat16),
        life.by_the_dozen("gpt2", 8, torch.float32),
    ],
)
def test_few_bits_are_those_of_the_base(tmp_path, kind, bits, dtype):
    tokenizer = a_base(tmp_path / "base", kind, hidden_size=64)
    how = {"quantization": Quantization(bits=bits), "dtype": dtype}
    adapted, base = an_adapter(tmp_path / "base", tokenizer, ALL_LINEAR, **how)
    folder = tmp_path / "adapter"
    verified = publish.publish_adapter(adapted, tokenizer, folder, base, lambda line: None)
    assert verified.max_logit_difference == 0
    assert 1e-4 < verified.quantized_to_merged_difference < 1


@pytest.mark.parametrize("part", [".layers.1.", life.by_the_dozen("lm_head")])
def test_a_part_that_was_not_merged_is_found(tmp_path, monkeypatch, part):
    tokenizer = a_base(tmp_path / "base", "llama")
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapted, base = an_adapter(tmp_path / "base", tokenizer, options)
    publish.publish_adapter(adapted, tokenizer, tmp_path / "adapter", base, lambda line: None)
    merge = upstream.merged_part

    def forgets(adapted, module):
        names = {id(inside): name for name, inside in adapted.named_modules()}
        merged = merge(adapted, module)
        if part in names[id(module)] + ".":
            with torch.no_grad():
                next(weight for weight in merged.parameters() if weight.ndim > 1).mul_(1.001)
        return merged

    monkeypatch.setattr(upstream, "merged_part", forgets)
    with pytest.raises(UserError, match="merged into its base, the adapter's logits") as refused:
        publish.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert refused.value.code == 3 and not (tmp_path / "merged").exists()
