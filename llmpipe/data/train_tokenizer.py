"""A new tokenizer, learned from texts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from llmpipe.data.template.shipped import shipped

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")  # ids 0 to 3
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|pad|>",
    "clean_up_tokenization_spaces": False,
}


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Write a byte-level BPE tokenizer (GPT-2's kind) with ChatML's markers and template.

    It has `vocab_size` tokens, or fewer where the texts have no more pairs to merge. Every byte is
    a token, so any text comes back exactly. The same texts in the same order give the same
    tokenizer.
    """
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = byte_level(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(CONFIG, indent=2)
    folder.joinpath("chat_template.jinja").write_text(shipped("chatml"), encoding="utf-8")
    folder.joinpath("tokenizer_config.json").write_text(config, encoding="utf-8")
    backend.save(str(folder / "tokenizer.json"))  # last: a folder that was cut short has none
