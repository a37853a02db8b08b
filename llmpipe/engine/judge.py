"""Verdicts on pairs of answers from a model behind an OpenAI-compatible address.

Each pair is asked in both orders (judges prefer a place; Zheng 2023, section 3.3): two equal verdicts win, anything
else is a tie. A time-out, an error, HTTP 429 or 5xx, or an answer that is no verdict is asked again after 1, 2, 4 ...
seconds; a pair that gets no verdict is counted as failed, and never as a loss. The key is sent, and written nowhere.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

from llmpipe.errors import UserError

AT_ONCE = 8
QUESTION = """Two assistants answered the same request. Which answer is better: more helpful, correct and to the point?

[Request]
{request}

[Answer A]
{a}

[Answer B]
{b}

End with one line: "A" if answer A is better, "B" if answer B is better, "tie" if neither is."""
_VERDICT = re.compile(r"\W*(A|B|TIE)\W*", re.IGNORECASE)


def ask_endpoint(task: Any, pairs: list[tuple], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """A verdict for every (item, line, line of the opponent), in order. Raises UserError when no address is set."""
    address = os.environ.get("OPENAI_BASE_URL", "").rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise UserError("endpoint: OPENAI_BASE_URL is not set", "export OPENAI_BASE_URL=https://... and OPENAI_API_KEY")
    say(f"judge: {task.endpoint}, {2 * len(pairs):,} questions")

    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key.isprintable() or " " in key:
        raise UserError("endpoint: OPENAI_API_KEY is not a key", "it holds white space or control characters")

    def one(pair: tuple) -> dict[str, Any]:
        item, mine, other = pair
        ask, answers = item["ask"], (mine["answers"][0], other["answers"][0])
        request = ask["text"] if "text" in ask else "\n\n".join(turn["content"] for turn in ask["messages"])
        try:
            first = _verdict(address, key, task, QUESTION.format(request=request, a=answers[0], b=answers[1]))
            second = _verdict(address, key, task, QUESTION.format(request=request, a=answers[1], b=answers[0]))
        except _NoVerdict as error:
            return {"failed": str(error)}
        won, lost = (first, second) == ("A", "B"), (first, second) == ("B", "A")
        return {"verdicts": [first, second], "scores": {"winrate": 1.0 if won else 0.0 if lost else 0.5}}

    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        yield from pool.map(one, pairs)
    finally:  # a signal does not wait for verdicts that are under way
        pool.shutdown(wait=False, cancel_futures=True)


class _NoVerdict(Exception):
    """Every attempt failed; says how the last one did."""


def _verdict(address: str, key: str, task: Any, question: str) -> str:
    """`A`, `B` or `TIE`."""
    body = {"model": task.endpoint, "temperature": 0, "messages": [{"role": "user", "content": question}]}
    request = urllib.request.Request(f"{address}/chat/completions", json.dumps(body).encode(), method="POST")
    request.add_header("Content-Type", "application/json")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    problem = ""
    for attempt in range(task.retries + 1):
        if attempt:
            time.sleep(min(2.0 ** (attempt - 1), 30.0))
        try:
            with urllib.request.urlopen(request, timeout=task.timeout) as response:
                text = json.load(response)["choices"][0]["message"]["content"]
            last = text.strip().split("\n")[-1] if isinstance(text, str) else ""
            if match := _VERDICT.fullmatch(last):
                return match[1].upper()
            problem = f"no verdict in {last[:40]!r}"
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code}"
            if error.code < 500 and error.code not in (408, 425, 429):
                break  # asking again does not help
        except (OSError, HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
            problem = type(error).__name__  # its text may quote the request's headers
    raise _NoVerdict(problem)
