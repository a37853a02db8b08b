"""Turns of a conversation, as anybody writes them -> messages (see `llmpipe.data.examples`).

Read are {"role", "content"} of OpenAI and {"from", "value"} of ShareGPT.
"""

from __future__ import annotations

from typing import Any

from llmpipe.data.examples import Message, Messages, Tools
from llmpipe.data.fields import (
    Rejected,
    Values,
    check_texts,
    kind_of,
    optional_text,
    parsed_json,
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
_EXTRAS = ("name", "tool_call_id", "reasoning_content", "thinking", "reasoning")


def messages_of(value: Any, name: str) -> Messages:
    """A column that holds a list of turns -> messages. Raises Rejected."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # a list in a CSV cell
        value = parsed_json(value, "wrong type", name)
    if not isinstance(value, list):
        raise Rejected("wrong type", f"{name} is {kind_of(value)}, not a list of messages")
    if not value:
        raise Rejected("no messages", name)
    messages: Messages = []
    for number, turn in enumerate(value, 1):
        at = f"{name}, message {number}"
        message = _message(turn, at)
        if messages and message["role"] == "system":
            two = messages[0]["role"] == "system"
            raise Rejected("two system turns" if two else "system turn not first", at)
        messages.append(message)
    return messages


def prompt_messages(values: Values) -> Messages:
    """The column `prompt`, a text or messages, as messages, without the column `system`."""
    prompt = values["prompt"]
    if not isinstance(prompt, list):
        prompt = [{"role": "user", "content": prompt}]
    return messages_of(prompt, "prompt")


def answer_messages(values: Values, name: str) -> Messages:
    """An assistant's answer, given as a text, one message, or a list of messages."""
    value = values[name]
    if isinstance(value, str):
        value = {"role": "assistant", "content": text_of(value, name)}
    if isinstance(value, dict):
        value = [value]
    messages = messages_of(value, name)
    if messages[-1]["role"] != "assistant":
        raise Rejected("no assistant turn", f"{name} does not end with one")
    return messages


def with_system(values: Values, messages: Messages) -> Messages:
    """The column `system` put before a conversation."""
    system = optional_text(values, "system")
    if not system:
        return messages
    if messages[0]["role"] == "system":
        raise Rejected("two system turns", "one in the column system, one in the conversation")
    return [{"role": "system", "content": system}, *messages]


def tools_of(values: Values) -> Tools:
    """The column `tools`, JSON text or a list of functions -> a list of JSON schemas, or None."""
    tools = values.get("tools")
    if isinstance(tools, str) and tools:
        tools = parsed_json(tools, "bad tools", "tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Rejected("bad tools", "tools is not a list of objects")
    check_texts(tools, "tools")
    return tools


def _message(turn: Any, at: str) -> Message:
    if not isinstance(turn, dict):
        raise Rejected("wrong type", f"{at} is {kind_of(turn)}, not an object")
    role = _role(turn, at)
    content = turn.get("content", turn.get("value"))
    calls = turn.get("tool_calls")
    if role == "function_call":
        role = "assistant"
        calls = _calls_in_content(content, at)
        content = ""
    message: Message = {"role": role, "content": _content(content, role, bool(calls), at)}
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise Rejected("bad tool call", f"{at}: tool_calls is a list, and of the assistant")
        message["tool_calls"] = [_call(call, at) for call in calls]
    if turn.get("weight") == 0:  # OpenAI's way to say that a turn is context, not a lesson
        message["weight"] = 0
    for extra in _EXTRAS:
        if turn.get(extra) is not None:
            message[extra] = text_of(turn[extra], f"{at}, {extra}", may_be_empty=True)
    return message


def _role(turn: dict[str, Any], at: str) -> str:
    named = turn.get("role", turn.get("from"))
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise Rejected("unknown role", f"{at}: {str(named)[:40]!r}")
    return role


def _content(content: Any, role: str, has_calls: bool, at: str) -> str:
    """The text of a turn. Only one with tool calls, or a tool's, may be empty."""
    if isinstance(content, list):
        content = "".join(_part(part, at) for part in content)
    if content is None and not has_calls:
        raise Rejected("null", at)
    if has_calls:
        content = content or ""
    text = text_of(content, at, may_be_empty=True)
    if not text.strip() and not has_calls and role != "tool":
        raise Rejected("empty message", at)
    return text


def _part(part: Any, at: str) -> str:
    """The text of one part of a content that is a list."""
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    text = part.get("text") if isinstance(part, dict) else part
    if kind != "text" or not isinstance(text, str):
        shown = f"a part of type {str(kind)[:40]!r}"
        raise Rejected("unsupported content", f"{at}: {shown}; only text is supported")
    return text


def _calls_in_content(content: Any, at: str) -> list[Any]:
    """ShareGPT's turn of JSON text: one call or several."""
    calls = parsed_json(content, "bad tool call", at) if isinstance(content, str) else content
    return calls if isinstance(calls, list) else [calls]


def _call(call: Any, at: str) -> dict[str, Any]:
    """A tool call -> {"type": "function", "function": {"name", "arguments": object}, "id"?}."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        function = {}
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise Rejected("bad tool call", f"{at}: a call has no function name")
    arguments = _arguments(function, at)
    check_texts({"name": name, "arguments": arguments}, at)
    plain = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {**plain, "id": call["id"]} if isinstance(call.get("id"), str) else plain


def _arguments(function: dict[str, Any], at: str) -> dict[str, Any]:
    """What a function is called with. OpenAI sends text; templates expect the object."""
    arguments = function.get("arguments")
    if arguments in (None, ""):
        return {}
    if isinstance(arguments, str):
        arguments = parsed_json(arguments, "bad tool call", f"{at}, arguments")
    if not isinstance(arguments, dict):
        problem = f"arguments of {function['name']} are {kind_of(arguments)}"
        raise Rejected("bad tool call", f"{at}: {problem}")
    return arguments
