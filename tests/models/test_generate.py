"""A response is drawn as it is asked for, whatever the model's generation_config.json asks for."""

from __future__ import annotations

import copy

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from llmpipe.models.generate import Sampling, generate, isolated_rng
from llmpipe.models.pretrained import load_tokenizer
from tests import life

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
