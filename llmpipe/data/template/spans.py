"""Where a turn of the assistant's begins and ends in a rendered conversation.

It begins where inference's prompt ends, the generation prompt included, and runs to the end of its
end-of-turn token, since a model that never sees that token as a target never learns to stop
(transformers#48016); never to the whitespace behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from llmpipe.data.examples import Messages, Tools
from llmpipe.data.template.rendering import Template
from llmpipe.data.template.sandbox import Span
from llmpipe.data.template.texts import without_thinking

# Habits of templates.
OPENS_THOUGHT = "the generation prompt ends with a thought, begun or empty, that learned turns lack"
LATE = "the chat template writes tools or the system turn before the last question alone"
UNASKED = "the chat template refuses the conversation before a turn that is learned"
CUT_BEFORE = "turns are learned without earlier thinking that inference would show"

MOST_PROMPTS = 64  # of a conversation's prompts, rendered to be compared
_SPACE = re.compile(r"\s*")
_OPENING = re.compile(r"(?:<think>\s*(?:</think>\s*)?|<\|channel>thought\s*<channel\|>\s*)$")
_THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_EMPTY_THOUGHT = re.compile(r"(?:^|<think>)\s*</think>")  # whose beginning the prompt may have


class Around(NamedTuple):
    """Characters at which texts begin and end, as far as they are rendered."""

    before: int
    """The last end of the turns before."""
    first: int | None
    """The turn's first text."""
    last: int | None
    """The end of its last one."""
    after: int | None
    """The first text of the turns behind."""


class Edge(NamedTuple):
    """Where a turn begins, or ends."""

    at: int
    notes: tuple[str, ...] = ()
    refusal: tuple[str, str] | None = None


class Finder:
    """A rendered conversation, and others that begin like it."""

    def __init__(
        self, template: Template, text: str, messages: Messages, tools: Tools, cut: set[int]
    ):
        """`cut`: turns whose thinking is left out."""
        self.template = template
        self._text = text
        self._messages = messages
        self._tools = tools
        self._cut = cut
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        half = MOST_PROMPTS // 2
        self._compared = {*spoken[:half], *spoken[-half:]}

    def begin(self, i: int, around: Around) -> Edge:
        """Where turn i begins."""
        by_header = self._behind_header(around)
        if i == 0 or i not in self._compared:
            return Edge(by_header)
        prompt = self._prompt(self._messages[:i], self._tools)
        if prompt is None:
            return Edge(by_header, (UNASKED,))
        if self._leads_to(prompt, around):
            return Edge(len(prompt))
        for notes, other in [((), prompt), *self._habits(i)]:
            if notes and self._leads_to(other, around):
                return Edge(len(other), notes)
            opening = _OPENING.search(other)
            if opening and self._leads_to(other[: opening.start()], around):
                return Edge(opening.start(), (*notes, OPENS_THOUGHT))
        detail = f"turn {i + 1}: what inference would send is not what stands before it"
        return Edge(by_header, (), ("template renders turns inconsistently", detail))

    def end(self, i: int, start: int, around: Around) -> Edge:
        """Where turn i ends, which begins at `start`."""
        from_here = start if around.last is None else around.last
        until = len(self._text) if around.after is None else around.after
        end = self.template.end.search(self._text, from_here, until)
        if end:
            return Edge(end.end())
        until_here = without_thinking(self._messages[: i + 1], self._cut)
        text = self.template.attempt(until_here, self._tools)
        if text is not None and self._text.startswith(text) and len(text) >= from_here:
            return Edge(self.to_turn_end((start, len(text)))[1])
        return Edge(from_here, (), ("end of turn not supervised", f"turn {i + 1} has no end token"))

    def marked(self, blocks: list[Span], span: Span, around: Around) -> Span | None:
        """What of a turn's span the template's `{% generation %}` blocks mark.

        It begins with the turn, unless marks leave out texts of it.
        """
        until = len(self._text) if around.after is None else around.after
        inside = [b for b in blocks if around.before <= b[0] < b[1] <= until]
        if not inside:
            return None
        start = min(block[0] for block in inside)
        if around.first is None or start <= around.first:
            start = span[0]
        return self.to_turn_end((start, max(block[1] for block in inside)))

    def to_turn_end(self, span: Span) -> Span:
        """Move the end of a span to just behind its end-of-turn token, if there is one."""
        start, end = span
        text = self._text
        inside = [match.end() for match in self.template.end.finditer(text, start, end)]
        if inside and not text[inside[-1] : end].strip():
            return start, inside[-1]
        space = _SPACE.match(text, end)
        following = space and self.template.end.match(text, space.end())
        return start, following.end() if following else end

    def begins_with_empty_thought(self, span: Span, around: Around) -> bool:
        """Whether what is learned begins with a thought of the template's."""
        first = span[1] if around.first is None else around.first
        return _EMPTY_THOUGHT.search(self._text[span[0] : first]) is not None

    def _leads_to(self, prompt: str, around: Around) -> bool:
        """Whether a prompt is what stands before a turn's first text."""
        first = len(self._text) if around.first is None else around.first
        return around.before <= len(prompt) <= first and self._text.startswith(prompt)

    def _prompt(self, messages: Messages, tools: Tools) -> str | None:
        return self.template.attempt(messages, tools, True)

    def _habits(self, i: int) -> Iterator[tuple[tuple[str, ...], str]]:
        """What stands before turn i by a template's habits, and these."""
        before = self._messages[:i]
        variants: list[tuple[tuple[str, ...], Messages]] = [((), before)]
        if any(turn < i for turn in self._cut):
            variants.append(((CUT_BEFORE,), without_thinking(before, self._cut)))
        for notes, messages in variants:
            rest = messages[1:] if messages[0]["role"] == "system" else messages
            options = [(notes, messages, self._tools), ((*notes, LATE), messages, None)]
            if rest and len(rest) < len(messages):
                options += [((*notes, LATE), rest, self._tools), ((*notes, LATE), rest, None)]
            for names, others, tools in options:
                prompt = self._prompt(others, tools)
                if prompt is not None:
                    yield names, prompt
                    yield (*names, CUT_BEFORE), _THOUGHT.sub("", prompt)

    def _behind_header(self, around: Around) -> int:
        """Where a turn begins by the header that a generation prompt is, or by its first text."""
        first = len(self._text) if around.first is None else around.first
        at = self._text.rfind(self._header, around.before, first) if self._header else -1
        if at >= 0:
            return at + len(self._header)
        return around.before if around.first is None else first

    @cached_property
    def _header(self) -> str:
        """What a generation prompt adds to the conversation, less a thought that it opens."""
        opened = self._prompt(self._messages, self._tools)
        if opened is None or not opened.startswith(self._text):
            return ""
        return _OPENING.sub("", opened[len(self._text) :])


def shared_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences have in common from the start."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
