"""What is measured: the models' shapes, and how much of each thing a part does."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings, in transformers' words."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int = 49_152
    max_position_embeddings: int = 8_192

    @property
    def weights(self) -> int:
        """How many it has."""
        grouped = self.num_key_value_heads / self.num_attention_heads
        attention = 2 * self.hidden_size**2 * (1 + grouped)
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        layer = round(attention) + feed_forward + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size
        return embeddings + self.num_hidden_layers * layer + self.hidden_size

    def flops_per_token(self, context: int) -> int:
        """Operations that a token costs where all weights are trained (Chowdhery 2022, B)."""
        attention = 12 * self.num_hidden_layers * self.hidden_size * context
        return 6 * self.weights + attention

    def config(self) -> dict[str, Any]:
        """The keywords of a LlamaConfig, of which token 0 pads and token 2 ends."""
        tokens = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
        return asdict(self) | tokens | {"tie_word_embeddings": True}


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    shapes: dict[str, Shape]
    """`large` is what stages are timed with, `small` what has to be quick."""
    precision: str
    """`optim.precision` of every recipe; the peer's arithmetic as well."""
    rows: int
    """Conversations, pairs and documents of the data."""
    mean_words: int
    """Of a conversation; the longest has six times, the shortest a fifth of it."""
    length: int
    """Tokens of a packed row or a block."""
    batch: int
    """Sequences of an optimizer step."""
    unpacked_batch: int
    micro_batch: int
    """Sequences per forward pass; in dpo and ppo that of the peer, and llmpipe chooses."""
    warm_up: int
    """Steps of llmpipe's that are not counted: kernels are chosen and compiled in them."""
    steps: int
    """Steps of llmpipe's that are counted."""
    peer_steps: int
    """Steps of the peer's that are counted, after two that are not."""
    answers: int
    """Of an update of ppo."""
    answer_tokens: int
    stages: tuple[str, ...]
    """That are run to their end, on a tiny model."""
    resumed: tuple[str, ...]
    """Those of them that are stopped in a second run, and go on."""
    long_run: int
    """Steps of the part that watches the memory."""


FULL = Scale(
    shapes={
        "large": Shape(2048, 24, 32, 32, 8192),  # SmolLM2-1.7B
        "small": Shape(576, 30, 9, 3, 1536),  # SmolLM2-135M
    },
    precision="bf16",
    rows=2_500,
    mean_words=200,
    length=2_048,
    batch=16,
    unpacked_batch=64,
    micro_batch=4,
    warm_up=3,
    steps=8,
    peer_steps=4,
    answers=64,
    answer_tokens=128,
    stages=("pretrain", "sft", "lora", "qlora", "reward", "dpo", "kto", "ppo", "ppo-model", "eval"),
    resumed=("sft", "lora", "dpo", "ppo"),
    long_run=50,
)

_DWARF = Shape(64, 2, 4, 2, 128, vocab_size=1_024, max_position_embeddings=512)

TINY = Scale(
    shapes={"large": _DWARF, "small": _DWARF},
    precision="fp32",
    rows=60,
    mean_words=15,
    length=128,
    batch=4,
    unpacked_batch=4,
    micro_batch=2,
    warm_up=1,
    steps=2,
    peer_steps=2,
    answers=8,
    answer_tokens=8,
    stages=("sft", "reward", "ppo", "ppo-model", "eval"),
    resumed=("sft", "ppo"),
    long_run=12,
)
