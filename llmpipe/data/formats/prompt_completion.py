"""`prompt-completion`: what is given, and what is learned to follow it, as TRL has it.

{"prompt": "The sky is", "completion": " blue."}     texts, joined as they are
{"prompt": [{"role": "user", ...}], "completion": [{"role": "assistant", ...}]}

Texts with a column `system` or `tools` beside them are two turns of a conversation.
"""

from __future__ import annotations

from llmpipe.data.conversation import (
    answer_messages,
    given,
    is_of_a_chat,
    prompt_messages,
    tools_of,
    with_system,
)
from llmpipe.data.examples import Completion, Conversation
from llmpipe.data.fields import Values, text_of
from llmpipe.data.format import Format


def example_of(values: Values) -> Completion | Conversation:
    prompt = given(values, "prompt")
    completion = given(values, "completion")
    of_texts = isinstance(prompt, str) and isinstance(completion, str)
    if of_texts and not is_of_a_chat(values):
        return Completion(text_of(prompt, "prompt"), text_of(completion, "completion"))
    messages = with_system(values, prompt_messages(values))
    first = len(messages)
    messages += answer_messages(values, "completion")
    return Conversation(messages, tools_of(values), first)


FORMAT = Format(
    name="prompt-completion",
    precedence=20,
    required=("prompt", "completion"),
    optional=("system", "tools"),
    shape=Completion,
    example_of=example_of,
    synonyms=({"prompt": "prompt", "response": "completion"},),
)
