"""Small tokenizers, each built like a family of real ones, with the family's own chat template.

What differs between families is kept: the kind of pieces, what a newline is, which tokens are
special, what begins and what ends a text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

WORDS = (
    "Hello there, First line. Second one user assistant system model And what Yes "
    "Turn turn line Is the last Below Instruction Response"
).split()
BYTES = [f"<0x{i:02X}>" for i in range(256)]

GEMMA = """\
{{ bos_token }}{% for m in messages %}\
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}\
{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
GEMMA_MARKED = GEMMA.replace(
    "{{ m.content | trim + '<end_of_turn>\n' }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{{ '<end_of_turn>\n' }}"
    "{% endgeneration %}{% else %}{{ m.content | trim + '<end_of_turn>\n' }}{% endif %}",
)
LLAMA2 = """\
{% for m in messages %}\
{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}\
{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"""
MISTRAL = """\
{{ bos_token }}{% for m in messages %}\
{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}\
{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""
ZEPHYR = """\
{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
PHI3 = """\
{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
LLAMA3 = """\
{{ bos_token }}{% for m in messages %}\
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}\
{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"""
QWEN = """\
{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}\
{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
DEEPSEEK = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}\
{% else %}{{ '<｜Assistant｜>' + m.content + eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""
HARMONY = """\
{{ '<|start|>system<|message|>You help.<|end|>' }}{% for m in messages %}\
{{ '<|start|>' + m.role + ('<|channel|>final' if m.role == 'assistant' else '') + '<|message|>' }}\
{{ m.content + ('<|return|>' if loop.last and m.role == 'assistant' else '<|end|>') }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
COHERE = """\
{{ bos_token }}{% for m in messages %}\
{{ '<|TURN|>' + ('<|BOT|>' if m.role == 'assistant' else '<|USER|>') + m.content }}\
{{ '<|END_SAYS|><|END_TURN|>' if m.role == 'assistant' else '<|END_TURN|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|TURN|><|BOT|>' }}{% endif %}"""
VICUNA = """\
{% for m in messages %}{{ ('USER: ' if m.role == 'user' else 'ASSISTANT: ') + m.content }}\
{{ ' ' if m.role == 'user' else eos_token }}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """A tokenizer as a model folder has it."""

    build: Callable[..., tokenizers.Tokenizer] | None = None
    """None where a real one is looked at."""
    special: tuple[str | AddedToken, ...] = ()
    """Its special tokens, in the order of their numbers."""
    plain: tuple[str, ...] = ()
    """Added tokens that are none: text that is never split."""
    config: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    end: str | None = None
    """What ends an assistant's turn, in its own template."""
    frames: tuple[tuple[str, str], ...] = ()
    """What is learned before and behind the words of an inner answer and of the last one, where
    that is more than the end."""
    begins: str | None = None
    """What its post-processor writes before a text."""
    stops: tuple[str, ...] = ()
    """The eos tokens of its generation config."""
    keeps: bool = True
    """Whether its tokens hold every character of a text."""

    def write(self, folder: Path) -> Path:
        """A model folder of the family, without a model."""
        folder.mkdir(parents=True, exist_ok=True)
        assert self.build
        tokenizer = self.build(self)
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.config}
        folder.joinpath("tokenizer_config.json").write_text(json.dumps(config))
        if self.template is not None:
            folder.joinpath("chat_template.jinja").write_text(self.template)
        if self.stops:
            numbers = [tokenizer.token_to_id(token) for token in self.stops]
            generation = json.dumps({"eos_token_id": numbers})
            folder.joinpath("generation_config.json").write_text(generation)
        return folder

    def added(self, tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
        """`tokenizer` with the family's tokens, and with what begins a text."""
        tokenizer.add_special_tokens(list(self.special))
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in self.plain])
        if self.begins:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{self.begins} $A",
                special_tokens=[(self.begins, tokenizer.token_to_id(self.begins))],
            )
        return tokenizer


def _pieces(family: Family, space: str) -> list[str]:
    """A vocabulary: the family's tokens, bytes, characters, and words merged from left to right."""
    spaced = [space + word for word in WORDS]
    characters = sorted({c for word in (*spaced, *WORDS) for c in word} | set(":,.?!-\"'#()12"))
    prefixes = (word[:n] for word in (*spaced, *WORDS) for n in range(2, len(word) + 1))
    special = [token if isinstance(token, str) else token.content for token in family.special]
    return list(dict.fromkeys([*special, *family.plain, *BYTES, *characters, *prefixes]))


def _merged(family: Family, space: str) -> models.BPE:
    pieces = _pieces(family, space)
    apart = {*BYTES, *family.plain, *(str(getattr(t, "content", t)) for t in family.special)}
    merges = [(piece[:-1], piece[-1]) for piece in pieces if len(piece) > 1 and piece not in apart]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def sentencepiece_bpe(family: Family) -> tokenizers.Tokenizer:
    """Gemma's: spaces are a character, a newline is a piece of the user's."""
    tokenizer = tokenizers.Tokenizer(_merged(family, "▁"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return family.added(tokenizer)


def sentencepiece_unigram(family: Family) -> tokenizers.Tokenizer:
    """T5's and XGLM's: scores of pieces, and a space before the first word."""
    pieces = _pieces(family, "▁")
    scored = [(piece, -float(i + 1) / 100 - 10 / len(piece)) for i, piece in enumerate(pieces)]
    unknown = pieces.index("<unk>")
    tokenizer = tokenizers.Tokenizer(models.Unigram(scored, unknown, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    steps = [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return family.added(tokenizer)


def llama2(family: Family) -> tokenizers.Tokenizer:
    """The first Llamas': a space before every stretch of text, also behind a special token."""
    tokenizer = tokenizers.Tokenizer(_merged(family, "▁"))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return family.added(tokenizer)


def metaspace(family: Family) -> tokenizers.Tokenizer:
    """Mistral's: a space before the first word alone."""
    tokenizer = tokenizers.Tokenizer(_merged(family, "▁"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return family.added(tokenizer)


def byte_level(
    family: Family, words: str | None = None, normalizer: Any = None
) -> tokenizers.Tokenizer:
    """GPT-2's: bytes as letters; `words`: a pattern that texts are split by first, as tiktoken."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    parts = ["Ġ" + word for word in WORDS] + WORDS
    prefixes = [word[:n] for word in parts for n in range(2, len(word) + 1) if word.isascii()]
    prefixes += ["Ġ" + word[:n] for word in WORDS for n in range(1, len(word) + 1)]
    pieces = list(dict.fromkeys([*alphabet, "ĊĊ", *prefixes]))
    merges = [(piece[:-1], piece[-1]) for piece in pieces if len(piece) > 1]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=bool(words)))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)]
    if words:
        steps = [pre_tokenizers.Split(Regex(words), "isolated"), *steps]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return family.added(tokenizer)


TIKTOKEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tiktoken(family: Family) -> tokenizers.Tokenizer:
    return byte_level(family, TIKTOKEN)


def composed(family: Family) -> tokenizers.Tokenizer:
    return byte_level(family, TIKTOKEN, normalizers.NFC())


def lowered(family: Family) -> tokenizers.Tokenizer:
    """Letters without case, and text without space around it."""
    return byte_level(
        family, None, normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()])
    )


def wordpiece(family: Family) -> tokenizers.Tokenizer:
    """BERT's: no whitespace, no case, no accents."""
    letters = sorted({c for word in WORDS for c in word.lower()} | set(":,.?!-\"'#()12é你好e"))
    words = [word.lower() for word in WORDS]
    pieces = ["[PAD]", "[UNK]", *letters, *("##" + c for c in letters), *words]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return family.added(tokenizer)


def rstripped(text: str) -> AddedToken:
    return AddedToken(text, rstrip=True, special=True, normalized=False)


LINES_AS_TOKENS = ("\n", "\n\n", "\n\n\n", "\t", "▁▁", "<unused0>", "<mask>")
# Of gpt-oss: a turn says itself of what kind it is.
SAYS_ITS_KIND = (
    ("<|channel|>final<|message|>", "<|end|>"),
    ("<|channel|>final<|message|>", "<|return|>"),
)
FAMILIES = {
    "gemma": Family(
        sentencepiece_bpe,
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        LINES_AS_TOKENS,
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "add_bos_token": True},
        GEMMA,
        "<end_of_turn>",
        begins="<bos>",
        stops=("<eos>", "<end_of_turn>"),
    ),
    "gemma-marked": Family(
        sentencepiece_bpe,
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        LINES_AS_TOKENS,
        {"bos_token": "<bos>", "eos_token": "<end_of_turn>", "pad_token": "<pad>"},
        GEMMA_MARKED,
        "<end_of_turn>",
        begins="<bos>",
    ),
    "unigram": Family(
        sentencepiece_unigram,
        ("<pad>", "</s>", "<unk>", "<|user|>", "<|assistant|>"),
        ("\n", "\n\n"),
        {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
        ZEPHYR,
        "</s>",
        keeps=False,
    ),
    "llama2": Family(
        llama2,
        ("<unk>", "<s>", "</s>"),
        config={"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
        template=LLAMA2,
        end="</s>",
        begins="<s>",
    ),
    "vicuna": Family(
        llama2,
        ("<unk>", "<s>", "</s>"),
        config={
            "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": True},
            "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": True},
            "unk_token": {"__type": "AddedToken", "content": "<unk>", "normalized": True},
            "pad_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
        },
        template=VICUNA,
        end="</s>",
        begins="<s>",
    ),
    "mistral": Family(
        metaspace,
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        config={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        template=MISTRAL,
        end="</s>",
        begins="<s>",
    ),
    "phi3": Family(
        llama2,
        (
            "<unk>",
            "<s>",
            "</s>",
            "<|endoftext|>",
            *map(rstripped, ("<|assistant|>", "<|user|>", "<|system|>", "<|end|>")),
        ),
        config={
            "bos_token": "<s>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "add_bos_token": False,
        },
        template=PHI3,
        end="<|end|>",
        begins="<s>",
        stops=("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
    "gpt2": Family(
        byte_level,
        ("<|endoftext|>",),
        config=dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    ),
    "llama3": Family(
        tiktoken,
        (
            *("<|begin_of_text|>", "<|end_of_text|>"),
            *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
        ),
        config={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        template=LLAMA3,
        end="<|eot_id|>",
        begins="<|begin_of_text|>",
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "qwen": Family(
        composed,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ("<tool_call>", "</tool_call>", "<think>", "</think>"),
        {
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "add_bos_token": False,
        },
        QWEN,
        "<|im_end|>",
        stops=("<|im_end|>", "<|endoftext|>"),
    ),
    "smol": Family(
        byte_level,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        config={"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": "<|im_start|>"},
        template=QWEN,
        end="<|im_end|>",
    ),
    "deepseek": Family(
        tiktoken,
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        {
            "bos_token": "<｜begin▁of▁sentence｜>",
            "eos_token": "<｜end▁of▁sentence｜>",
            "pad_token": "<｜end▁of▁sentence｜>",
            "add_bos_token": True,
            "tokenizer_class": "LlamaTokenizerFast",
        },
        DEEPSEEK,
        "<｜end▁of▁sentence｜>",
    ),
    "gpt-oss": Family(
        tiktoken,
        (
            *("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|call|>"),
            *("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
        ),
        config={
            "bos_token": "<|startoftext|>",
            "eos_token": "<|return|>",
            "pad_token": "<|endoftext|>",
        },
        template=HARMONY,
        end="<|return|>",
        frames=SAYS_ITS_KIND,
        stops=("<|return|>", "<|endoftext|>", "<|call|>"),
    ),
    "cohere": Family(
        composed,
        (
            *("<PAD>", "<UNK>", "<BOS>"),
            *("<|TURN|>", "<|USER|>", "<|BOT|>", "<|END_SAYS|>", "<|END_TURN|>"),
        ),
        config={"bos_token": "<BOS>", "eos_token": "<|END_TURN|>", "pad_token": "<PAD>"},
        template=COHERE,
        end="<|END_SAYS|><|END_TURN|>",
        begins="<BOS>",
    ),
    "lowered": Family(
        lowered,
        ("<|endoftext|>",),
        config={"eos_token": "<|endoftext|>"},
        template=VICUNA,
        end="<|endoftext|>",
        keeps=False,
    ),
    "wordpiece": Family(
        wordpiece,
        ("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
        config={"eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
        template=VICUNA,
        end="[SEP]",
        keeps=False,
    ),
    "no-eos": Family(tiktoken, ("<|im_start|>", "<|im_end|>"), template=QWEN, end="<|im_end|>"),
}
