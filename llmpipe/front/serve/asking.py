"""Questions by HTTP, as any client of the server asks them."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from typing import Any

from llmpipe.errors import INTEGRITY, UserError

PATIENCE = 600
"""Seconds that an answer may take."""

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


class Unheard(Exception):
    """Nobody answers, or not in the words of HTTP."""


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    text: str
    prompt_tokens: int | None
    """Of the question, where it says how many."""
    tokens: int | None
    """Of the answer."""
    finish: str
    """`stop`, `length` or `tool_calls`."""


@dataclass(frozen=True)
class Line:
    """The way to a server."""

    host: str
    port: int
    key: str | None

    def get(self, path: str, timeout: float = PATIENCE) -> tuple[int, Any]:
        """Status and document. Raises Unheard."""
        return self._send("GET", path, None, timeout)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The document. Raises UserError (3) where the server refuses, and Unheard."""
        status, document = self._send("POST", path, body, PATIENCE)
        if status != http.client.OK:
            problem = f"the server answers the probe with {status}: {json.dumps(document)[:300]}"
            raise UserError(problem, code=INTEGRITY)
        return document

    def _send(
        self, method: str, path: str, body: dict[str, Any] | None, timeout: float
    ) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request(method, path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            payload = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unheard(str(error)) from None
        finally:
            connection.close()
        try:
            return response.status, json.loads(payload) if payload else None
        except ValueError:
            return response.status, payload.decode(errors="replace")


def reply_of(document: Any) -> Reply:
    """The reply in what a server answers. Raises UserError (3) for another form."""
    try:
        (choice,) = document["choices"]
        usage = document.get("usage") or {}
        text = choice["message"].get("content") if "message" in choice else choice["text"]
        return Reply(
            text=text or "",
            prompt_tokens=usage.get("prompt_tokens"),
            tokens=usage.get("completion_tokens"),
            finish=choice.get("finish_reason") or "",
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        shown = json.dumps(document)[:300]
        raise UserError(f"the server answers in another form: {shown}", code=INTEGRITY) from None
