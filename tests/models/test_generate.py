"""A response is drawn as it is asked for, whatever the model's generation_config.json asks for, and
whatever draws it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
)

from llmpipe.models import generate as generation
from llmpipe.models.drawing import replay as replays
from llmpipe.models.drawing.draw import Sampling
from llmpipe.models.generate import generate, replayed
from llmpipe.models.pretrained import load_tokenizer
from llmpipe.models.rng import isolated_rng
from tests import life

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where steps are recorded, or are not

OWN = {
    "samples": {"do_sample": True, "temperature": 5.0, "top_k": 0},
    "is penalized": {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1},
    "leaves tokens out": {"suppress_tokens": [*range(3, 400)]},
    "searches": {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
    "copies": {"prompt_lookup_num_tokens": 3},
    "stops at texts": {"stop_strings": ["e"]},
    "returns more": {"return_dict_in_generate": True, "output_scores": True},
}
"""What the makers of models write into theirs, and what they could."""


@pytest.fixture(scope="module")
def tiny():
    folder = life.TINY / "model"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)


def drawn(model, tokenizer, sampling: Sampling) -> list[str]:
    prompts = [tokenizer(text)["input_ids"] for text in ("What colour is grass?", "Name a dog.")]
    with isolated_rng(7):
        return [response.text for response in generate(model, tokenizer, prompts, sampling)]


@pytest.mark.parametrize("kind", OWN)
def test_the_models_own_configuration_decides_nothing(tiny, kind):
    model, tokenizer = tiny
    stops = model.generation_config.eos_token_id
    expected = drawn(model, tokenizer, Sampling(12))
    other = copy.deepcopy(model)
    other.generation_config = own = GenerationConfig(eos_token_id=stops, **OWN[kind])
    assert drawn(other, tokenizer, Sampling(12)) == expected
    assert other.generation_config is own, "and it has it still, to be published with"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_nor_under_an_adapter(tiny):
    model, tokenizer = tiny
    expected = drawn(model, tokenizer, Sampling(12))
    base = copy.deepcopy(model)
    stops = base.generation_config.eos_token_id
    base.generation_config = own = GenerationConfig(eos_token_id=stops, **OWN["is penalized"])
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert drawn(adapted, tokenizer, Sampling(12)) == expected
    assert base.generation_config is own


SIZE = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
GROUPED = SIZE | {"num_key_value_heads": 1, "head_dim": 16}
ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 24}
DRAWN = {
    "llama": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**GROUPED),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZE),
    "gpt2": lambda: GPT2Config(vocab_size=512, n_embd=32, n_head=2, n_layer=2, n_positions=128),
    "a window": lambda: MistralConfig(**GROUPED, sliding_window=8),
    "two masks": lambda: Gemma2Config(
        **GROUPED, sliding_window=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=16
    ),
}
LEFT = {
    "no attention": lambda: MambaConfig(
        vocab_size=512, hidden_size=16, num_hidden_layers=1, state_size=4
    ),
    "no positions": lambda: BloomConfig(vocab_size=512, hidden_size=32, n_head=2, n_layer=2),
    "dynamic RoPE": lambda: LlamaConfig(
        **GROUPED, rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 2.0}
    ),
    "long RoPE": lambda: LlamaConfig(
        **GROUPED,
        rope_parameters=ROPE
        | {"rope_type": "longrope", "long_factor": [4.0] * 8, "short_factor": [1.0] * 8},
    ),
}
"""What is answered by transformers' own `generate`."""


def of(config, device="cpu"):
    """A random model that ends some of its answers early."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = [*range(3, 512, 7)]
    return model.to(device)


def both_ways(monkeypatch, model, tokenizer, sampling, **options):
    """Responses as they are drawn, and by transformers alone; and whether they were drawn."""
    words = "What colour is grass, in summer and in autumn, and why?".split()
    texts = [" ".join(words[:i]) for i in range(1, len(words))]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    calls, draw = [], generation._greedy
    monkeypatch.setattr(generation, "_greedy", lambda *each: calls.append(1) or draw(*each))
    with isolated_rng(7):
        ours = generate(model, tokenizer, prompts, sampling, **options)
    with monkeypatch.context() as alone, isolated_rng(7):
        alone.setattr(generation, "draws", lambda *_: False)
        expected = generate(model, tokenizer, prompts, sampling)
    return ours, expected, bool(calls)


@pytest.mark.parametrize("kind", [*DRAWN, *LEFT])
@pytest.mark.parametrize("sampling", [Sampling(40), Sampling(12, 0.9, 0.8, 50)], ids=str)
def test_answers_are_those_of_transformers(monkeypatch, tiny, kind, sampling):
    tokenizer = tiny[1]
    model = of((DRAWN | LEFT)[kind]())
    ours, expected, drawn = both_ways(monkeypatch, model, tokenizer, sampling)
    assert ours == expected and drawn == (kind in DRAWN and not sampling.temperature)
    if kind in DRAWN and drawn:
        assert len({response.tokens for response in ours}) > 1, "some end before others"


@pytest.mark.parametrize("kind", DRAWN)
def test_a_gpu_gives_the_same_answers(monkeypatch, tiny, kind):
    """With slots, as they are recorded there, batch after batch."""
    tokenizer, sampling = tiny[1], Sampling(40)
    model = of(DRAWN[kind](), DEVICE)
    assert (replayed(model, tokenizer, sampling, pytest.fail) is None) == (DEVICE == "cpu")
    monkeypatch.setattr(replays, "DEVICES", {DEVICE})
    replay = replayed(model, tokenizer, sampling, pytest.fail)
    assert replayed(model, tokenizer, Sampling(12, 0.9), pytest.fail) is None
    for _ in range(2):
        ours, expected, _ = both_ways(monkeypatch, model, tokenizer, sampling, replay=replay)
        assert ours == expected
    assert replay.serves and len(replay.steps) == 1


@pytest.mark.parametrize("records", [False, True])
def test_a_model_that_never_ends_is_answered_to_the_limit(monkeypatch, tiny, records):
    model, tokenizer = of(DRAWN["llama"]()), copy.deepcopy(tiny[1])
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    monkeypatch.setattr(replays, "DEVICES", {"cpu"} if records else set())
    replay = replayed(model, tokenizer, Sampling(20), pytest.fail)
    assert (replay is not None) == records
    ours, expected, drawn = both_ways(monkeypatch, model, tokenizer, Sampling(20), replay=replay)
    assert ours == expected and drawn
    assert {(response.tokens, response.ended) for response in ours} == {(20, False)}


def test_so_it_does_under_an_adapter(monkeypatch, tiny):
    model, tokenizer = of(DRAWN["llama"](), DEVICE), tiny[1]
    lora = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    with warnings.catch_warnings(action="ignore"):  # PEFT asks transformers under an old name
        adapted = get_peft_model(model, lora).train()
    for devices in (set(), {DEVICE}):
        monkeypatch.setattr(replays, "DEVICES", devices)
        replay = replayed(adapted, tokenizer, Sampling(20), pytest.fail)
        ours, expected, drawn = both_ways(
            monkeypatch, adapted, tokenizer, Sampling(20), replay=replay
        )
        assert ours == expected and drawn and adapted.training
