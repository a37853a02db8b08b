"""A tokenizer in the words of GGUF: byte-level BPE, with the name of its pre-tokenizer.

llama.cpp does not read how a text is split before its bytes are merged: it knows some sixty ways by
name, and takes the name from the file. Another name makes other tokens, and nothing tells. So a
tokenizer is refused whose way is none of those below, and the reader proves the name on a battery
of texts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.errors import UserError

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + WORDS + r"\p{N}{1,3}" + REST
QWEN2 = CONTRACTIONS + WORDS + r"\p{N}" + REST

BY_PATTERN = {(LLAMA3, True): "llama-bpe", (LLAMA3, False): "smaug-bpe", (QWEN2, False): "qwen2"}
"""Names by the pattern that splits a text, and whether whole words are looked up before merging."""

GPT2 = "gpt-2"

BATTERY = [
    "Hello, world! It's 2026, isn't it? WE'RE here; they'LL come.",
    "  leading and   several spaces, and trailing ones  ",
    "\ttabs\t\tand\nnewlines\n\n\nand\r\nboth \n \n x",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F 2nd v1.2.3",
    "def f(x):\n    return x**2  # squares\n\n\nprint(f(3) != 9)",
    "a_b-c/d\\e@f.com https://example.org/?q=1&r=2#top $5.00 50% C++",
    "Wäre, été, naïve, Ærøskøbing, ŽIŽEK, İstanbul, straße",
    "Где правда? Ελληνικά, עברית, العربية ١٢٣, हिन्दी में, ไทย",
    "你好，世界。今天是2026年！日本語とカタカナ、한국어도",
    "\U0001f642 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001f1e8\U0001f1ed",
    "e\u0301 a\u0308 n\u0303 x\u20d7",
    "''''quotes\"\"\" ``code`` ... --- === !!! ???",
    "\u00a0no-break\u2003em\u3000ideographic\u200bzero",
]
"""Texts that ways of splitting differ on: contractions, digits, blanks, marks, alphabets."""


OF_ITS_OWN = 1000
"""Tokens of a vocabulary that are tried beside the battery."""


def battery_of(tokenizer: Tokenizer) -> list[str]:
    """The battery, and texts of the tokenizer's own tokens, evenly chosen: where it has learned
    words, numbers and blanks that are long, another way of splitting cuts them."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    ids = [number for text, number in tokenizer.get_vocab().items() if text not in special]
    chosen = sorted(ids)[:: max(len(ids) // OF_ITS_OWN, 1)]
    own = (tokenizer.decode(chosen[i : i + 20]) for i in range(0, len(chosen), 20))
    return [*BATTERY, *(text for text in own if "\ufffd" not in text and "\0" not in text)]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF has it."""

    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    pre: str
    """The name of how a text is split."""
    bos: int | None
    eos: int | None
    eot: int | None
    """A second token that ends an answer."""
    pad: int | None
    unk: int | None
    begins: bool
    """Whether a text begins with `bos`."""
    template: str | None

    def write(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        add = {
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "eot": writer.add_eot_token_id,
            "pad": writer.add_pad_token_id,
            "unk": writer.add_unk_token_id,
        }
        for name, add_id in add.items():
            if (number := getattr(self, name)) is not None:
                add_id(number)
        writer.add_add_bos_token(self.begins)
        writer.add_add_space_prefix(False)
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary_of(
    tokenizer: Tokenizer, rows: int, stops: list[int], template_kwargs: dict[str, Any]
) -> Vocabulary:
    """The vocabulary of a model with so many rows of embeddings.

    Raises UserError (2) for a tokenizer of another kind than byte-level BPE, one that splits texts
    in no way that has a name, and more ends of an answer than a GGUF file can name.
    """
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    model = raw["model"]
    _refuse_other_kinds(raw)
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [TokenType.UNUSED] * rows
    for text, number in model["vocab"].items():
        tokens[number], types[number] = text, TokenType.NORMAL
    for number, added in tokenizer.added_tokens_decoder.items():
        if number >= rows:
            problem = f"token {number} ({added.content}) has no row of embeddings"
            raise UserError(f"formats.gguf: {problem}")
        kind = TokenType.CONTROL if added.special or number in stops else TokenType.USER_DEFINED
        tokens[number], types[number] = added.content, kind
    eos = tokenizer.eos_token_id
    others = [stop for stop in stops if stop != eos]
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        pre=pre_tokenizer(raw),
        bos=tokenizer.bos_token_id,
        eos=eos,
        eot=others[0] if others else None,
        pad=tokenizer.pad_token_id,
        unk=tokenizer.unk_token_id,
        begins=begins_with_bos(tokenizer),
        template=template_with(tokenizer.chat_template, template_kwargs),
    )


def begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether a text begins with the token for that, of itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][0] == bos


def pre_tokenizer(raw: dict[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer.json splits a text. Raises UserError (2)."""
    match _steps(raw["pre_tokenizer"]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            name = GPT2
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            name = "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            whole_words = bool(raw["model"].get("ignore_merges"))
            name = BY_PATTERN.get((pattern, whole_words), "")
        case _:
            name = ""
    if not name:
        shown = json.dumps(raw["pre_tokenizer"], ensure_ascii=False)
        problem = f"the pre-tokenizer has no name in llama.cpp that is known here: {shown:.200}"
        raise UserError(f"formats.gguf: {problem}", "take merged, which transformers reads")
    return name


def _steps(pre: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre is None:
        return []
    if pre["type"] == "Sequence":
        return [step for part in pre["pretokenizers"] for step in _steps(part)]
    return [pre]


def _refuse_other_kinds(raw: dict[str, Any]) -> None:
    model, normalizer = raw["model"], raw["normalizer"]
    kind = model["type"]
    if kind != "BPE" or model.get("byte_fallback") or model.get("end_of_word_suffix"):
        what = f"{kind}{' with bytes as a fallback' if model.get('byte_fallback') else ''}"
        problem = f"the tokenizer is {what}, and byte-level BPE is what is written"
        raise UserError(f"formats.gguf: {problem}", "take merged, which transformers reads")
    if normalizer is not None and normalizer["type"] != "NFC":
        problem = f"the tokenizer normalizes texts ({normalizer['type']}), and llama.cpp does not"
        raise UserError(f"formats.gguf: {problem}", "take merged, which transformers reads")


def template_with(template: Any, kwargs: dict[str, Any]) -> str | None:
    """A chat template that has the variables of training in it: llama.cpp is told of none."""
    if not template:
        return None
    settings = [f"{{% set {name} = {_jinja(value)} %}}" for name, value in (kwargs).items()]
    return "".join(settings) + str(template)


def _jinja(value: Any) -> str:
    """A value as Jinja writes it."""
    words = {True: "true", False: "false", None: "none"}
    is_word = value is None or isinstance(value, bool)
    return words[value] if is_word else json.dumps(value, ensure_ascii=False)
