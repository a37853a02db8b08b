"""What a conversation says, text by text, and a stand-in of its shape in which each is a sentinel.

The shape is what a template may decide by: roles, calls and the structure of their arguments, which
texts are empty, thinking in a field of its own or between tags. What a template does with a
stand-in it does with every conversation of that shape, so that `proof` looks at it once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from llmpipe.data.examples import Message, Messages, Tools
from llmpipe.data.template.sandbox import Span

THINKING = "the thinking"
CALLS = "tool calls"
TOOLS = "the tools"  # their names and descriptions, and those of their parameters
DETAILS = "details of tools"  # choices, defaults, and what describes parts of a parameter
NAMES = "names"
IDS = "ids"
OF_ROLE = {
    "system": "the system turn",
    "user": "the user's turn",
    "assistant": "the assistant's text",
    "tool": "tool results",
}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # the fields, in transformers' order

# What a JSON schema has by itself, where its parameters are not named.
SCHEMAS = frozenset({"properties", "$defs", "definitions", "patternProperties", "items", "not"})

# A sentinel survives trimming, JSON and sorting, and is unlike any word. Ids keep their length,
# which some templates ask for.
_DIGITS = "abcdefghijklmnop"
_SENTINEL = re.compile(r"x*zq([a-p]{4})qz|7310(\d{4})(?:\.5)?")
# Characters for private use, which no text has, around a text's number; JSON may escape them.
_MARK = re.compile("(?:(\ue000|\\\\ue000)|\ue002|\\\\ue002)([0-9]{1,9})(?:\ue001|\\\\ue001)")
_TAG = re.compile(r"<[\w/]+>\s*")


class Text(NamedTuple):
    """One text of a conversation."""

    turn: int
    """Its message, from 0, or OF_TOOLS."""
    kind: str
    """What would be lost without it: THINKING, CALLS, ..."""
    value: Any
    """A text, or a number among the arguments of a call."""


MAX_SENTINELS = 10_000  # of one conversation
OF_TOOLS = -1  # in a turn's place

Word = Callable[[int, Text], Any]  # a text's number and the text -> what stands for it


class Place(NamedTuple):
    """Where a text with this number stands in a rendered stand-in."""

    text: int
    start: int
    end: int


def sentinel(number: int, text: Text) -> Any:
    """A word, or a number, that stands for a text."""
    if isinstance(text.value, int):
        return 73100000 + number
    if isinstance(text.value, float):
        return 73100000.5 + number
    word = f"zq{''.join(_DIGITS[number >> shift & 15] for shift in (12, 8, 4, 0))}qz"
    return word.rjust(len(text.value), "x") if text.kind == IDS else word


def sentinels_in(text: str) -> Iterator[Place]:
    """Where sentinels stand in a text."""
    for match in _SENTINEL.finditer(text):
        letters, digits = match.groups()
        number = int(digits or "0")
        for letter in letters or "":
            number = number * 16 + _DIGITS.index(letter)
        yield Place(number, *match.span())


def marked(number: int, text: Text) -> Any:
    """A text with marks around its core; numbers and ids cannot be marked.

    Templates trim texts, and look for tags at their ends: both stay outside the marks.
    """
    if not isinstance(text.value, str) or text.kind == IDS:
        return text.value
    start, end = _core(text.value)
    if start >= end:
        return text.value
    before, core, behind = text.value[:start], text.value[start:end], text.value[end:]
    return f"{before}\ue000{number}\ue001{core}\ue002{number}\ue001{behind}"


def is_written_as(text: Text, written: str) -> bool:
    """Whether what stands between a text's marks is the text, as it is or escaped."""
    inside = text.value[slice(*_core(text.value))]
    return any(written in ways(it) for it in ways(inside))


def _core(text: str) -> Span:
    """What lies inside the white space and the tags at a text's ends."""
    start = len(text) - len(text.lstrip())
    end = len(text.rstrip())
    while tag := _TAG.match(text, start, end):
        start = tag.end()
    while text.endswith(">", start, end):
        tag_start = text.rfind("<", start, end)
        if tag_start < 0 or not _TAG.fullmatch(text, tag_start, end):
            break
        end = len(text[:tag_start].rstrip())
    return start, end


def marks_in(text: str) -> Iterator[Place]:
    """Where marked texts stand in a text, marks included; a mark without its other one is none."""
    begin: re.Match[str] | None = None
    for mark in _MARK.finditer(text):
        if mark[1]:
            begin = mark
        elif begin is not None and begin[2] == mark[2]:
            yield Place(int(mark[2]), begin.start(), mark.end())
            begin = None


def without_marks(text: str) -> str:
    return _MARK.sub("", text)


def ways(value: Any) -> Iterator[str]:
    """How templates write a value, the most frequent way first."""
    if not isinstance(value, str):
        yield from (json.dumps(value), str(value))
        return
    yield value
    core = value.strip()
    if core != value:
        yield from (core, value.lstrip(), value.rstrip(), value.strip("\n"), value.lstrip("\n"))
    for ascii_only in (False, True):
        for text in dict.fromkeys((value, core)):
            yield json.dumps(text, ensure_ascii=ascii_only)[1:-1]
    yield repr(value)[1:-1]


def rewritten(messages: Messages, tools: Tools, word: Word) -> tuple[Messages, Tools, list[Text]]:
    """The conversation with every text as `word` has it, and the texts by their numbers."""
    rewriter = _Rewriter(word)
    new = [rewriter.message(i, message) for i, message in enumerate(messages)]
    return new, tools and [rewriter.tool(tool) for tool in tools], rewriter.texts


def plain(messages: Messages) -> list[Text] | None:
    """The texts of turns that have nothing but one each; None for all other conversations.

    Quickly told, since most rows are like that; the texts are those of `rewritten`.
    """
    texts = []
    for turn, message in enumerate(messages):
        content = message["content"]
        if len(message) > 2 or not content or content.isspace() or "</think>" in content:
            return None
        texts.append(Text(turn, OF_ROLE[message["role"]], content))
    return texts


def is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def in_order(names: Iterable[str]) -> list[str]:
    """Names as Jinja's `dictsort` has them."""
    return sorted(names, key=str.lower)


def without_thinking(messages: Messages, turns: set[int]) -> Messages:
    """The conversation without what these turns think."""
    return [_thoughtless(m) if i in turns else m for i, m in enumerate(messages)]


def _thoughtless(message: Message) -> Message:
    message = {name: value for name, value in message.items() if name not in THOUGHTS}
    if thought := _thought_in(message):
        message["content"] = thought.text + thought.behind
    return message


class _Thought(NamedTuple):
    """A content of which the first part is thinking, and what stands around the two."""

    before: str
    thinking: str
    between: str
    text: str
    behind: str


def _thought_in(message: Message) -> _Thought | None:
    """Thinking between tags, as many rows have it; the first tag may be in the prompt."""
    head, tag, tail = message["content"].partition("</think>")
    if not tag or message["role"] != "assistant":
        return None
    opened = head.lstrip().removeprefix("<think>").lstrip()
    thinking = opened.rstrip()
    text = tail.strip()
    return _Thought(
        before=head[: len(head) - len(opened)],
        thinking=thinking,
        between=opened[len(thinking) :] + tag + tail[: len(tail) - len(tail.lstrip())],
        text=text,
        behind=tail[len(tail.rstrip()) :] if text else "",
    )


class _Rewriter:
    def __init__(self, word: Word):
        self.texts: list[Text] = []
        self._word = word
        self._ids: dict[str, str] = {}

    def message(self, turn: int, message: Message) -> Message:
        new: Message = {}
        thought = None
        for name, value in message.items():
            if name == "content":
                new[name] = self._content(turn, message)
            elif name in THOUGHTS and value.strip():
                # `clean` has brought one thought to several fields
                thought = thought or self._put(turn, THINKING, value)
                new[name] = thought
            elif name == "tool_calls":
                new[name] = [self._call(turn, call) for call in value]
            elif name == "name":
                new[name] = self._put(turn, NAMES, value)
            elif name == "tool_call_id":
                new[name] = self._id(turn, value)
            else:
                new[name] = value
        return new

    def _put(self, turn: int, kind: str, value: Any) -> Any:
        if is_blank(value):
            return value
        text = Text(turn, kind, value)
        self.texts.append(text)
        return self._word(len(self.texts) - 1, text)

    def _content(self, turn: int, message: Message) -> str:
        content: str = message["content"]
        kind = OF_ROLE[message["role"]]
        if thought := _thought_in(message):
            before, thinking, between, text, behind = thought
            thinking = self._put(turn, THINKING, thinking)
            text = self._put(turn, kind, text)
            return f"{before}{thinking}{between}{text}{behind}"
        new: str = self._put(turn, kind, content)
        return new

    def _call(self, turn: int, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        new = {
            **call,
            "function": {
                **function,
                "name": self._put(turn, CALLS, function["name"]),
                "arguments": self._argument(turn, function["arguments"]),
            },
        }
        return {**new, "id": self._id(turn, call["id"])} if "id" in call else new

    def _argument(self, turn: int, value: Any) -> Any:
        """A value of JSON, its keys numbered in their order, since templates sort them."""
        if isinstance(value, dict):
            keys = {key: self._put(turn, CALLS, key) for key in in_order(value)}
            return {keys[key]: self._argument(turn, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._argument(turn, item) for item in value]
        if value is None or isinstance(value, bool) or is_blank(value):  # their key has to do
            return value
        return self._put(turn, CALLS, value)

    def _id(self, turn: int, value: str) -> str:
        if value not in self._ids:
            # a short one might stand anywhere
            self._ids[value] = self._put(turn, IDS, value) if len(value) >= 8 else value
        return self._ids[value]

    def tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        function = tool.get("function")
        if isinstance(function, dict):
            return {**tool, "function": self._function(function)}
        return self._function(tool)

    def _function(self, function: dict[str, Any]) -> dict[str, Any]:
        new = {}
        for name, value in function.items():
            if name in ("name", "description"):
                new[name] = self._put_of_tool(TOOLS, value)
            elif name == "parameters":
                new[name] = self._parameters(value)
            else:
                new[name] = self._schema(value, 0)
        return new

    def _parameters(self, value: Any) -> Any:
        """A JSON schema; its text; or, as in xLAM's rows, the parameters by their names."""
        if not isinstance(value, dict):
            return self._put_of_tool(TOOLS, value)
        if not value or not all(isinstance(item, dict) for item in value.values()):
            return self._schema(value, 0)
        if not SCHEMAS.isdisjoint(value):
            return self._schema(value, 0)
        names = {name: self._put(OF_TOOLS, TOOLS, name) for name in in_order(value)}
        return {names[name]: self._schema(item, 1) for name, item in value.items()}

    def _schema(self, value: Any, depth: int) -> Any:
        """A JSON schema: of all parameters at depth 0, of one at 1, of a part of one at 2."""
        if isinstance(value, list):
            return [self._schema(item, depth) for item in value]
        if not isinstance(value, dict):
            return value
        properties = value.get("properties")
        names = {}
        if isinstance(properties, dict):
            names = {name: self._put(OF_TOOLS, TOOLS, name) for name in in_order(properties)}
        new: dict[str, Any] = {}
        for name, item in value.items():
            if name == "properties" and names:
                schemas = item.items()
                new[name] = {names[key]: self._schema(schema, depth + 1) for key, schema in schemas}
            elif name == "required" and isinstance(item, list):
                new[name] = [names.get(key, key) if isinstance(key, str) else key for key in item]
            elif name == "description":
                new[name] = self._put_of_tool(TOOLS if depth == 1 else DETAILS, item)
            elif name == "enum" and isinstance(item, list):
                new[name] = [self._put_of_tool(DETAILS, choice) for choice in item]
            elif name == "default":
                new[name] = self._put_of_tool(DETAILS, item)
            else:
                new[name] = self._schema(item, 2)
        return new

    def _put_of_tool(self, kind: str, value: Any) -> Any:
        told = isinstance(value, str | int | float) and not isinstance(value, bool)
        return self._put(OF_TOOLS, kind, value) if told else value
