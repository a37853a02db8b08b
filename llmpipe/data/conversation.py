"""Turns of a conversation, as anybody writes them -> messages (see `examples`).

Read are {"role", "content"} of OpenAI and {"from", "value"} of ShareGPT. Keys by which a turn says
that it is context and no lesson (OpenAI's `weight`, axolotl's `train` and `training`, ms-swift's
`loss`, verl's `loss_mask`) are obeyed; whatever else a turn holds is noted in `Values.unread`.

A file that knows texts only, such as CSV, has messages as JSON. A text in a column that takes
messages is therefore messages in every kind of file, if it is JSON of one turn or a list of turns;
other text is text, be it JSON. One that begins like a list of turns and is not JSON is refused.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llmpipe.data.examples import Message, Messages, Tools
from llmpipe.data.fields import (
    Rejected,
    Values,
    kind_of,
    optional_text,
    parsed_json,
    plain,
    strict_json,
    text_of,
)

_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
    "function_call": "function_call",  # ShareGPT's: an assistant's turn of tool calls
}
_TEXTS = ("name", "tool_call_id", "reasoning_content", "thinking", "reasoning")
_LOSS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
_NEARLY_ALWAYS = frozenset({"role", "content", "from", "value"})
_READ = _NEARLY_ALWAYS | {"tool_calls", "function_call", *_TEXTS, *_LOSS}
_OF_PART = frozenset({"type", "text"})
_OF_CALL = frozenset({"type", "function", "id", "name", "arguments"})
_OF_FUNCTION = frozenset({"name", "arguments"})
_NOTHING: tuple[Any, ...] = (None, "", [], {})

_LESSON = frozenset({"true", "1", "1.0"})
_CONTEXT = frozenset({"false", "0", "0.0", "none"})

_BEGINS_AS_JSON = re.compile(r"\s*\[?\s*\{")
# as JSON, and as what Python or a second escaping makes of it
_BEGINS_AS_TURNS = re.compile(r"""\s*\[\s*\{.{0,400}?\b(?:role|from)\b["'\\]*\s*:""", re.DOTALL)


def messages_of(values: Values, name: str) -> Messages:
    """A column that holds a list of turns -> messages. Raises Rejected."""
    value = values.get(name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _turns_in(value, name)
    return _messages(value, name, values)


def prompt_messages(values: Values) -> Messages:
    """The column `prompt`, a text or messages, as messages, without the column `system`."""
    prompt = given(values, "prompt")
    if isinstance(prompt, str):
        prompt = {"role": "user", "content": prompt}
    return _messages([prompt] if isinstance(prompt, dict) else prompt, "prompt", values)


def answer_messages(values: Values, name: str) -> Messages:
    """An assistant's answer, given as a text, one message, or a list of messages."""
    value = given(values, name)
    if isinstance(value, str):
        value = {"role": "assistant", "content": text_of(value, name)}
    messages = _messages([value] if isinstance(value, dict) else value, name, values)
    if messages[-1]["role"] != "assistant":
        raise Rejected("no assistant turn", f"{name} does not end with one")
    return messages


def given(values: Values, name: str) -> Any:
    """A column that may be a text or messages; of a text that is JSON of turns, these.

    Raises Rejected for one that only begins like that.
    """
    value = values.get(name)
    if not isinstance(value, str) or not _BEGINS_AS_JSON.match(value):
        return value
    try:
        parsed = json.loads(value)  # which may be no messages, and then says what it likes
    except (ValueError, RecursionError):
        if _BEGINS_AS_TURNS.match(value):
            _turns_in(value, name)
        return value
    turns = parsed if isinstance(parsed, list) else [parsed]
    if not any(map(_is_turn, turns)) and not (parsed is turns and all(map(_lacks_role, turns))):
        return value
    values.noted.add("texts that are messages in JSON are read as messages")
    return strict_json(value)


def text_column(values: Values, name: str) -> str:
    """A column that is a text and cannot be messages. Raises Rejected."""
    value = given(values, name)
    if value is not values.get(name):
        raise Rejected("wrong type", f"{name} is messages in JSON, not text")
    return text_of(value, name)


def is_of_a_chat(values: Values) -> bool:
    """Whether texts of a row are turns of a chat: it has a system prompt or tools, or rows of its
    source have one."""
    return "system" in values or "tools" in values


def with_system(values: Values, messages: Messages) -> Messages:
    """The column `system` put before a conversation."""
    system = optional_text(values, "system")
    if not system:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"].strip() != system.strip():
        raise Rejected("two system turns", "one in the column system, one in the conversation")
    return messages


def tools_of(values: Values) -> Tools:
    """The column `tools`, JSON text or a list of functions -> a list of JSON schemas, or None."""
    tools = values.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = parsed_json(tools, "bad tools", "tools")
    if not tools or isinstance(tools, str):
        return None
    if isinstance(tools, list):
        tools = [
            parsed_json(it, "bad tools", "tools") if isinstance(it, str) else it for it in tools
        ]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Rejected("bad tools", "tools is not a list of objects")
    schemas: list[dict[str, Any]] = plain(tools, "tools", values)
    return schemas


def _turns_in(text: str, name: str) -> Any:
    """The value of a text that begins like a list. Raises Rejected where it is not JSON."""
    try:
        return strict_json(text)
    except (ValueError, RecursionError) as error:
        problem = f"{name} begins like a list of messages, and is not JSON: {error}"
        if re.match(r"\s*\[\s*\{\s*'", text):
            problem += "; it is as Python shows a list: write json.dumps of it"
        raise Rejected("wrong type", problem) from None


def _is_turn(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role", value.get("from")), str):
        return False
    return not value.keys().isdisjoint(("content", "value", "tool_calls", "function_call"))


def _lacks_role(value: Any) -> bool:
    """Whether an object looks like a turn of nobody, as one of a list."""
    return isinstance(value, dict) and "content" in value and value.keys() <= _READ


def _messages(turns: Any, name: str, values: Values) -> Messages:
    if not isinstance(turns, list):
        raise Rejected("wrong type", f"{name} is {kind_of(turns)}, not a list of messages")
    if not turns:
        raise Rejected("no messages", name)
    messages: Messages = []
    for number, turn in enumerate(turns, 1):
        at = f"{name}, message {number}"
        if not isinstance(turn, dict):
            raise Rejected("wrong type", f"{at} is {kind_of(turn)}, not an object")
        message = _message(turn, at, values)
        if messages and message["role"] == "system":
            two = messages[0]["role"] == "system"
            raise Rejected("two system turns" if two else "system turn not first", at)
        messages.append(message)
    return messages


def _message(turn: dict[str, Any], at: str, values: Values) -> Message:
    role = _role(turn, at)
    content = _either(turn, "content", "value", at)
    extras = turn.keys() - _NEARLY_ALWAYS
    calls: list[Any] = []
    if role == "function_call":
        role = "assistant"
        calls = _calls_in_content(content, at)
        content = ""
    elif extras:
        calls = _calls_beside(turn, role, at)
    text = _content(content, role, bool(calls), at, values)
    message: Message = {"role": role, "content": text}
    if calls:
        message["tool_calls"] = [_call(call, at, values) for call in calls]
    if not extras:
        return message
    if not _is_lesson(turn, role, at, values):
        message["weight"] = 0
    for extra in _TEXTS:
        if turn.get(extra) is not None:
            message[extra] = text_of(turn[extra], f"{at}, {extra}", may_be_empty=True)
    _note_unread(turn, _READ, "messages", values)
    return message


def _role(turn: dict[str, Any], at: str) -> str:
    named = _either(turn, "role", "from", at)
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise Rejected("unknown role", f"{at}: {str(named)[:40]!r}")
    return role


def _either(turn: dict[str, Any], name: str, synonym: str, at: str) -> Any:
    value = turn.get(name)
    other = turn.get(synonym)
    if value is None:
        return other
    if other is not None and other != value:
        raise Rejected("two in one message", f"{at} has both {name} and {synonym}")
    return value


def _is_lesson(turn: dict[str, Any], role: str, at: str, values: Values) -> bool:
    """Whether a turn is to be learned, as far as it says. Raises Rejected where it is unclear."""
    said: dict[str, bool] = {}
    for key in _LOSS:
        value = turn.get(key)
        if value is not None:
            shown = str(value).strip().lower()
            if shown not in _LESSON and shown not in _CONTEXT:
                problem = f"{at}: {key} is {shown[:40]}; a turn is learned (1) or not (0)"
                raise Rejected("loss of a turn", problem)
            said[key] = shown in _LESSON
    if role != "assistant":  # which is never learned
        values.unread.update(f"{key} of the {role}'s messages" for key in said if said[key])
        return True
    if len(set(said.values())) > 1:
        raise Rejected("loss of a turn", f"{at}: {' and '.join(said)} contradict each other")
    return all(said.values())


def _note_unread(value: dict[str, Any], read: frozenset[str], where: str, values: Values) -> None:
    """Note the keys of an object that nobody reads, but for those that hold nothing."""
    unread = value.keys() - read
    values.unread.update(f"{key} of {where}" for key in unread if value[key] not in _NOTHING)


def _content(content: Any, role: str, has_calls: bool, at: str, values: Values) -> str:
    """The text of a turn. Only one with tool calls, or a tool's, may be empty."""
    if isinstance(content, list):
        content = "".join(_part(part, at, values) for part in content)
    if content is None and not has_calls:
        raise Rejected("null", at)
    if has_calls:
        content = content or ""
    text = text_of(content, at, may_be_empty=True)
    if not text.strip() and not has_calls and role != "tool":
        raise Rejected("empty message", at)
    return text


def _part(part: Any, at: str, values: Values) -> str:
    """The text of one part of a content that is a list."""
    if isinstance(part, str):
        return part
    kind = (part.get("type") or "text") if isinstance(part, dict) else kind_of(part)
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        shown = f"a part of type {str(kind)[:40]!r}"
        raise Rejected("unsupported content", f"{at}: {shown}; only text is supported")
    _note_unread(part, _OF_PART, "parts of messages", values)
    return text


def _calls_in_content(content: Any, at: str) -> list[Any]:
    """ShareGPT's turn of JSON text: one call or several."""
    calls = parsed_json(content, "bad tool call", at) if isinstance(content, str) else content
    return calls if isinstance(calls, list) else [calls]


def _calls_beside(turn: dict[str, Any], role: str, at: str) -> list[Any]:
    """A turn's `tool_calls`, or the one `function_call` of OpenAI before there were several."""
    calls = turn.get("tool_calls")
    if isinstance(calls, str) and calls.strip():
        calls = parsed_json(calls, "bad tool call", f"{at}, tool_calls")
    if before := turn.get("function_call"):
        if calls:
            raise Rejected("two in one message", f"{at} has both tool_calls and function_call")
        calls = [before]
    if not calls or isinstance(calls, str):
        return []
    if role != "assistant" or not isinstance(calls, list):
        raise Rejected("bad tool call", f"{at}: tool_calls is a list, and of the assistant")
    return calls


def _call(call: Any, at: str, values: Values) -> dict[str, Any]:
    """A tool call -> {"type": "function", "function": {"name", "arguments": object}, "id"?}."""
    if not isinstance(call, dict) or (call.get("type") or "function") != "function":
        raise Rejected("bad tool call", f"{at}: {str(call)[:40]} is not a call of a function")
    function = call.get("function") or call
    if not isinstance(function, dict):
        function = {}
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise Rejected("bad tool call", f"{at}: a call has no function name")
    for item, read in (
        (call, _OF_CALL),
        (function, _OF_CALL if function is call else _OF_FUNCTION),
    ):
        _note_unread(item, read, "tool calls", values)
    function = {"name": text_of(name, at), "arguments": _arguments(function, at, values)}
    identity = call.get("id")
    if identity is None or identity == "":
        return {"type": "function", "function": function}
    return {
        "type": "function",
        "function": function,
        "id": text_of(identity, f"{at}, id of a call"),
    }


def _arguments(function: dict[str, Any], at: str, values: Values) -> dict[str, Any]:
    """What a function is called with. OpenAI sends text; templates expect the object."""
    arguments = function.get("arguments")
    if arguments is None and (other := function.keys() & {"parameters", "args", "input", "kwargs"}):
        problem = f"{at}: a call has no arguments, but {other.pop()}"
        raise Rejected("bad tool call", problem)
    if arguments in (None, ""):
        return {}
    if isinstance(arguments, str):
        arguments = parsed_json(arguments, "bad tool call", f"{at}, arguments")
    if not isinstance(arguments, dict):
        problem = f"arguments of {function['name']} are {kind_of(arguments)}"
        raise Rejected("bad tool call", f"{at}: {problem}")
    named: dict[str, Any] = plain(arguments, f"{at}, arguments", values)
    return named
