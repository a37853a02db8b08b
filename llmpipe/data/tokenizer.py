"""A model folder's tokenizer without transformers: `tokenizer.json`, its special tokens and its chat template.

What is saved here is what is published with the model, and loads with `AutoTokenizer.from_pretrained` to the same ids.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import tokenizers

from llmpipe.errors import INTEGRITY, UserError


class Tokenizer:
    """`tokenizer.json` and the special tokens of a model folder, without transformers.

    `ids(text)` equals `AutoTokenizer(text, add_special_tokens=False)`. Raises UserError (code 3) when the folder's
    files are missing or broken.
    """

    def __init__(self, folder: Path):
        self.raw = _read(folder / "tokenizer.json")
        self.config = _read_json(folder / "tokenizer_config.json", optional=True)
        self.template = own_template(folder)
        self.load()
        self.special: dict[str, str] = {}  # bos_token, eos_token, ... as the template may use them
        for name, text in _named(folder, self.config).items():
            if self.backend.token_to_id(text) is not None:
                self.special[name] = text
        if "eos_token" not in self.special:  # GPT-2's own class knew it; the model's config still does
            number = _read_json(folder / "config.json", optional=True).get("eos_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if isinstance(number, int) and (text := self.backend.id_to_token(number)):
                self.special["eos_token"] = text
        bos = self.id("bos_token")
        adds = self.config.get("add_bos_token")
        if not isinstance(adds, bool):
            adds = bos is not None and self.starts[:1] == [bos]
        self.bos = bos if adds else None  # what starts a text; a chat template writes its own

    def load(self) -> None:
        """Build the backend from `self.raw`."""
        try:
            self.backend = tokenizers.Tokenizer.from_str(self.raw)
            self.starts = self.backend.encode("a").ids
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"tokenizer.json of the model cannot be used: {error}", code=INTEGRITY) from None
        self.backend.no_truncation()
        self.backend.no_padding()
        # It adds special tokens, which are never asked for, and trims offsets, which would leave gaps in the masks.
        self.backend.post_processor = None

    def id(self, name: str) -> int | None:
        text = self.special.get(name)
        return None if text is None else self.backend.token_to_id(text)

    def ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    @property
    def sha256(self) -> str:
        """Hash of what decides token ids: tokenizer.json and the special tokens."""
        return sha256_of(self.raw + json.dumps(self.special, sort_keys=True))

    @property
    def vocab_size(self) -> int:
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def markers(self) -> list[str]:
        """The added tokens that a rendered text can contain, longest first."""
        known = [token.content for token in self.backend.get_added_tokens_decoder().values()]
        return sorted(known, key=len, reverse=True)

    def add(self, tokens: list[str]) -> list[str]:
        """Make each of `tokens` one special token; the ones that were not are returned."""
        new = [token for token in tokens if self.ids(token) != [self.backend.token_to_id(token)]]
        if new:
            full = tokenizers.Tokenizer.from_str(self.raw)
            full.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in new])
            self.raw = full.to_str()
            self.load()
        return new

    def last(self, text: str) -> str:
        """The last token of a text that consists of added tokens."""
        return self.backend.id_to_token(self.ids(text)[-1])

    def save(self, folder: Path, template: str | None) -> None:
        """Write what `AutoTokenizer.from_pretrained(folder)` reads; the tokenizer that is published with the model."""
        folder.mkdir(parents=True, exist_ok=True)
        # Named here: nothing that makes a loader run code or add tokens that tokenizer.json lacks.
        kept = (
            "add_bos_token",
            "add_eos_token",
            "clean_up_tokenization_spaces",
            "model_max_length",
            "padding_side",
            "truncation_side",
            "model_input_names",
        )
        config = {name: self.config[name] for name in kept if name in self.config}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", **self.special}
        for name, text in (
            ("tokenizer.json", self.raw),
            ("tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)),
            ("chat_template.jinja", template),
        ):
            if text is not None:
                folder.joinpath(name).write_text(text, encoding="utf-8", newline="")


def identity(folder: Path) -> str:
    """Hash of the files that decide a model's tokenizer, without loading it."""
    config = _read_json(folder / "tokenizer_config.json", optional=True)
    model = _read_json(folder / "config.json", optional=True)
    named = {**_named(folder, config), "add_bos_token": config.get("add_bos_token"), "eos": model.get("eos_token_id")}
    return sha256_of(_read(folder / "tokenizer.json") + json.dumps(named, sort_keys=True))


def _named(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The special tokens by name, wherever this folder keeps them."""
    named = {**_read_json(folder / "special_tokens_map.json", optional=True), **config}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"the model folder has no {path.name}", code=INTEGRITY) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} of the model cannot be read: {error}", code=INTEGRITY) from None


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} of the model cannot be read: {error}", code=INTEGRITY) from None
    if not isinstance(value, dict):
        raise UserError(f"{path.name} of the model is not a JSON object", code=INTEGRITY)
    return value


def own_template(folder: Path) -> str | None:
    """`chat_template.jinja`, or the config's `chat_template`: a text, or a list of named ones."""
    try:
        return folder.joinpath("chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template.jinja of the model cannot be read: {error}", code=INTEGRITY) from None
    own = _read_json(folder / "tokenizer_config.json", optional=True).get("chat_template")
    if isinstance(own, list):
        named = {item.get("name"): item.get("template") for item in own if isinstance(item, dict)}
        own = named.get("default")
    return own if isinstance(own, str) and own.strip() else None
