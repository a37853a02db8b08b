"""What stands before the application: who has no key is sent away, and before the probe has
agreed everybody.

An ASGI application around another one (https://asgi.readthedocs.io). Kept of its paths are
those that answer; what loads or unloads models is nobody's.

Needs Python alone: vLLM's Python, which has nothing of llmpipe, loads it as a file.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LET_IN = "let others in"
"""What the command says to the server's process when the probe has agreed."""

GRACE = 25
"""Seconds in which answers that have begun may come to their end: Kubernetes kills after 30."""

HEALTH = "/health"
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", HEALTH)


class Gate:
    """Lets in who may ask."""

    def __init__(self, app: Application, key: str | None, word: str, precision: str):
        """`key`: what clients have to show; `word`: what the command shows that asks the probe."""
        self.app = app
        self.key = key
        self.word = word
        self.precision = precision
        self.is_open = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            status, document = self._judge(scope)
            if status:
                await _answer(send, status, document)
                return
        elif scope["type"] != "lifespan":
            return
        await self.app(scope, receive, send)

    def _judge(self, scope: Scope) -> tuple[int, dict[str, Any]]:
        """The status of who is not let through, and what is said; 0 of who is."""
        if scope["path"] not in PATHS:
            return 404, _error("there is no such path", "not_found")
        asks_probe = _shows(scope, self.word)
        if not (self.is_open or asks_probe):
            return 503, _error("not ready: the probe is being asked", "not_ready")
        if scope["path"] == HEALTH:
            ours = {"precision": self.precision, "open": self.is_open} if asks_probe else {}
            return 200, {"status": "ok"} | ours
        if self.key and not (asks_probe or _shows(scope, self.key)):
            return 401, _error("the key is wrong, or there is none", "invalid_api_key")
        return 0, {}


def _shows(scope: Scope, secret: str) -> bool:
    """Whether a request carries a secret, compared in a time that tells nothing of it."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, shown = value.partition(b" ")
            return kind.lower() == b"bearer" and hmac.compare_digest(shown, secret.encode())
    return False


def _error(message: str, code: str) -> dict[str, Any]:
    """As OpenAI's own server says it."""
    return {"error": {"message": message, "type": "invalid_request_error", "code": code}}


async def _answer(send: Send, status: int, document: dict[str, Any]) -> None:
    body = json.dumps(document).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
