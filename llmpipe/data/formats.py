"""How a row is laid out: detected from its columns, checked, and brought to one shape per kind of training.

`convert` answers one of

    {"text": str}                                               text
    {"messages": [{"role", "content", ...}], "tools": [...]}    alpaca, sharegpt, messages; "weight": 0 is not learned
    {"messages", "tools", "first": n}                           prompt-completion of messages: learn from message n on
    {"prompt": str, "completion": str}                          prompt-completion of strings
    {"prompt", "chosen", "rejected"}                            preference: all strings, or all lists of messages
    {"prompt"}                                                  prompt: a string or a list of messages

or raises Rejected with one of REASONS, which the manifest counts by. Validation refuses and never repairs: a row that
is wrong is named, not guessed at.
"""

from __future__ import annotations

import json
from typing import Any

from llmpipe.errors import UserError

REASONS = (
    # of a file's row
    "bad JSON", "not UTF-8", "line too long", "not an object", "wrong number of fields",
    # of a column
    "missing column", "null", "wrong type", "empty text", "NUL character", "broken Unicode",
    # of a conversation
    "no messages", "unknown role", "empty message", "no assistant turn", "two system turns", "system turn not first",
    "unsupported content", "bad tools", "bad tool call",
    # of a pair
    "chosen equals rejected", "no common prompt",
    # of a rendered row
    "template refuses", "template too large", "template renders turns inconsistently", "template drops tool calls",
    "template drops the system turn", "doubled BOS", "end of turn not supervised", "nothing to learn", "too long",
)  # fmt: skip


class Rejected(Exception):
    """A row that cannot be used: `reason` is one of REASONS, `detail` says more about this row."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


# format -> columns it needs, columns it also reads. The first whose needs are met is the format.
LAYOUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "preference": (("chosen", "rejected"), ("prompt", "system", "tools")),
    "sharegpt": (("conversations",), ("system", "tools")),
    "messages": (("messages",), ("tools",)),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "prompt-completion": (("prompt", "completion"), ("tools",)),
    "text": (("text",), ()),
    "prompt": (("prompt",), ("system", "tools")),
}

# Names that mean one thing only; anything else wants `columns:`.
SYNONYMS = (
    {"conversations": "prompt", "chosen": "chosen", "rejected": "rejected"},
    {"question": "prompt", "chosen": "chosen", "rejected": "rejected"},
    {"question": "prompt", "answer": "completion"},
    {"query": "prompt", "response": "completion"},
    {"prompt": "prompt", "response": "completion"},
    {"instruction": "instruction", "response": "output", "context": "input"},
    {"instruction": "instruction", "response": "output"},
    {"conversation": "conversations"},
)

_ROLES = {
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool", "function": "tool",
    "function_call": "function_call",
}  # fmt: skip


def detect(
    columns: list[str], format: str, mapping: dict[str, str], where: str
) -> tuple[str, dict[str, str], list[str]]:
    """The format of rows with these columns -> (format, {your name: the format's name}, columns not used).

    Raises UserError naming the columns found and what each format needs.
    """
    from llmpipe.recipe import near  # only here: the child that tries a template out starts without pydantic

    shown = ", ".join(columns) or "none"
    for name in mapping:
        if name not in columns:
            raise UserError(f"{where}: columns: there is no column '{name}'{near(name, columns)}", f"found: {shown}")
    renamed = [mapping.get(name, name) for name in columns]
    for name in renamed:
        if renamed.count(name) > 1:
            raise UserError(f"{where}: two columns are called '{name}' after mapping", f"found: {shown}")
    candidates: list[dict[str, str]] = [mapping]
    if not mapping:
        fitting = [names for names in SYNONYMS if set(names) <= set(columns) and not _clash(names, columns)]
        candidates = [n for n in fitting if "chosen" in n] + candidates + [n for n in fitting if "chosen" not in n]
    layouts = LAYOUTS if format == "auto" else {format: LAYOUTS[format]}
    for strict in (True, False):
        for names in candidates:
            here = {names.get(column, column): column for column in columns}
            for layout, (needs, also) in layouts.items():
                # `prompt` alone is so common beside other columns that synonyms are tried first
                if strict and layout == "prompt" and len(candidates) > 1:
                    continue
                if all(need in here for need in needs):
                    used = {here[name]: name for name in (*needs, *also) if name in here}
                    return layout, used, [column for column in columns if column not in used]
    needs_text = "; ".join(f"{name}: {', '.join(needs)}" for name, (needs, _) in layouts.items())
    raise UserError(
        f"{where}: {'no format fits' if format == 'auto' else f'format {format} does not fit'} the columns {shown}",
        f"needed are {needs_text}. Map yours with columns, such as {{question: prompt, answer: completion}}",
    )


def _clash(names: dict[str, str], columns: list[str]) -> bool:
    return any(name in columns and name not in names for name in names.values())


def convert(row: dict[str, Any], format: str, columns: dict[str, str]) -> dict[str, Any]:
    """One raw row -> its canonical shape. `columns`: {your name: the format's name}. Raises Rejected."""
    needs = LAYOUTS[format][0]
    values: dict[str, Any] = {}
    for yours, name in columns.items():
        value = row.get(yours)
        if name in needs:
            if yours not in row:
                raise Rejected("missing column", yours)
            if value is None:
                raise Rejected("null", yours)
        values[name] = value
    return _CONVERT[format](values)


def text_of(value: Any, name: str, empty: bool = False) -> str:
    """A non-empty text. Raises Rejected."""
    if value is None:
        raise Rejected("null", name)
    if not isinstance(value, str):
        raise Rejected("wrong type", f"{name} is {_kind(value)}, not text")
    if not empty and not value.strip():
        raise Rejected("empty text", name)
    if "\x00" in value:
        raise Rejected("NUL character", name)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Rejected("broken Unicode", f"{name} holds half a surrogate pair") from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def _optional(value: Any, name: str) -> str:
    return "" if value is None else text_of(value, name, empty=True)


def _text(values: dict) -> dict:
    return {"text": text_of(values["text"], "text")}


def _alpaca(values: dict) -> dict:
    instruction = text_of(values["instruction"], "instruction")
    more = _optional(values.get("input"), "input")
    output = text_of(values["output"], "output")
    messages = []
    if (system := _optional(values.get("system"), "system")).strip():
        messages.append({"role": "system", "content": system})
    history = values.get("history") or []
    if not isinstance(history, list):
        raise Rejected("wrong type", f"history is {_kind(history)}, not a list of pairs")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Rejected("wrong type", "history is not a list of pairs")
        messages.append({"role": "user", "content": text_of(pair[0], "history")})
        messages.append({"role": "assistant", "content": text_of(pair[1], "history")})
    messages.append({"role": "user", "content": f"{instruction}\n\n{more}" if more.strip() else instruction})
    messages.append({"role": "assistant", "content": output})
    return {"messages": messages, "tools": None}


def _chat(values: dict, name: str) -> dict:
    messages = conversation(values[name], name)
    if (system := _optional(values.get("system"), "system")).strip():
        if messages[0]["role"] == "system":
            raise Rejected("two system turns", "one in the column system, one in the conversation")
        messages.insert(0, {"role": "system", "content": system})
    if not any(message["role"] == "assistant" for message in messages):
        raise Rejected("no assistant turn", name)
    return {"messages": messages, "tools": tools_of(values.get("tools"))}


def _pairs_with(values: dict) -> dict:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": text_of(prompt, "prompt"), "completion": text_of(completion, "completion")}
    before = conversation(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}], "prompt")
    after = _answer(completion, "completion")
    return {"messages": before + after, "tools": tools_of(values.get("tools")), "first": len(before)}


def _answer(value: Any, name: str) -> list[dict]:
    """An assistant's answer given as text, one message, or a list of messages."""
    if isinstance(value, str):
        value = {"role": "assistant", "content": value}
    messages = conversation([value] if isinstance(value, dict) else value, name)
    if messages[-1]["role"] != "assistant":
        raise Rejected("no assistant turn", f"{name} does not end with one")
    return messages


def _preference(values: dict) -> dict:
    prompt, chosen, rejected = values.get("prompt"), values["chosen"], values["rejected"]
    if chosen == rejected:
        raise Rejected("chosen equals rejected")
    if all(isinstance(value, str) for value in (prompt, chosen, rejected)):
        texts = {name: text_of(values[name], name) for name in ("prompt", "chosen", "rejected")}
        if system := _optional(values.get("system"), "system").strip():
            messages = [{"role": "system", "content": system}, {"role": "user", "content": texts["prompt"]}]
            return {
                "prompt": messages,
                "chosen": _answer(chosen, "chosen"),
                "rejected": _answer(rejected, "rejected"),
                "tools": tools_of(values.get("tools")),
            }
        return texts
    good, bad = _answer(chosen, "chosen"), _answer(rejected, "rejected")
    if prompt is None or prompt == []:
        shared = 0
        while shared < min(len(good), len(bad)) and good[shared] == bad[shared]:
            shared += 1
        if not shared:
            raise Rejected("no common prompt", "chosen and rejected do not begin alike")
        before, good, bad = good[:shared], good[shared:], bad[shared:]
        if not good or not bad:
            raise Rejected("no assistant turn", "one conversation is the beginning of the other")
    else:
        before = conversation(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}], "prompt")
        if good[: len(before)] == before and bad[: len(before)] == before:  # both forms at once, as in UltraFeedback
            good, bad = good[len(before) :], bad[len(before) :]
    if (system := _optional(values.get("system"), "system")).strip():
        if before[0]["role"] == "system":
            raise Rejected("two system turns", "one in the column system, one in the prompt")
        before.insert(0, {"role": "system", "content": system})
    for message in (*good, *bad):
        if message["role"] == "system":
            raise Rejected("system turn not first", "in an answer")
    if good == bad:
        raise Rejected("chosen equals rejected")
    return {"prompt": before, "chosen": good, "rejected": bad, "tools": tools_of(values.get("tools"))}


def _prompt(values: dict) -> dict:
    prompt, system = values["prompt"], _optional(values.get("system"), "system")
    if isinstance(prompt, str) and not system.strip():
        return {"prompt": text_of(prompt, "prompt")}
    messages = conversation(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}], "prompt")
    if system.strip():
        messages.insert(0, {"role": "system", "content": system})
    if messages[-1]["role"] == "assistant":
        raise Rejected("unknown role", "a prompt ends with the user or a tool, not with the assistant")
    return {"prompt": messages, "tools": tools_of(values.get("tools"))}


def conversation(value: Any, name: str) -> list[dict]:
    """A list of {role, content} or {from, value} -> messages with the roles system, user, assistant, tool."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # a list in a CSV cell
        value = _json(value, "wrong type", name)
    if not isinstance(value, list):
        raise Rejected("wrong type", f"{name} is {_kind(value)}, not a list of messages")
    if not value:
        raise Rejected("no messages", name)
    messages: list[dict] = []
    for i, item in enumerate(value, 1):
        at = f"{name}, message {i}"
        if not isinstance(item, dict):
            raise Rejected("wrong type", f"{at} is {_kind(item)}, not an object")
        named = item.get("role", item.get("from"))
        role = _ROLES.get(named) if isinstance(named, str) else None
        if role is None:
            raise Rejected("unknown role", f"{at}: {str(named)[:40]!r}")
        content = item["content"] if "content" in item else item.get("value")
        if role == "function_call":
            messages.append({"role": "assistant", "content": "", "tool_calls": _calls_from_text(content, at)})
            continue
        if role == "system" and messages:
            two = messages[0]["role"] == "system"
            raise Rejected("two system turns" if two else "system turn not first", at)
        message: dict[str, Any] = {"role": role, "content": None}
        calls = item.get("tool_calls")
        if isinstance(content, list):
            content = _joined(content, at)
        if content is None and not calls:
            raise Rejected("null", at)
        if content is not None:
            message["content"] = text_of(content, at, empty=True)
        if not (content or "").strip() and not calls and role != "tool":  # a tool may well answer nothing
            raise Rejected("empty message", at)
        if calls:
            if role != "assistant":
                raise Rejected("bad tool call", f"{at}: only the assistant calls tools")
            message["tool_calls"] = _calls(calls, at)
            message["content"] = message["content"] or ""
        if item.get("weight") == 0:  # OpenAI's way to say that a turn is context, not a lesson
            message["weight"] = 0
        for extra in ("name", "tool_call_id", "reasoning_content", "thinking", "reasoning"):
            if item.get(extra) is not None:
                message[extra] = text_of(item[extra], f"{at}, {extra}", empty=True)
        messages.append(message)
    return messages


def _joined(parts: list, at: str) -> str:
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind != "text":
            raise Rejected("unsupported content", f"{at}: a part of type {str(kind)[:40]!r}; only text is supported")
        if not isinstance(text, str):
            raise Rejected("unsupported content", f"{at}: a part without 'text'")
        texts.append(text)
    return "".join(texts)


def _json(text: str, reason: str, at: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected(reason, f"{at}: not JSON: {error}") from None


def _calls_from_text(value: Any, at: str) -> list[dict]:
    """ShareGPT's function_call turn: JSON text of one call or of several."""
    parsed = _json(text_of(value, at), "bad tool call", at) if isinstance(value, str) else value
    return _calls(parsed if isinstance(parsed, list) else [parsed], at)


def _calls(value: Any, at: str) -> list[dict]:
    """Tool calls -> [{"type": "function", "function": {"name", "arguments": object}, ...}]."""
    if not isinstance(value, list) or not value:
        raise Rejected("bad tool call", f"{at}: tool_calls is not a list")
    calls = []
    for call in value:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Rejected("bad tool call", f"{at}: a call has no function name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):  # OpenAI sends text; templates expect the object
            arguments = _json(arguments, "bad tool call", f"{at}, arguments") if arguments.strip() else {}
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise Rejected("bad tool call", f"{at}: arguments of {function['name']} are {_kind(arguments)}")
        _strings(arguments, at)
        kept = {"type": "function", "function": {"name": text_of(function["name"], at), "arguments": arguments}}
        if isinstance(call.get("id"), str):
            kept["id"] = call["id"]
        calls.append(kept)
    return calls


def _strings(value: Any, at: str) -> None:
    """Check every text within JSON values as a column's text is checked."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            text_of(item, at, empty=True)
        elif isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            stack += item


def tools_of(value: Any) -> list[dict] | None:
    """The column `tools`: JSON text or a list of functions -> a list of JSON schemas, or None."""
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, str):
        value = _json(value, "bad tools", "tools")
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Rejected("bad tools", "tools is not a list of objects")
    _strings(value, "tools")
    return value


_CONVERT = {
    "text": _text,
    "alpaca": _alpaca,
    "sharegpt": lambda values: _chat(values, "conversations"),
    "messages": lambda values: _chat(values, "messages"),
    "prompt-completion": _pairs_with,
    "preference": _preference,
    "prompt": _prompt,
}
