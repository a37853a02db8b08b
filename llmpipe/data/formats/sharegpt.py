"""`sharegpt`: a conversation with its system prompt and tools beside it, as ShareGPT has it.

{"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]}
"""

from __future__ import annotations

from llmpipe.data.conversation import messages_of, tools_of, with_system
from llmpipe.data.examples import Conversation
from llmpipe.data.fields import Rejected, Values
from llmpipe.data.format import Format


def example_of(values: Values) -> Conversation:
    messages = with_system(values, messages_of(values, "conversations"))
    if not any(message["role"] == "assistant" for message in messages):
        raise Rejected("no assistant turn", "conversations")
    return Conversation(messages, tools_of(values))


FORMAT = Format(
    name="sharegpt",
    precedence=50,
    required=("conversations",),
    optional=("system", "tools"),
    shape=Conversation,
    example_of=example_of,
    synonyms=({"conversation": "conversations"},),
)
