"""A compiled chat template, and what it makes of messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from llmpipe.data.examples import Messages, Tools
from llmpipe.data.formats import Rejected
from llmpipe.data.template.sandbox import MAX_CHARS, Generation, Span, sandbox
from llmpipe.errors import UserError

OTHER = "data.template names another one"  # the hint where a template is of no use
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def any_of(texts: Iterable[str]) -> str:
    """A pattern of any of these texts, the longest first; of none it matches nothing."""
    longest_first = sorted(texts, key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or r"(?!)"


class Template:
    """A compiled chat template with its variables: special tokens, and the recipe's extra ones.

    `ends` is what it writes to end an assistant's turn, the last turn's first (see `ends`).
    Raises UserError, with a line, for a text that is no template.
    """

    def __init__(
        self, text: str, special: dict[str, str], kwargs: dict[str, Any], ends: Sequence[str] = ()
    ):
        self.variables = {**special, **kwargs}
        self.end = re.compile(any_of(ends))
        self.has_markers = _GENERATION.search(text) is not None
        environment = sandbox()
        generation = environment.extensions[Generation.identifier]
        assert isinstance(generation, Generation)
        self._generation = generation
        self.forms: dict[Any, Any] = {}
        """What `turns` has proven of it, by shapes of conversations."""
        try:
            self._compiled = environment.from_string(text)
        except MemoryError:
            raise
        except Exception as error:  # constants in it are computed as it is compiled
            line = getattr(error, "lineno", 1)
            raise UserError(f"chat template, line {line}: {error}", OTHER) from None

    def render(
        self, messages: Messages, tools: Tools = None, open_turn: bool = False
    ) -> tuple[str, list[Span]]:
        """The rendered text and the spans of its `{% generation %}` blocks. Raises Rejected.

        `open_turn`: end with what an assistant's turn begins with (`add_generation_prompt`).
        """
        variables: dict[str, Any] = dict(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=open_turn,
            **self.variables,
        )
        parts: list[str] = []
        self._generation.begin()
        try:
            for part in self._compiled.generate(variables):
                parts.append(part)
                self._generation.written += len(part)
                if self._generation.written > MAX_CHARS:
                    problem = f"renders more than {MAX_CHARS:,} characters"
                    raise Rejected("template too large", problem)
        except (Rejected, MemoryError):
            raise
        except Exception as error:  # a template can raise whatever an expression can
            raise Rejected("template refuses", str(error)[:200] or type(error).__name__) from None
        return "".join(parts), self._generation.spans

    def attempt(
        self, messages: Messages, tools: Tools = None, open_turn: bool = False
    ) -> str | None:
        """The rendered text, or None where the template refuses."""
        try:
            return self.render(messages, tools, open_turn)[0]
        except Rejected:
            return None


def clean(messages: Messages) -> Messages:
    """What transformers does before rendering.

    No value is None, and a thought has every name that templates read.
    """
    return [_with_thought(message) for message in messages]


def _with_thought(message: dict[str, Any]) -> dict[str, Any]:
    message = {name: value for name, value in message.items() if value is not None}
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in message:
            thought = message[name]
            return {"thinking": thought, **message, "reasoning_content": thought}
    return message
