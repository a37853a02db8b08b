"""A tokenizer and a chat template, made ready for training with one another."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpipe.data.formats import Rejected
from llmpipe.data.template.ends import learn_ends, rendered, small_talk
from llmpipe.data.template.rendering import OTHER, Template
from llmpipe.data.template.sandbox import bounded
from llmpipe.data.template.shipped import shipped
from llmpipe.data.tokenizer import LARGEST_TEMPLATE, Tokenizer, own_template
from llmpipe.errors import DATA, UserError
from llmpipe.faults import misread
from llmpipe.files.json import read_text
from llmpipe.files.paths import expanded
from llmpipe.recipe.places import portable
from llmpipe.recipe.sections import TEMPLATES
from llmpipe.scores.thinking import CLOSING, OPENING, TAG

# Texts within a template that are meant to be one token each.
_TOKEN = re.compile(r"<\|[^<>|\s'\"]{1,60}\|>|<(?:start|end)_of_turn>")


def template_source(folder: Path, name: str) -> str | None:
    """The text of a template before it meets a tokenizer: what a cache key hashes.

    `name` as in `data.template`; `auto` is the one that the tokenizer in `folder` has, if any.
    Raises UserError for a file that cannot be read.
    """
    if name == "auto":
        return own_template(folder)
    try:
        if name in TEMPLATES:
            return shipped(name)
        return read_text(expanded(name), LARGEST_TEMPLATE)
    except FileNotFoundError:
        hint = f"a file, or one of: auto, {', '.join(TEMPLATES)}"
        raise UserError(f"data.template: {name}: no such file", hint) from None
    except (OSError, ValueError) as error:
        raise misread(error, f"data.template: {name}", code=DATA) from None


@dataclass(frozen=True)
class Choice:
    """A tokenizer with the template that was chosen for it."""

    name: str
    """As in `data.template`; of a path in full, what artifacts hold."""
    tokenizer: Tokenizer
    """With the tokens that were added, and with eos and pad."""
    template: str | None
    """Its text, to be saved with the tokenizer; None where rows are texts."""
    ends: list[str]
    """What ends an assistant's turn, the last turn's first; empty without a template."""
    text_eos: str
    """The token that ends a plain text."""
    stop_tokens: list[str]
    """The tokens that stop a generation."""
    added_tokens: list[str]
    """The tokens that the template needs and the tokenizer did not have."""
    notes: list[str]
    """What a user should know of all this, a sentence each."""


def choose(folder: Path, name: str, kwargs: dict[str, Any], *, thinks: bool = False) -> Choice:
    """The tokenizer in `folder` with the template `name` and the template's variables `kwargs`.

    `thinks`: an answer begins in a block of thought, which the template then opens: what is taught
    to think is asked in the same words wherever it is used.

    Raises UserError for a missing, broken, endless or hostile template, for a tokenizer without
    eos, and for a token that would stop a generation within ordinary text.
    """
    tokenizer = Tokenizer(folder)
    special = tokenizer.special
    own_eos = special.get("eos_token")
    template = template_source(folder, name)
    if own_eos is None and (template is None or "eos_token" in template):
        hint = "set eos_token in its tokenizer_config.json, or set data.template: chatml"
        raise UserError("the tokenizer has no end-of-sequence token", hint)
    if own_eos is not None:
        tokenizer.check_stops([own_eos])
    added: list[str] = []
    ends: list[str] = []
    if template is not None:
        if name in TEMPLATES and tokenizer.bos is not None:
            # a base model expects it before a conversation, too
            template = "{{- bos_token }}" + template
        added, ends = _fit(tokenizer, template, name, kwargs)
        if thinks:
            template = thinking(template, special, kwargs)
    if thinks:
        _refuse_silent_thoughts(tokenizer)
    text_eos = own_eos or special["eos_token"]
    stops = [*(tokenizer.last(end) for end in ends[:1]), text_eos, *tokenizer.stops]
    tokenizer.check_stops(stops)
    notes = [*tokenizer.notes]
    if added:
        notes.append(f"added to the tokenizer for the template {name}: {' '.join(added)}")
    if "pad_token" not in special:
        special["pad_token"] = eos = special["eos_token"]
        notes.append(f"the tokenizer has no pad token; {eos} pads, and no label is built from it")
    return Choice(
        name=portable(name),
        tokenizer=tokenizer,
        template=template,
        ends=ends,
        text_eos=text_eos,
        stop_tokens=list(dict.fromkeys(stops)),
        added_tokens=added,
        notes=notes,
    )


def thinking(text: str, special: dict[str, str], kwargs: dict[str, Any]) -> str:
    """A template that opens a block of thought where an answer begins: the one given, or what it
    says and then the tag. Raises UserError where it closes such a block there."""
    asked = rendered(Template(text, special, kwargs), small_talk(1), open_turn=True).rstrip()
    if asked.endswith(CLOSING):
        problem = "rollout.think: the template closes the block of thought before an answer begins"
        raise UserError(problem, "set data.chat_template_kwargs: {enable_thinking: true}")
    if asked.endswith(TAG):
        return text
    opening = "{% if add_generation_prompt %}{{ " + repr(OPENING) + " }}{% endif %}"
    return text.removesuffix("\n") + opening


def _refuse_silent_thoughts(tokenizer: Tokenizer) -> None:
    """Raise UserError where the end of a thought is left out of every text that a person reads, and
    so nothing would ever follow it."""
    if CLOSING in tokenizer.special_tokens():
        problem = f"rollout.think: the tokenizer calls {CLOSING} special, and no text shows it"
        raise UserError(problem, 'set its "special" to false in tokenizer.json')


def _fit(
    tokenizer: Tokenizer, text: str, name: str, kwargs: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Give the tokenizer the tokens and the eos that a template needs.

    Returns the tokens that were added, and what ends an assistant's turn. A template that is the
    tokenizer's own (`auto`) changes nothing but a missing eos.
    """
    special = tokenizer.special
    try:
        with bounded():  # the template alone: a large vocabulary may take long
            template = Template(text, special, kwargs)
            shown = template.attempt(small_talk(2), open_turn=True) or ""
    except Rejected as error:
        raise UserError(f"the chat template is refused: {error.detail}", OTHER) from None
    added: list[str] = []
    if name != "auto":
        added = tokenizer.add(sorted(set(_TOKEN.findall(text + shown))))
    ends = learn_ends(template, tokenizer)
    if "eos_token" not in special or (name != "auto" and "eos_token" not in text):
        special["eos_token"] = tokenizer.last(ends[0])
    bos = tokenizer.id("bos_token")
    if bos is not None and tokenizer.ids(rendered(template, small_talk(2)))[:2] == [bos, bos]:
        raise UserError("the chat template writes the first token twice", OTHER)
    return added, ends
