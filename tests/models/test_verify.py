"""Generation of what is published: it writes several lines, and stops where a turn ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from llmpipe.errors import UserError
from llmpipe.models.verify.model import compare_model
from tests.data.families import FAMILIES


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A tiny model with Gemma's kind of tokenizer, where newlines are added tokens."""
    folder = FAMILIES["gemma"].write(tmp_path_factory.mktemp("gemma"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def published(gemma, folder: Path, **generation):
    model, tokenizer = gemma
    eos = generation.pop("eos", ["<end_of_turn>", "<eos>"])
    numbers = tokenizer.convert_tokens_to_ids(eos)
    assert tokenizer.unk_token_id not in numbers
    model.generation_config = GenerationConfig(
        eos_token_id=numbers, pad_token_id=tokenizer.pad_token_id, **generation
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return compare_model(model, tokenizer, folder)


@pytest.mark.parametrize(
    "generation",
    [{"max_length": 4}, {"num_beams": 3, "num_return_sequences": 2}, {"output_scores": True}],
)
def test_what_generates_as_it_should(gemma, tmp_path, generation):
    generation |= {"return_dict_in_generate": True, "cache_implementation": "quantized"}
    verified = published(gemma, tmp_path, **generation)
    assert verified.stops_at == gemma[1].convert_tokens_to_ids(["<end_of_turn>", "<eos>"])


@pytest.mark.parametrize(
    ("generation", "said"),
    [
        ({"eos": ["<eos>", "\n"]}, r"would stop at '\\n', which ordinary text holds"),
        ({"eos": ["<end_of_turn>", "<eos>", "\n\n"]}, r"would stop at '\\n\\n', which"),
        ({"eos": ["<eos>"]}, "does not stop at what ends the assistant's turns"),
        ({"eos": ["<end_of_turn>"]}, "does not stop at the end of a turn"),
        ({"stop_strings": ["\n"]}, r"several lines stops at '\\n\\n', not at the end"),
        ({"stop_strings": [":"]}, "several lines stops at ':', not at the end"),
    ],
)
def test_generation_that_stops_elsewhere(gemma, tmp_path, generation, said):
    with pytest.raises(UserError, match=said) as error:
        published(gemma, tmp_path, **generation)
    assert error.value.code == 3


def test_generation_that_transformers_refuses(gemma, tmp_path):
    with pytest.raises(UserError, match=r"generation_config\.json: cannot be read as") as error:
        published(gemma, tmp_path, repetition_penalty=-1.0)
    assert error.value.code == 3
