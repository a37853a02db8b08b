"""A model folder's tokenizer without transformers: `tokenizer.json`, its special tokens and its chat template.

What is saved here is what is published with the model, and loads with `AutoTokenizer.from_pretrained` to the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files import digest

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "config.json",
    "chat_template.jinja",
)
# What a saved tokenizer_config.json keeps: nothing that runs code or adds tokens which tokenizer.json lacks.
KEPT = "add_bos_token add_eos_token clean_up_tokenization_spaces model_max_length padding_side truncation_side".split()
KEPT += ["model_input_names"]


class Tokenizer:
    """`tokenizer.json` and the special tokens of a model folder.

    `ids(text)` equals `AutoTokenizer(text, add_special_tokens=False)`. Raises UserError (code 3) when the folder's
    files are missing or broken.
    """

    def __init__(self, folder: Path):
        self.raw = _read(folder / "tokenizer.json")
        if self.raw is None:
            raise UserError("the model folder has no tokenizer.json", code=INTEGRITY)
        self.config = _read_json(folder / "tokenizer_config.json")
        self.template = own_template(folder)
        self.load()
        self.special: dict[str, str] = {}  # bos_token, eos_token, ... as the template may use them
        for name, value in {
            **_read_json(folder / "special_tokens_map.json"),
            **self.config,
        }.items():
            text = value.get("content") if isinstance(value, dict) else value
            if (
                name.endswith("_token")
                and isinstance(text, str)
                and self.backend.token_to_id(text) is not None
            ):
                self.special[name] = text
        if (
            "eos_token" not in self.special
        ):  # GPT-2's own class knew it; the model's config still does
            number = _read_json(folder / "config.json").get("eos_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if isinstance(number, int) and (text := self.backend.id_to_token(number)):
                self.special["eos_token"] = text
        bos, adds = self.id("bos_token"), self.config.get("add_bos_token")
        if not isinstance(adds, bool):
            adds = bos is not None and self.starts[:1] == [bos]
        self.bos = bos if adds else None  # what starts a text; a chat template writes its own

    def load(self) -> None:
        """Build the backend from `self.raw`."""
        try:
            self.backend = tokenizers.Tokenizer.from_str(self.raw)
            self.starts = self.backend.encode("a").ids
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"tokenizer.json of the model cannot be used: {error}", code=INTEGRITY
            ) from None
        self.backend.no_truncation()
        self.backend.no_padding()
        # It adds special tokens, which are never asked for, and trims offsets, which would leave gaps in the masks.
        self.backend.post_processor = None

    def id(self, name: str) -> int | None:
        text = self.special.get(name)
        return None if text is None else self.backend.token_to_id(text)

    def ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def last(self, text: str) -> str:
        """The last token of a text that consists of added tokens."""
        return self.backend.id_to_token(self.ids(text)[-1])

    def add(self, tokens: list[str]) -> list[str]:
        """Make each of `tokens` one special token; the ones that were not are returned."""
        new = [token for token in tokens if self.ids(token) != [self.backend.token_to_id(token)]]
        if new:
            full = tokenizers.Tokenizer.from_str(self.raw)
            full.add_special_tokens(
                [tokenizers.AddedToken(token, special=True, normalized=False) for token in new]
            )
            self.raw = full.to_str()
            self.load()
        return new

    def save(self, folder: Path, template: str | None) -> None:
        """Write what `AutoTokenizer.from_pretrained(folder)` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {name: self.config[name] for name in KEPT if name in self.config}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", **self.special}
        files = {
            "tokenizer.json": self.raw,
            "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True),
        }
        for name, text in (
            files if template is None else files | {"chat_template.jinja": template}
        ).items():
            folder.joinpath(name).write_text(text, encoding="utf-8", newline="")


def train(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Write a byte-level BPE tokenizer (GPT-2's kind) of `vocab_size` tokens with ChatML's markers and template.

    Every byte is a token, so any text comes back exactly. The same texts in the same order give the same tokenizer.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    template = Path(__file__).with_name("chatml.jinja").read_text(encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": special[0],
        "pad_token": special[3],
    }
    config |= {"clean_up_tokenization_spaces": False}
    folder.joinpath("chat_template.jinja").write_text(template, encoding="utf-8")
    folder.joinpath("tokenizer_config.json").write_text(
        json.dumps(config, indent=2), encoding="utf-8"
    )
    backend.save(str(folder / "tokenizer.json"))  # last: a folder that was cut short has none


def own_template(folder: Path) -> str | None:
    """`chat_template.jinja`, or the config's `chat_template`: a text, or a list of named ones."""
    own = _read(folder / "chat_template.jinja") or _read_json(folder / "tokenizer_config.json").get(
        "chat_template"
    )
    if isinstance(own, list):
        own = {
            item.get("name"): item.get("template") for item in own if isinstance(item, dict)
        }.get("default")
    return own if isinstance(own, str) and own.strip() else None


def identity(folder: Path) -> str:
    """Hash of the files that decide a model's tokenizer, without loading it."""
    return digest([_read(folder / name) for name in FILES])


def _read(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path.name} of the model cannot be read: {error}", code=INTEGRITY
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path) or "{}")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path.name} of the model cannot be read: {error}", code=INTEGRITY
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path.name} of the model is not a JSON object", code=INTEGRITY)
    return value
