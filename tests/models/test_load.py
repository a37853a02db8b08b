"""Where a model to look at is loaded to, and what one that is drawn would take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llmpipe.models import architecture, load
from llmpipe.run.folders import tensors_of
from llmpipe.run.footprint import Shape, of_llama
from tests import life

MODEL = life.TINY / "model"


@pytest.mark.parametrize(
    ("share", "alone", "cards", "place"),
    [
        (0.85, True, 2, "cuda"),
        (0.95, True, 2, load.SPREAD),  # which fits, but for a pass and the answers' cache
        (0.95, False, 2, "cuda"),  # another process has the other card
        (0.95, True, 1, "cuda"),
    ],
)
def test_a_model_that_leaves_no_room_is_spread(monkeypatch, share, alone, cards, place):
    size = 2 * sum(tensor.numbers for tensor in measured())
    free = int(size / share)
    fake = {
        "is_available": lambda: True,
        "mem_get_info": lambda: (free, 2 * free),
        "device_count": lambda: cards,
    }
    for name, answer in fake.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    assert load._place(MODEL, torch.bfloat16, alone) == place


def measured():
    shapes = [tensor.shape for tensor in tensors_of(MODEL).values()]
    return [SimpleNamespace(numbers=torch.Size(shape).numel()) for shape in shapes]


def test_without_a_gpu_it_lies_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load._place(MODEL, torch.bfloat16, alone=True) == "cpu"


class Vocabulary:
    bos_token_id = None

    def __len__(self):
        return 512

    def get_vocab(self):
        return {"last": 511}


@pytest.mark.parametrize("tied", [True, False])
def test_the_shape_of_what_is_drawn_is_known_before(tied):
    asked = SimpleNamespace(
        kind="llama",
        layers=2,
        width=32,
        heads=4,
        kv_heads=2,
        ffn=64,
        tied=tied,
        rope_theta=1e4,
        rope_scaling={},
    )
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": tied,
    }
    drawn = architecture.shape_of(asked, Vocabulary(), 128)
    assert drawn == Shape.of(config, of_llama(config))
    asked.kind, asked.kv_heads = "gpt2", None
    small = architecture.shape_of(asked, Vocabulary(), 128)
    assert small.layer == 4 * 32 * 32 + 2 * 32 * 64 + (4 + 1 + 4) * 32 + 64, "with biases and norms"
