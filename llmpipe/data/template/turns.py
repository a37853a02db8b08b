"""Which characters of a rendered conversation the assistant spoke.

Spans of assistant turns come from `{% generation %}` markers where the template has them;
otherwise from rendering the conversation up to each turn; and where a template rewrites earlier
turns (Qwen3 drops their thinking) from marks put around every message. A span always runs to the
end of its end-of-turn token, since a model that never sees that token as a target never learns to
stop (transformers#48016), and never includes the whitespace after it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llmpipe.data.examples import Message, Messages, Tools, is_learned
from llmpipe.data.formats import Rejected
from llmpipe.data.template.rendering import Template, clean
from llmpipe.data.template.sandbox import Span

INCONSISTENT = "template renders turns inconsistently"
_SPACE = re.compile(r"\s*")
# Characters for private use, which no text has, around a message's number.
_BEGIN = "\ue000{}\ue001"
_END = "\ue002{}\ue003"
_MARK = re.compile("(\ue000|\ue002)(\\d+)(\ue001|\ue003)")


def turns(
    template: Template, messages: Messages, tools: Tools = None, first: int = 0
) -> tuple[str, list[Span]]:
    """Render a conversation; the spans of the assistant's turns that are learned.

    These are the turns from message `first` on, less those of weight 0. Each span is (start, end)
    in characters and ends behind the turn's end-of-turn token. Raises Rejected.
    """
    messages = clean(messages)
    text, marked = template.render(messages, tools)
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if template.has_markers and len(marked) == len(spoken):
        spans = [_to_turn_end(template, text, span) for span in marked]
    else:
        conversation = _Conversation(template, text, messages, tools)
        spans = [conversation.span(i) for i in spoken]
    turn_at = dict(zip(spoken, spans, strict=True))
    _check_nothing_is_dropped(text, messages, turn_at)
    learned = [i for i in spoken if i >= first and is_learned(messages[i])]
    return text, [turn_at[i] for i in learned]


def _check_nothing_is_dropped(text: str, messages: Messages, turn_at: dict[int, Span]) -> None:
    """What a template silently leaves out would teach something else than the row says."""
    hint = "the chat template does not render {}; chatml does"
    for i, (start, end) in turn_at.items():
        calls = messages[i].get("tool_calls", ())
        if any(call["function"]["name"] not in text[start:end] for call in calls):
            raise Rejected("template drops tool calls", hint.format("them"))
    system = messages[0]
    if system["role"] == "system" and system["content"].strip() not in text:
        raise Rejected("template drops the system turn", hint.format("it"))


def _to_turn_end(template: Template, text: str, span: Span) -> Span:
    """Move the end of a span to just behind its end-of-turn token, if there is one."""
    start, end = span
    inside = [match.end() for match in template.end.finditer(text, start, end)]
    if inside and not text[inside[-1] : end].strip():
        return start, inside[-1]
    space = _SPACE.match(text, end)
    following = space and template.end.match(text, space.end())
    return start, following.end() if following else end


@dataclass
class _Marks:
    """Where the contents of messages begin and end in a text, by message, as far as is known."""

    starts: dict[int, int] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Conversation:
    """A conversation, rendered by a template without one `{% generation %}` around each turn."""

    template: Template
    text: str
    messages: Messages
    tools: Tools

    def span(self, i: int) -> Span:
        """The span of message i, an assistant's turn. Raises Rejected.

        A template may refuse a conversation that stops early, or render it differently: then only
        marks help.
        """
        prompt = self.template.attempt(self.messages[:i], self.tools, True) if i else None
        start = len(prompt) if prompt is not None and self.text.startswith(prompt) else None
        so_far = self._up_to(i)
        if start is None or so_far is None or start >= len(so_far):
            return self._span_by_marks(i, start, prompt)
        ends = [match.end() for match in self.template.end.finditer(so_far, start)]
        if ends:
            return start, ends[-1]
        return _to_turn_end(self.template, self.text, (start, len(so_far)))

    def _up_to(self, i: int) -> str | None:
        """The conversation up to and with message i, or None where that is no beginning of it."""
        if i == len(self.messages) - 1:
            return self.text
        text = self.template.attempt(self.messages[: i + 1], self.tools)
        return text if text is not None and self.text.startswith(text) else None

    def _span_by_marks(self, i: int, start: int | None, prompt: str | None) -> Span:
        """The span of message i, which begins at `start` where that is known."""
        marks = self._marks
        content_start = marks.starts.get(i)
        content_end = marks.ends.get(i)
        if start is None:
            start = content_start
        if start is None and prompt is not None:
            # Thinking that is cut out of an earlier turn takes the first mark along, and the prompt
            # may end with "<think>": the turn begins where the prompt and the conversation part.
            start = shared_prefix(prompt, self.text)
        if start is None:
            raise Rejected(INCONSISTENT, f"message {i + 1} cannot be found again")
        before = max((end for j, end in marks.ends.items() if j < i), default=0)
        after = min((at for j, at in marks.starts.items() if j > i), default=len(self.text))
        first_word = start if content_start is None else content_start
        order = [before, start, first_word, content_end or start, after]
        if order != sorted(order):
            raise Rejected(INCONSISTENT, f"message {i + 1} cannot be found again")
        end = self.template.end.search(self.text, content_end or start)
        if not end or end.end() > after:
            problem = f"message {i + 1} has no end-of-turn token"
            raise Rejected("end of turn not supervised", problem)
        return start, end.end()

    @cached_property
    def _marks(self) -> _Marks:
        """Found by marking both ends of every content and rendering again. Raises Rejected."""
        marked = [_with_marks(message, i) for i, message in enumerate(self.messages)]
        rendered, _ = self.template.render(marked, self.tools)
        marks = _Marks()
        plain = ""
        last = 0
        for mark in _MARK.finditer(rendered):
            plain += rendered[last : mark.start()]
            last = mark.end()
            places = marks.ends if mark[1] == _END[0] else marks.starts
            if int(mark[2]) < len(self.messages):
                places[int(mark[2])] = len(plain)
        if plain + rendered[last:] != self.text:
            raise Rejected(INCONSISTENT, "a turn changes with what surrounds it")
        return marks


def _with_marks(message: Message, i: int) -> Message:
    """Templates trim contents: the marks go inside the outer whitespace."""
    content = message.get("content") or ""
    core = content.strip()
    if not core:
        return message
    marked = _BEGIN.format(i) + core + _END.format(i)
    return {**message, "content": content.replace(core, marked, 1)}


def shared_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences have in common from the start."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
