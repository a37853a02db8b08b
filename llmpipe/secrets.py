"""What looks like a secret, by its name or by itself: no recipe may hold one, and no log keeps one.

A recipe is written into every artifact that is made of it, and artifacts travel. Secrets come from
the environment, where the libraries that need them look for them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

REDACTED = "[redacted]"

ALWAYS = {"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials"}
"""Words that make any name that of a secret."""

LAST = {"pwd", "apikey", "auth", "authorization", "bearer", "token"}
"""Words that do so at the end of a name."""

KEYS = {"access", "account", "api", "auth", "encryption", "private", "secret", "signing", "ssh"}
"""What a key is that opens something."""

TEMPLATES = set(
    "bos eos eot eom pad unk sep cls mask image audio video vision box start stop begin end first "
    "last next new turn role tool think special prefix suffix middle blank newline".split()
)
"""Of what a template's variable ends in `_token`."""

ABOUT = set("level policy length size count mode type kind format field column style rules".split())
"""Words at the end of a name that only speaks of a secret."""

SETTINGS = {"none", "null", "true", "false", "auto", "required", "optional", "enabled", "disabled"}
"""Values that are none."""

_MIXED = r"(?=[A-Za-z]*\d)(?=[A-Z\d]*[a-z])(?=[a-z\d]*[A-Z])[A-Za-z\d]"  # as no word is

SHAPES = {
    "a token of Hugging Face": (
        # a path may be called so, in small letters
        r"(?<![/\w])hf_[A-Za-z\d]{20,}(?!\w|[./]\w)|(?<!\w)hf_(?=[a-z\d]*[A-Z])[A-Za-z\d]{20,}"
    ),
    "a key of an API": (
        # words of a name have hyphens between them
        rf"\bsk-(?:[\w-]{{0,99}}?[-_])?(?:[A-Za-z\d]{{20,}}|{_MIXED}{{16,}})[\w-]*"
        r"|\bAIza[\w-]{35}"
    ),
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})",
    "a token of GitLab": r"\bglpat-[\w-]{20,}",
    "a token of Slack": r"\bxox[abeoprs]-[\w-]{10,}",
    "a key of AWS": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a signed token (JWT)": r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{4,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-----END [A-Z ]*KEY-----)?",
    "an address with a password": r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)",
    "an address with a secret": (
        r"(?<=[?&])(?i:access_token|api_?key|auth|password|secret|sig|signature|token)"
        r"=[^&\s'\"]{6,}"
    ),
    "a header with a secret": (
        # a bearer, or what is basic, is most often followed by words
        r"(?i:\bauthorization['\"]?\s?[:=]\s?['\"]?(?:bearer|basic)) [\w.~+/-]{12,}=*"
        r"|\b(?i:bearer|basic) (?=[^\s\d]*\d)"
        r"(?:[A-Za-z\d]{16,}|(?=[^\sa-z]*[a-z])(?=[^\sA-Z]*[A-Z])[\w.~+/-]{16,})=*"
    ),
}
"""What secrets look like that are well known."""

MARKS = "hf_ sk- AI gh git glpat xox AKIA ASIA eyJ KEY :// ? & earer EARER asic ASIC".split()
"""One of these is in each."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")

# behind a colon a sentence may follow; bounds, since a text may be one long word
_ASSIGNED = r"""(?mx)
    (?<![\w.-]) (?P<name> [A-Za-z][\w.-]{0,99})
    (?: (?P<is> ['"]?=) (?P<value> [^\s,;}\]]{1,999})
      | (?P<colon> ['"]?:[ ]) (?P<last> [^\s,;}\]]{1,999}) (?= \s*(?:$|[,;}\]])) )
"""

_SHORTEST = 8
"""Letters of a secret: a shorter one stands in too many words."""


def is_secret_name(name: str) -> bool:
    """Whether what is called so is a secret: `api_key`, `hubToken`, `AWS_SECRET_ACCESS_KEY`."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[-1] in ABOUT:
        return False
    before, last = words[-2] if len(words) > 1 else "", words[-1]
    return (
        bool(ALWAYS & set(words))
        or (last in LAST and not (last == "token" and before in TEMPLATES))
        or (last == "key" and before in KEYS)
    )


def kind_of(text: str) -> str | None:
    """What secret a text holds, by its look; None where it seems to hold none."""
    if len(text) < _SHORTEST or not any(mark in text for mark in MARKS):
        return None
    return next((kind for kind, shape in SHAPES.items() if re.search(shape, text)), None)


def is_secret(name: str, value: Any) -> bool:
    """Whether something of this name and value is a secret; a special token of a model is none."""
    if not isinstance(value, str) or len(value) < 4 or value.lower() in SETTINGS:
        return False
    if re.fullmatch(r"[<\[|{].*[>\]|}]", value):
        return False
    return is_secret_name(name)


def secrets_in(values: Any, named: bool = False) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """The place of every secret in a document, and what it is.

    `named`: names may be anybody's, and tell as well; elsewhere they are a recipe's own.
    """
    if isinstance(values, dict):
        for key, value in values.items():
            if named and is_secret(str(key), value):
                yield (key,), "a secret, by its name"
                continue
            free = named or key in ("trainer", "chat_template_kwargs")
            for place, what in secrets_in(value, free):
                yield (key, *place), what
    elif isinstance(values, list):
        for i, value in enumerate(values):
            for place, what in secrets_in(value, named):
                yield (i, *place), what
    elif isinstance(values, str) and (kind := kind_of(values)):
        yield (), kind


def redacted(text: str) -> str:
    """A text without secrets: those of the environment, and what looks like one or is called so."""
    for value in _of_environment():
        text = text.replace(value, REDACTED)
    for shape in SHAPES.values() if any(mark in text for mark in MARKS) else ():
        text = re.sub(shape, REDACTED, text)
    return re.sub(_ASSIGNED, _without_value, text)


def _without_value(match: re.Match[str]) -> str:
    given = match["value"] or match["last"]
    value = given.strip("'\":")
    if value.startswith(REDACTED) or not is_secret(match["name"].rpartition(".")[2], value):
        return match[0]
    colon = ":" if given.endswith(":") else ""
    return f"{match['name']}{match['is'] or match['colon']}{REDACTED}{colon}"


def _is_innocent(value: str) -> bool:
    """Whether a value of the environment is a setting, or a path as PWD has it."""
    return value.lower() in SETTINGS or (value.startswith("/") and os.path.exists(value))


def _of_environment() -> list[str]:
    """The secrets that this process was given, the longest first."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and is_secret_name(name) and not _is_innocent(value)
    }
    return sorted(values, key=len, reverse=True)
