"""How a row is laid out: detected from its columns, checked, and brought to one shape per kind of training.

`convert` answers one of

    {"text": str}                                               text
    {"messages": [{"role", "content", ...}], "tools": [...]}    alpaca, sharegpt, messages; "weight": 0 is not learned
    {"messages", "tools", "first": n}                           prompt-completion of messages: learn from message n on
    {"prompt": str, "completion": str}                          prompt-completion of strings
    {"prompt", "chosen", "rejected"}                            preference: all strings, or all lists of messages;
                                                                "margin": by how much the chosen one is better
    {"prompt"}                                                  prompt: a string or a list of messages
    {"prompt", "choices": [str], "answer": n}                   choice: multiple choice, `answer` an index

or raises Rejected. Validation refuses and never repairs: a row that is wrong is named, not guessed at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from llmpipe.errors import UserError, near


class Rejected(Exception):
    """A row that cannot be used: `reason` is what the manifest counts by, `detail` says more about this row."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.reason, self.detail)))


# Names that mean one thing only; anything else wants `columns:`.
SYNONYMS = (
    {"conversations": "prompt", "chosen": "chosen", "rejected": "rejected"},
    {"question": "prompt", "chosen": "chosen", "rejected": "rejected"},
    {"instruction": "prompt", "chosen": "chosen", "rejected": "rejected"},
    {"instruction": "prompt", "input": "prompt_input", "chosen": "chosen", "rejected": "rejected"},
    {"question": "prompt", "choices": "choices", "answer": "answer"},
    {"question": "prompt", "choices": "choices", "answerKey": "answer"},
    {
        "question": "instruction",
        "answer": "output",
    },  # asked and answered: turns of a chat, not text to go on with
    {"query": "instruction", "response": "output"},
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


Layout = tuple[
    str, dict[str, str], list[str]
]  # format, {your name: the format's name}, columns not used


def detect(columns: list[str], format: str, mapping: dict[str, str], where: str) -> Layout:
    """The layout of rows with these columns. Raises UserError naming them and what each format needs."""
    shown = ", ".join(columns) or "none"
    for name in mapping:
        if name not in columns:
            raise UserError(
                f"{where}: columns: there is no column '{name}'{near(name, columns)}",
                f"found: {shown}",
            )
    renamed = [mapping.get(name, name) for name in columns]
    if twice := next((name for name in renamed if renamed.count(name) > 1), None):
        raise UserError(
            f"{where}: two columns are called '{twice}' after mapping", f"found: {shown}"
        )
    candidates = (
        [mapping] if mapping else [{}, *(names for names in SYNONYMS if set(names) <= set(columns))]
    )
    layouts = LAYOUTS if format == "auto" else {format: LAYOUTS[format]}
    for layout, (needs, also, _) in layouts.items():
        uses = []
        for names in candidates:
            here = {names.get(column, column): column for column in columns}
            if set(needs) <= set(here) and len(here) == len(columns):
                uses.append({here[name]: name for name in (*needs, *also) if name in here})
        if uses:
            used = max(uses, key=len)
            return layout, used, [column for column in columns if column not in used]
    needed = "; ".join(f"{name}: {', '.join(needs)}" for name, (needs, *_) in layouts.items())
    hint = f"needed are {needed}. Map yours with columns, such as {{frage: instruction, antwort: output}}"
    problem = "no format fits" if format == "auto" else f"format {format} does not fit"
    raise UserError(f"{where}: {problem} the columns {shown}", hint)


def convert(row: dict[str, Any], format: str, columns: dict[str, str]) -> dict[str, Any]:
    """One raw row -> its canonical shape. `columns`: {your name: the format's name}. Raises Rejected."""
    needs, _, shape = LAYOUTS[format]
    for yours, name in columns.items():
        if name in needs and row.get(yours) is None:
            raise Rejected("null" if yours in row else "missing column", yours)
    return shape({name: row.get(yours) for yours, name in columns.items()})


def text_of(value: Any, name: str, empty: bool = False) -> str:
    """A non-empty text. Raises Rejected."""
    if not isinstance(value, str):
        raise Rejected("wrong type", f"{name} is {_kind(value)}, not text")
    if not empty and not value.strip():
        raise Rejected("empty text", name)
    if "\x00" in value:
        raise Rejected("NUL character", name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Rejected("broken Unicode", f"{name} holds half a surrogate pair") from None
    return value


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true/false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)


def _optional(values: dict, name: str) -> str:
    """A text that may be missing; what is only whitespace is missing, too."""
    value = values.get(name)
    text = "" if value is None else text_of(value, name, empty=True)
    return text if text.strip() else ""


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise Rejected("wrong type", f"{name} is {str(value)[:40]!r}, not a number")
    return number


def _parsed(text: str, reason: str, at: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected(reason, f"{at}: not JSON: {error}") from None


def _checked(value: Any, at: str) -> Any:
    """JSON values with every text within them checked as a column's text is."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            text_of(item, at, empty=True)
        elif isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            stack += item
    return value


def tools_of(values: dict) -> list[dict] | None:
    """The column `tools`: JSON text or a list of functions -> a list of JSON schemas, or None."""
    value = values.get("tools")
    if isinstance(value, str) and value:
        value = _parsed(value, "bad tools", "tools")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Rejected("bad tools", "tools is not a list of objects")
    return _checked(value, "tools")


# --- formats ---------------------------------------------------------------------------------------------------------


def _with_system(values: dict, messages: list[dict]) -> list[dict]:
    """The column `system` put before a conversation."""
    system = _optional(values, "system")
    if system and messages[0]["role"] == "system":
        raise Rejected("two system turns", "one in the column system, one in the conversation")
    return [{"role": "system", "content": system}, *messages] if system else messages


def _alpaca(values: dict) -> dict:
    instruction, more = text_of(values["instruction"], "instruction"), _optional(values, "input")
    history = values.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise Rejected("wrong type", "history is not a list of pairs")
    messages = []
    for ask, answer in (
        *history,
        (f"{instruction}\n\n{more}" if more else instruction, values["output"]),
    ):
        messages.append({"role": "user", "content": text_of(ask, "history")})
        messages.append({"role": "assistant", "content": text_of(answer, "output")})
    return {"messages": _with_system(values, messages), "tools": None}


def _chat(values: dict, name: str) -> dict:
    messages = _with_system(values, conversation(values[name], name))
    if not any(message["role"] == "assistant" for message in messages):
        raise Rejected("no assistant turn", name)
    return {"messages": messages, "tools": tools_of(values)}


def _asked(values: dict) -> list[dict]:
    """The prompt, a text or messages, as messages."""
    prompt = values["prompt"]
    messages = conversation(
        prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}], "prompt"
    )
    return _with_system(values, messages)


def _answer(values: dict, name: str) -> list[dict]:
    """An assistant's answer given as text, one message, or a list of messages."""
    value = values[name]
    if isinstance(value, str):
        value = {"role": "assistant", "content": text_of(value, name)}
    messages = conversation([value] if isinstance(value, dict) else value, name)
    if messages[-1]["role"] != "assistant":
        raise Rejected("no assistant turn", f"{name} does not end with one")
    return messages


def _prompt_completion(values: dict) -> dict:
    if (
        isinstance(values["prompt"], str)
        and isinstance(values["completion"], str)
        and "tools" not in values
    ):
        return {name: text_of(values[name], name) for name in ("prompt", "completion")}
    prompt = _asked(values)
    return {
        "messages": prompt + _answer(values, "completion"),
        "tools": tools_of(values),
        "first": len(prompt),
    }


def _preference(values: dict) -> dict:
    if values["chosen"] == values["rejected"]:
        raise Rejected("chosen equals rejected")
    names = ("prompt", "chosen", "rejected")
    if more := _optional(values, "prompt_input"):
        values = {**values, "prompt": f"{text_of(values['prompt'], 'prompt')}\n\n{more}"}
    margin = {} if values.get("margin") is None else {"margin": _number(values["margin"], "margin")}
    if all(isinstance(values.get(name), str) for name in names) and not {"system", "tools"} & set(
        values
    ):
        return {name: text_of(values[name], name) for name in names} | margin
    chosen, rejected = _answer(values, "chosen"), _answer(values, "rejected")
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
    if values.get("prompt"):
        prompt = _asked(values)
        own = len(prompt) - bool(_optional(values, "system"))
        shared = (
            own if chosen[:own] == rejected[:own] == prompt[-own:] else 0
        )  # both forms at once, as UltraFeedback
    elif shared:
        prompt = _with_system(values, chosen[:shared])
    else:
        raise Rejected(
            "no common prompt",
            "chosen and rejected do not begin alike, and no column is the prompt",
        )
    chosen, rejected = chosen[shared:], rejected[shared:]
    if chosen == rejected:
        raise Rejected("chosen equals rejected")
    if not chosen or not rejected:
        raise Rejected("no assistant turn", "an answer is no longer than the prompt")
    if "system" in (chosen[0]["role"], rejected[0]["role"]):
        raise Rejected("system turn not first", "in an answer")
    if "user" in (chosen[0]["role"], rejected[0]["role"]):
        raise Rejected("no common prompt", "chosen and rejected differ in what is asked")
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "tools": tools_of(values),
        **margin,
    }


def _prompt(values: dict) -> dict:
    if isinstance(values["prompt"], str) and not {"system", "tools"} & set(values):
        return {"prompt": text_of(values["prompt"], "prompt")}
    messages = _asked(values)
    if messages[-1]["role"] == "assistant":
        raise Rejected(
            "unknown role", "a prompt ends with the user or a tool, not with the assistant"
        )
    return {"prompt": messages, "tools": tools_of(values)}


def _choice(values: dict) -> dict:
    choices, answer = values["choices"], values["answer"]
    labels = [chr(ord("A") + i) for i in range(26)]
    if isinstance(choices, dict):  # ARC: {"text": [...], "label": [...]}
        labels, choices = choices.get("label"), choices.get("text")
    if not isinstance(choices, list) or len(choices) < 2 or not isinstance(labels, list):
        raise Rejected("wrong type", "choices is not a list of two or more")
    texts = [text_of(choice, f"choice {i}") for i, choice in enumerate(choices, 1)]
    if isinstance(answer, str):  # the label, or the very text
        where = [i for i, pair in enumerate(zip(labels, texts, strict=False)) if answer in pair]
        answer = where[0] if len(where) == 1 else None
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(texts):
        raise Rejected(
            "bad answer", f"{str(values['answer'])[:40]!r} is none of the {len(texts)} choices"
        )
    return {**_prompt(values), "choices": texts, "answer": answer}


def question(example: dict[str, Any]) -> str:
    """What a row asks, brought to one spelling: the first user turn, the prompt, or the whole text. Two rows that ask
    the same count as overlapping, whatever is answered."""
    source = example.get("messages") or example.get("prompt") or example["text"]
    if isinstance(source, list):
        source = next(
            (turn["content"] for turn in source if turn["role"] == "user"), source[0]["content"]
        )
    return " ".join(source.casefold().split())


def asked(example: dict[str, Any]) -> tuple[str | list[dict], str | None]:
    """What a row asks, text or messages, and the answer that it has beside it, if any. Raises Rejected."""
    if "messages" in example:
        *prompt, last = example["messages"]
        if last["role"] != "assistant" or not prompt:
            raise Rejected("no assistant turn", "the conversation does not end with an answer")
        return prompt, last["content"]
    answer = example.get("completion", example.get("chosen"))
    if isinstance(answer, list):
        answer = answer[-1]["content"]
    return example["prompt"], answer and answer.strip()


def taught_bytes(example: dict[str, Any]) -> int:
    """UTF-8 bytes of what a row teaches: a text, a completion, or the assistant's turns."""
    turns = example.get("messages", [])[example.get("first", 0) :]
    spoken = "".join(
        turn["content"] for turn in turns if turn["role"] == "assistant" and turn.get("weight") != 0
    )
    return len((example.get("text") or example.get("completion") or spoken).encode())


# format -> columns it needs, columns it also reads, what converts a row. The first whose needs are met is the format.
# Of the synonyms that fit, the one that uses most columns counts.
LAYOUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[dict], dict]]] = {
    "preference": (
        ("chosen", "rejected"),
        ("prompt", "prompt_input", "system", "tools", "margin"),
        _preference,
    ),
    "choice": (("prompt", "choices", "answer"), ("system",), _choice),
    "sharegpt": (
        ("conversations",),
        ("system", "tools"),
        lambda values: _chat(values, "conversations"),
    ),
    "messages": (("messages",), ("tools",), lambda values: _chat(values, "messages")),
    "alpaca": (("instruction", "output"), ("input", "system", "history"), _alpaca),
    "prompt-completion": (("prompt", "completion"), ("tools",), _prompt_completion),
    "text": (("text",), (), lambda values: {"text": text_of(values["text"], "text")}),
    "prompt": (("prompt",), ("system", "tools"), _prompt),
}


# --- conversations ---------------------------------------------------------------------------------------------------


def conversation(value: Any, name: str) -> list[dict]:
    """A list of {role, content} or {from, value} -> messages with the roles system, user, assistant, tool."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # a list in a CSV cell
        value = _parsed(value, "wrong type", name)
    if not isinstance(value, list):
        raise Rejected("wrong type", f"{name} is {_kind(value)}, not a list of messages")
    if not value:
        raise Rejected("no messages", name)
    messages: list[dict] = []
    for i, item in enumerate(value, 1):
        messages.append(_message(item, f"{name}, message {i}"))
        if i > 1 and messages[-1]["role"] == "system":
            two = messages[0]["role"] == "system"
            raise Rejected(
                "two system turns" if two else "system turn not first", f"{name}, message {i}"
            )
    return messages


def _message(item: Any, at: str) -> dict:
    if not isinstance(item, dict):
        raise Rejected("wrong type", f"{at} is {_kind(item)}, not an object")
    named = item.get("role", item.get("from"))
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise Rejected("unknown role", f"{at}: {str(named)[:40]!r}")
    content, calls = item.get("content", item.get("value")), item.get("tool_calls")
    if role == "function_call":  # ShareGPT's turn of JSON text: one call or several
        parsed = _parsed(content, "bad tool call", at) if isinstance(content, str) else content
        role, content, calls = "assistant", "", parsed if isinstance(parsed, list) else [parsed]
    if isinstance(content, list):
        content = "".join(_part(part, at) for part in content)
    if content is None and not calls:
        raise Rejected("null", at)
    message: dict[str, Any] = {
        "role": role,
        "content": text_of(content or "" if calls else content, at, empty=True),
    }
    if (
        not message["content"].strip() and not calls and role != "tool"
    ):  # a tool may well answer nothing
        raise Rejected("empty message", at)
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise Rejected("bad tool call", f"{at}: tool_calls is a list, and of the assistant")
        message["tool_calls"] = [_call(call, at) for call in calls]
    if item.get("weight") == 0:  # OpenAI's way to say that a turn is context, not a lesson
        message["weight"] = 0
    for extra in ("name", "tool_call_id", "reasoning_content", "thinking", "reasoning"):
        if item.get(extra) is not None:
            message[extra] = text_of(item[extra], f"{at}, {extra}", empty=True)
    return message


def _part(part: Any, at: str) -> str:
    """The text of one part of a content that is a list."""
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    text = part.get("text") if isinstance(part, dict) else part
    if kind != "text" or not isinstance(text, str):
        raise Rejected(
            "unsupported content",
            f"{at}: a part of type {str(kind)[:40]!r}; only text is supported",
        )
    return text


def _call(call: Any, at: str) -> dict:
    """A tool call -> {"type": "function", "function": {"name", "arguments": object}, ...}."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if (
        not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
        or not function["name"]
    ):
        raise Rejected("bad tool call", f"{at}: a call has no function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments:  # OpenAI sends text; templates expect the object
        arguments = _parsed(arguments, "bad tool call", f"{at}, arguments")
    elif arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, dict):
        raise Rejected(
            "bad tool call", f"{at}: arguments of {function['name']} are {_kind(arguments)}"
        )
    kept = {
        "type": "function",
        "function": _checked({"name": function["name"], "arguments": arguments}, at),
    }
    return {**kept, "id": call["id"]} if isinstance(call.get("id"), str) else kept
