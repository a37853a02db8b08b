"""A judge: a model behind an address that speaks as OpenAI's does, asked what an answer is worth.

`POST URL/chat/completions` with one message; the number that the reply says is the score, as
`llmpipe.scores.numbers` reads numbers. The key comes from the environment and goes nowhere but into
the header of the request: no redirect is followed, and no message holds it.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from llmpipe.errors import DATA, RESOURCES, UserError
from llmpipe.scores.numbers import number_in
from llmpipe.scores.thinking import CLOSING
from llmpipe.secrets import REDACTED, redacted

AT_ONCE = 8  # questions that are open at a time
LARGEST = 1 << 20  # bytes of a reply that are read
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""What a server says that may answer later."""
LONGEST_WAIT = 30.0  # seconds between two tries

PLACES = re.compile(r"\{(prompt|response|reference)\}")
"""What a template holds in place of a row's words."""


@dataclass(frozen=True)
class Judge:
    """Whom to ask, and how."""

    url: str
    model: str
    template: str
    key: str | None
    bounds: tuple[float, float] | None
    """Between which a score has to lie."""
    timeout: float
    """Seconds that a reply may take."""
    retries: int
    wait: Callable[[float], None] = time.sleep

    def scores(self, questions: Sequence[dict[str, str]]) -> list[float]:
        """What each is worth; a question has the texts that `PLACES` names. Raises UserError: 5
        for a judge that cannot be reached, 2 for one that refuses or says no number."""
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            return list(pool.map(self.score, questions))
        finally:
            pool.shutdown(cancel_futures=True)

    def score(self, question: dict[str, str]) -> float:
        """What one answer is worth."""
        asked = PLACES.sub(lambda place: question[place[1]], self.template)
        for tried in range(self.retries + 1):
            try:
                return self._read(self._reply(asked))
            except _Later as problem:
                if tried == self.retries:
                    tries = f"{tried + 1} tries" if tried else "1 try"
                    hint = "the same command goes on from the last checkpoint"
                    raise self._error(f"{problem} ({tries})", hint, problem.code) from None
                self.wait(min(problem.after or 2.0**tried, LONGEST_WAIT))
        raise AssertionError("there is at least one try")

    def _reply(self, asked: str) -> str:
        """What the judge says. Raises _Later, or UserError for what no further try would mend."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": asked}],
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                text = response.read(LARGEST)
        except urllib.error.HTTPError as error:
            with error:
                said = f"HTTP {error.code}: {_line(error.read(LARGEST))}"
            if error.code in AGAIN:
                raise _Later(said, _seconds(error.headers.get("Retry-After"))) from None
            raise self._error(said, "see reward.judge: url, model, key_from", DATA) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            raise _Later(str(getattr(error, "reason", error)) or type(error).__name__) from None
        try:
            content: Any = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _Later(f"is no chat completion: {_line(text)}", code=DATA) from None
        return content if isinstance(content, str) else ""

    def _read(self, reply: str) -> float:
        """The number that a reply says, behind its thought. Raises _Later."""
        number = number_in(reply.rpartition(CLOSING)[2])
        if number is None:
            raise _Later(f"says no number: {reply[:80]!r}", code=DATA)
        value = float(number)
        if self.bounds and not self.bounds[0] <= value <= self.bounds[1]:
            low, high = self.bounds
            raise _Later(f"says {value:g}, which is not between {low:g} and {high:g}", code=DATA)
        return value

    def _error(self, problem: str, hint: str, code: int) -> UserError:
        text = f"judge: {self.url}: {problem}"
        if self.key:
            text = text.replace(self.key, REDACTED)
        return UserError(redacted(text), hint, code)


class _Later(Exception):
    """What another try may mend; `after` so many seconds, where the server says so."""

    def __init__(self, problem: str, after: float | None = None, code: int = RESOURCES):
        super().__init__(problem)
        self.after = after
        self.code = code


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key would go with it."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _line(content: bytes) -> str:
    """The beginning of what a server says, in a line."""
    return " ".join(content[:400].decode(errors="replace").split())[:200]


def _seconds(text: str | None) -> float | None:
    """What Retry-After says, where that is a number."""
    return float(text) if text and text.isdecimal() else None


def key_of(variable: str | None) -> str | None:
    """The key that a variable of the environment holds. Raises UserError where it holds none."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"{variable} is not set in the environment", f"export {variable}=...")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"{variable} holds what is no key", "it has no line breaks, and is ASCII")
    return key


def in_words(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as a judge reads it: the text, the one turn, or all turns with who speaks."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in prompt)
