"""`messages`: a conversation, as OpenAI and Hugging Face have it.

{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}
"""

from __future__ import annotations

from llmpipe.data.conversation import messages_of, tools_of, with_system
from llmpipe.data.examples import Conversation
from llmpipe.data.fields import Rejected, Values
from llmpipe.data.format import Format


def example_of(values: Values) -> Conversation:
    messages = with_system(values, messages_of(values, "messages"))
    if not any(message["role"] == "assistant" for message in messages):
        raise Rejected("no assistant turn", "messages")
    return Conversation(messages, tools_of(values))


FORMAT = Format(
    name="messages",
    precedence=40,
    required=("messages",),
    optional=("system", "tools"),
    shape=Conversation,
    example_of=example_of,
    synonyms=({"functions": "tools"},),  # OpenAI's name before 2023-11
)
