"""Whether results of tools stand where their calls do, as far as a template tells by nothing else.

Most templates write neither ids nor the names of results: the first result is then read as that of
the first call, whatever the row says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from llmpipe.data.examples import Messages
from llmpipe.data.template.texts import NAMES, Place, Text

REASON = "template drops ids"
SHORTEST = 4  # characters of an id that is looked for in a text; a shorter one may stand anywhere


def misplaced(
    messages: Messages, text: str, texts: list[Text], places: Iterable[Place]
) -> tuple[str, str] | None:
    """Reason and detail where a result would be read as that of another call.

    `text` is what is rendered of the messages, with `texts` of theirs at `places`.
    """
    named: set[int] | None = None
    for turn, call, others in _answered(messages):
        result = messages[turn]
        identity, name = result.get("tool_call_id"), result.get("name")
        if identity and call.get("id", identity) != identity and not _is_told(identity, text):
            problem = f"turn {turn + 1} is the result of {identity[:40]!r}, and stands in the place"
            return REASON, f"{problem} of {call['id'][:40]!r}; put results in the order of calls"
        if name and name != call["function"]["name"] and name in others:
            if named is None:
                written = (texts[place.text] for place in places)
                named = {it.turn for it in written if it.kind == NAMES}
            if turn not in named:
                problem = f"turn {turn + 1} is a result of {name[:40]}, and stands in the place of"
                detail = f"{problem} {call['function']['name'][:40]}'s"
                return REASON, f"{detail}; put results in the order of calls"
    return None


def _answered(messages: Messages) -> Iterator[tuple[int, dict[str, Any], set[str]]]:
    """Each result's message, from 0, the call in whose place it stands, and the names of all."""
    calls: list[dict[str, Any]] = []
    names: set[str] = set()
    before = ""
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "tool":
            if calls:
                yield i, calls.pop(0) if len(calls) > 1 else calls[0], names
        else:
            if role != "assistant" or before != role:
                calls = []
            calls = [*calls, *message.get("tool_calls", [])]
            names = {call["function"]["name"] for call in calls}
        before = role


def _is_told(identity: str, text: str) -> bool:
    """Whether a text has an id with the call and with its result."""
    return len(identity) >= SHORTEST and text.count(identity) > 1
