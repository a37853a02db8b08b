"""A model folder's tokenizer without transformers: its tokens, special tokens and chat template.

What is saved here is what is published with the model, and loads with
`AutoTokenizer.from_pretrained` to the same ids.
"""

from __future__ import annotations

import json
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
# What a saved tokenizer_config.json keeps: nothing that runs code or adds tokens which
# tokenizer.json lacks.
KEPT = (
    "add_bos_token",
    "add_eos_token",
    "clean_up_tokenization_spaces",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "model_input_names",
)


class Tokenizer:
    """`tokenizer.json` and the special tokens of a model folder.

    `ids(text)` equals `AutoTokenizer(text, add_special_tokens=False)`. Raises UserError (code 3)
    when the folder's files are missing or broken.
    """

    raw: str
    """The text of tokenizer.json, with the tokens that were added."""
    special: dict[str, str]
    """bos_token, eos_token, ... as the template may use them."""
    template: str | None
    """The chat template that came with it."""
    bos: int | None
    """What starts a text; a chat template writes its own."""

    def __init__(self, folder: Path):
        raw = _read(folder / "tokenizer.json")
        if raw is None:
            raise UserError("the model folder has no tokenizer.json", code=INTEGRITY)
        self.raw = raw
        self.config = _read_json(folder / "tokenizer_config.json")
        self.template = own_template(folder)
        self.backend, start = _load(raw)
        self.special = self._special_tokens(folder)
        bos = self.id("bos_token")
        writes_bos = self.config.get("add_bos_token")
        if not isinstance(writes_bos, bool):
            writes_bos = bos is not None and start == bos
        self.bos = bos if writes_bos else None

    def _special_tokens(self, folder: Path) -> dict[str, str]:
        special = {}
        named = {**_read_json(folder / "special_tokens_map.json"), **self.config}
        for name, value in named.items():
            text = value.get("content") if isinstance(value, dict) else value
            if not name.endswith("_token") or not isinstance(text, str):
                continue
            if self.backend.token_to_id(text) is not None:
                special[name] = text
        if "eos_token" not in special:
            # GPT-2's own class knew it; the model's config still does
            number = _read_json(folder / "config.json").get("eos_token_id")
            if isinstance(number, list) and number:
                number = number[0]
            if isinstance(number, int) and (eos := self.backend.id_to_token(number)):
                special["eos_token"] = eos
        return special

    def id(self, name: str) -> int | None:
        """The id of a special token by its name, such as `eos_token`."""
        text = self.special.get(name)
        return None if text is None else self.backend.token_to_id(text)

    def ids(self, text: str) -> list[int]:
        """The ids of a text, without special tokens around it."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def last(self, text: str) -> str:
        """The last token of a text that consists of added tokens."""
        token = self.backend.id_to_token(self.ids(text)[-1])
        assert token is not None
        return token

    def added_tokens(self) -> list[str]:
        """The tokens that are found in a text before it is split into words."""
        return [token.content for token in self.backend.get_added_tokens_decoder().values()]

    def add(self, tokens: list[str]) -> list[str]:
        """Make each of `tokens` one special token; the ones that were not are returned."""
        new = [token for token in tokens if self.ids(token) != [self.backend.token_to_id(token)]]
        if new:
            added = [tokenizers.AddedToken(text, special=True, normalized=False) for text in new]
            full = tokenizers.Tokenizer.from_str(self.raw)
            full.add_special_tokens(added)
            self.raw = full.to_str()
            self.backend, _ = _load(self.raw)
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
        if template is not None:
            files["chat_template.jinja"] = template
        for name, text in files.items():
            folder.joinpath(name).write_text(text, encoding="utf-8", newline="")


def _load(raw: str) -> tuple[tokenizers.Tokenizer, int | None]:
    """The tokenizer of a tokenizer.json, and the first token that it writes before a text."""
    try:
        backend = tokenizers.Tokenizer.from_str(raw)
        start = next(iter(backend.encode("a").ids), None)
    except Exception as error:  # the library raises plain Exception
        problem = f"tokenizer.json of the model cannot be used: {error}"
        raise UserError(problem, code=INTEGRITY) from None
    backend.no_truncation()
    backend.no_padding()
    # It adds special tokens, which are never asked for, and trims offsets, which would leave gaps
    # in the masks.
    backend.post_processor = None
    return backend, start


def own_template(folder: Path) -> str | None:
    """`chat_template.jinja`, or the config's `chat_template`: a text, or a list of named ones."""
    template: Any = _read(folder / "chat_template.jinja")
    if not template:
        template = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        template = {item.get("name"): item.get("template") for item in named}.get("default")
    return template if isinstance(template, str) and template.strip() else None


def identity(folder: Path) -> str:
    """Hash of the files that decide a model's tokenizer, without loading it."""
    return digest([_read(folder / name) for name in FILES])


def _read(path: Path) -> str | None:
    """The text of a file, or None where there is none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problem = f"{path.name} of the model cannot be read: {error}"
        raise UserError(problem, code=INTEGRITY) from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file."""
    try:
        value = json.loads(_read(path) or "{}")
    except (ValueError, RecursionError) as error:
        problem = f"{path.name} of the model cannot be read: {error}"
        raise UserError(problem, code=INTEGRITY) from None
    if not isinstance(value, dict):
        raise UserError(f"{path.name} of the model is not a JSON object", code=INTEGRITY)
    return value
