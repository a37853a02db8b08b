"""A model folder's tokenizer without transformers: its tokens, special tokens and chat template.

What is saved here is what is published with the model, and loads with
`AutoTokenizer.from_pretrained` to the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from llmpipe.data.soundness import LARGEST
from llmpipe.data.vocabulary import Vocabulary
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.faults import misread
from llmpipe.files.json import digest, parse_json, read_text

TOOL_USE = "additional_chat_templates/tool_use.jinja"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    TOOL_USE,
)
# What other tokenizers are kept in, which transformers can rewrite as a tokenizer.json.
OTHER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
LARGEST_TEMPLATE = 4 << 20  # bytes; the longest of real families have 20,000
# The special tokens that transformers knows by name.
NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Ordinary text: none of its tokens may end a generation.
SEVERAL_LINES = 'One line.\nAnother: 1, 2\n\n\tA "third" (of 3)!\r\n    - a list\n    - its end?\n'
# A hieroglyph, a cuneiform sign, a Cyrillic letter of one manuscript, and an emoji of 2020.
RARE = "\U00013000\U00012000\ua66e\U0001fad6"
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
    stops: list[str]
    """The tokens that the model's configs stop a generation at."""
    notes: list[str]
    """What a user should know of the folder, a sentence each."""

    def __init__(self, folder: Path):
        raw = _read(folder / "tokenizer.json")
        if raw is None:
            raise _without_tokenizer(folder)
        self.notes = []
        self.config = _read_json(folder / "tokenizer_config.json")
        self.template = own_template(folder)
        vocabulary = Vocabulary.of(raw)
        first = vocabulary.first
        self._take(vocabulary)
        self._complete(folder)
        self.special = self._special_tokens(folder)
        self.stops = self._stops(folder)
        bos = self.id("bos_token")
        begins = bos is not None and first == bos
        asked = self.config.get("add_bos_token")
        self.bos = bos if (asked if isinstance(asked, bool) else begins) else None
        if begins != (self.bos is not None):
            # whether transformers obeys the config depends on its version and the class it picks
            token = None if self.bos is None else (self.special["bos_token"], self.bos)
            self._take(self._vocabulary.beginning_with(token))

    def _take(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.backend = vocabulary.backend
        self.raw = vocabulary.raw

    def _complete(self, folder: Path) -> None:
        """Have the tokens that transformers has once it loaded the folder.

        It adds what tokenizer_config.json lists and tokenizer.json lacks or flags otherwise, and
        makes special what is named as such. Raises UserError where a number would be another one.
        """
        has = self._vocabulary.added()
        listed = _listed(folder, self.config)
        changed = {i: token for i, token in listed.items() if repr(has.get(i)) != repr(token)}
        lacking = {i: t for i, t in changed.items() if self.backend.token_to_id(t.content) is None}
        flagged = {token.content: token for token in (*has.values(), *listed.values())}
        tokens = [changed[i] for i in sorted(changed)]
        for text in _named(folder, self.config):
            token = flagged.get(text) or tokenizers.AddedToken(text, normalized=False)
            is_known = text in flagged or self.backend.token_to_id(text) is not None
            if is_known and not token.special:
                token.special = True
                tokens.append(token)
        if tokens:
            self._take(self._vocabulary.with_tokens(tokens))
        for number, token in lacking.items():
            if (after := self.backend.token_to_id(token.content)) != number:
                problem = f"{token.content} is token {number} of its config"
                raise UserError(
                    f"{folder / 'tokenizer.json'}: lacks tokens: {problem}, and would be {after}",
                    _rewrite(folder),
                    INTEGRITY,
                )

    def _special_tokens(self, folder: Path) -> dict[str, str]:
        special = {}
        named = {**_read_json(folder / "special_tokens_map.json"), **self.config}
        for name, value in named.items():
            text = _content(value)
            if not name.endswith("_token") or text is None:
                continue
            if self.backend.token_to_id(text) is not None:
                special[name] = text
            elif name.removesuffix("_token") in NAMED:
                self.notes.append(f"{name} {text} is not used: tokenizer.json has no such token")
        if "eos_token" not in special:
            # GPT-2's own class knew it; the model's config still does
            eos = next(self._ends_of_configs(folder), None)
            if eos is not None:
                special["eos_token"] = eos
        return special

    def _ends_of_configs(self, folder: Path) -> Iterator[str]:
        """The tokens whose numbers the model's configs name as eos."""
        for name in ("config.json", "generation_config.json"):
            numbers = _read_json(folder / name).get("eos_token_id")
            for number in numbers if isinstance(numbers, list) else [numbers]:
                if isinstance(number, int) and 0 <= number < 1 << 32:
                    token = self.backend.id_to_token(number)
                    if token is not None:
                        yield token

    def _stops(self, folder: Path) -> list[str]:
        added = {token.content for token in self._vocabulary.added().values()}
        stops = []
        for token in dict.fromkeys(self._ends_of_configs(folder)):
            if token in added and token.strip():
                stops.append(token)
            elif token != self.special.get("eos_token"):
                problem = "is a piece of ordinary text; generation will not stop there"
                self.notes.append(f"{token!r}, an eos of the model's configs, {problem}")
        return stops

    def id(self, name: str) -> int | None:
        """The id of a special token by its name, such as `eos_token`."""
        text = self.special.get(name)
        return None if text is None else self.backend.token_to_id(text)

    @cached_property
    def has_all(self) -> bool:
        """Whether it has tokens for every character, as those of bytes are."""
        return self.lost(RARE, self.backend.encode(RARE, add_special_tokens=False)) is None

    @cached_property
    def _unknown(self) -> int | None:
        name = self.special.get("unk_token") or getattr(self.backend.model, "unk_token", None)
        number: int | None = self.backend.token_to_id(name or "<unk>")
        return number

    def lost(self, text: str, encoding: Any) -> str | None:
        """The first character of a text that no token of its `tokenizers.Encoding` stands for."""
        kept = bytearray(len(text))
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token != self._unknown:
                kept[start:end] = b"1" * (end - start)
        pairs = zip(text, kept, strict=True)
        lost = next((it for it, told in pairs if not told and not it.isspace()), None)
        if lost is None or self._unknown in encoding.ids:
            return lost
        # offsets behind a character that has no token at all are those of others
        return next((it for it in text if not it.isspace() and not self.ids(it)), lost)

    def ids(self, text: str) -> list[int]:
        """The ids of a text, without special tokens around it."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def last(self, text: str) -> str:
        """The last token of a text that consists of added tokens."""
        token = self.backend.id_to_token(self.ids(text)[-1])
        assert token is not None
        return token

    def special_tokens(self) -> list[str]:
        """The tokens that are found in a text before it is split into words, and that stand for no
        text: flagged as special, or an end of generation. One of whitespace is none.
        """
        added = self._vocabulary.added().values()
        flagged = [token.content for token in added if token.special]
        return [text for text in dict.fromkeys([*flagged, *self.stops]) if text.strip()]

    def check_stops(self, tokens: list[str]) -> None:
        """Raises UserError when ordinary text holds one of the tokens that stop a generation."""
        ordinary = set(self.ids(SEVERAL_LINES))
        for token in tokens:
            if self.backend.token_to_id(token) in ordinary:
                problem = f"{token!r} would end every generation, and ordinary text holds it"
                hint = "name a special token as eos_token in the model's tokenizer_config.json"
                raise UserError(f"the tokenizer cannot be used: {problem}", hint, INTEGRITY)

    def add(self, tokens: list[str]) -> list[str]:
        """Make each of `tokens` one special token; the ones that were not are returned."""
        special = set(self.special_tokens())
        new = [token for token in tokens if self.ids(token) != [self.backend.token_to_id(token)]]
        unmarked = [token for token in tokens if token in new or token not in special]
        if unmarked:
            flags = {"special": True, "normalized": False}
            added = [tokenizers.AddedToken(text, **flags) for text in unmarked]
            self._take(self._vocabulary.with_tokens(added))
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


def _listed(folder: Path, config: dict[str, Any]) -> dict[int, tokenizers.AddedToken]:
    """The added tokens that files beside tokenizer.json list, by their numbers."""
    listed = config.get("added_tokens_decoder")
    older = _read_json(folder / "added_tokens.json") if listed is None else {}
    named = set(_named(folder, config))
    try:
        tokens = {int(i): tokenizers.AddedToken(**token) for i, token in (listed or {}).items()}
        if not all(token.content for token in tokens.values()):
            raise ValueError("one has no content")
        for text, number in older.items():
            is_special = text in named
            token = tokenizers.AddedToken(text, special=is_special, normalized=not is_special)
            tokens[int(number)] = token
    except (AttributeError, TypeError, ValueError) as error:
        problem = f"{folder}: the added tokens of the model's tokenizer cannot be read: {error}"
        raise UserError(problem, code=INTEGRITY) from None
    return tokens


def _named(folder: Path, config: dict[str, Any]) -> list[str]:
    """The tokens that the files beside tokenizer.json call special."""
    named = {**_read_json(folder / "special_tokens_map.json"), **config}
    values = [named.get(f"{name}_token") for name in NAMED]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        others = named.get(name)
        values += others.values() if isinstance(others, dict) else others or []
    return list(dict.fromkeys(text for value in values if (text := _content(value))))


def _content(value: Any) -> str | None:
    """The text of a token in a config: a text, or an object that holds it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _without_tokenizer(folder: Path) -> UserError:
    others = [name for name in OTHER_FILES if (folder / name).exists()]
    problem = f"{folder}: the model folder has no tokenizer.json"
    if not others:
        return UserError(problem, code=INTEGRITY)
    return UserError(f"{problem}, only {', '.join(others)}", _rewrite(folder), INTEGRITY)


def _rewrite(folder: Path) -> str:
    """The hint to let transformers write a tokenizer.json that holds everything."""
    call = f"AutoTokenizer.from_pretrained(p).save_pretrained(p), p = {str(folder)!r}"
    return f"transformers can write it (with sentencepiece or tiktoken): {call}"


def own_template(folder: Path) -> str | None:
    """`chat_template.jinja`, or the config's `chat_template`: a text, or several named ones.

    As transformers has it, conversations with tools take the one that is named `tool_use`; both are
    brought into one text, which every server reads.
    """
    template: Any = _read(folder / "chat_template.jinja")
    with_tools: Any = _read(folder / TOOL_USE)
    if not template:
        template = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        template = {item.get("name"): item.get("template") for item in named}
    if isinstance(template, dict):
        with_tools = with_tools or template.get("tool_use")
        template = template.get("default")
    if not isinstance(template, str) or not template.strip():
        return None
    if not isinstance(with_tools, str) or not with_tools.strip():
        return template
    return _by_tools(with_tools, template)


def _by_tools(with_tools: str, without: str) -> str:
    """One template of two. The signs keep their outer whitespace; Jinja drops a last newline."""
    first, second = (text.removesuffix("\n") for text in (with_tools, without))
    return f"{{%+ if tools +%}}{first}{{%+ else +%}}{second}{{%+ endif +%}}"


def identity(folder: Path) -> str:
    """Hash of the files that decide a model's tokenizer, without loading it."""
    return digest([_read(folder / name) for name in FILES])


def _read(path: Path) -> str | None:
    """The text of a file, or None where there is none."""
    try:
        return read_text(path, LARGEST if path.suffix == ".json" else LARGEST_TEMPLATE)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise misread(error, path) from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file."""
    try:
        value = parse_json(_read(path) or "{}")
    except ValueError as error:
        problem = f"{path.name} of the model cannot be read: {error}"
        raise UserError(problem, code=INTEGRITY) from None
    if not isinstance(value, dict):
        raise UserError(f"{path.name} of the model is not a JSON object", code=INTEGRITY)
    return value
