"""What a row becomes, whatever its format: one of six shapes, and what training asks of any.

A message is {"role", "content"} with the roles system, user, assistant and tool, and may have

    "tool_calls"    [{"type": "function", "function": {"name", "arguments": {...}}, "id"?}]
    "weight": 0     an assistant's turn that is context and is not learned
    "name", "tool_call_id", "reasoning_content", "thinking", "reasoning"    texts

and nothing else. `content` is always a text; only one with tool calls, or a tool's, may be empty.
Only the first message may have the role system.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmpipe.data.fields import Rejected

Message = dict[str, Any]
Messages = list[Message]  # never empty
Tools = list[dict[str, Any]] | None  # JSON schemas of functions


@dataclass(frozen=True)
class Document:
    """A text to go on with."""

    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns, of which the assistant's are learned."""

    messages: Messages
    tools: Tools = None
    first: int = 0
    """Learn from this message on."""


@dataclass(frozen=True)
class Completion:
    """A text to go on from, and the text that follows it directly."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Preference:
    """A prompt with a better and a worse answer: all three are texts, or all three are messages."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    tools: Tools = None
    margin: float | None = None
    """By how much the chosen one is better."""


@dataclass(frozen=True)
class Prompt:
    """Something to answer."""

    prompt: str | Messages
    tools: Tools = None


@dataclass(frozen=True)
class MultipleChoice:
    """A question with the answers to choose from."""

    prompt: str | Messages
    choices: list[str]
    """At least two."""
    answer: int
    """Which of them is right, from 0."""
    tools: Tools = None


Example = Document | Conversation | Completion | Preference | Prompt | MultipleChoice


def question(example: Example) -> str:
    """What a row asks, in one spelling: the first user turn, the prompt, or the whole text.

    Two rows that ask the same count as overlapping, whatever is answered.
    """
    match example:
        case Document():
            asked: str | Messages = example.text
        case Conversation():
            asked = example.messages
        case _:
            asked = example.prompt
    if not isinstance(asked, str):
        users = (turn for turn in asked if turn["role"] == "user")
        asked = str(next(users, asked[0])["content"])
    return " ".join(asked.casefold().split())


def prompt_and_reference(example: Example) -> tuple[str | Messages, str | None]:
    """What a row asks, and the answer that it has beside it, if any. Raises Rejected."""
    match example:
        case Document():
            raise Rejected("no prompt", "a text asks nothing")
        case Conversation():
            *prompt, last = example.messages
            if last["role"] != "assistant" or not prompt:
                raise Rejected("no assistant turn", "the conversation does not end with an answer")
            return prompt, last["content"]
        case Completion():
            return example.prompt, example.completion.strip()
        case Preference(chosen=str(chosen)):
            return example.prompt, chosen.strip()
        case Preference(chosen=[*_, last]):
            return example.prompt, last["content"].strip()
        case _:
            return example.prompt, None


def is_of_texts(example: Example) -> bool:
    """Whether a prompt or its answers are texts, which no chat template touches."""
    match example:
        case Completion():
            return True
        case Prompt() | Preference() | MultipleChoice():
            return isinstance(example.prompt, str)
        case _:
            return False


def taught_bytes(example: Example) -> int:
    """UTF-8 bytes of what a row teaches: a text, a completion, or the assistant's turns."""
    match example:
        case Document():
            return len(example.text.encode())
        case Completion():
            return len(example.completion.encode())
        case Conversation():
            turns = example.messages[example.first :]
            spoken = [turn["content"] for turn in turns if is_learned(turn)]
            return sum(len(text.encode()) for text in spoken)
        case _:
            return 0


def is_learned(turn: Message) -> bool:
    """Whether a turn is the assistant's, and not only context (OpenAI's `weight: 0`)."""
    return turn["role"] == "assistant" and turn.get("weight") != 0
