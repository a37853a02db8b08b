"""`prompt-completion`: what is given, and what is learned to follow it, as TRL has it.

{"prompt": "The sky is", "completion": " blue."}     texts, joined as they are
{"prompt": [{"role": "user", ...}], "completion": [{"role": "assistant", ...}]}
"""

from __future__ import annotations

from llmpipe.data.conversation import answer_messages, prompt_messages, tools_of
from llmpipe.data.examples import Completion, Conversation
from llmpipe.data.fields import Values, text_of
from llmpipe.data.format import Format


def example_of(values: Values) -> Completion | Conversation:
    prompt = values["prompt"]
    completion = values["completion"]
    if isinstance(prompt, str) and isinstance(completion, str) and "tools" not in values:
        return Completion(text_of(prompt, "prompt"), text_of(completion, "completion"))
    messages = prompt_messages(values)
    first = len(messages)
    messages += answer_messages(values, "completion")
    return Conversation(messages, tools_of(values), first)


FORMAT = Format(
    name="prompt-completion",
    precedence=20,
    required=("prompt", "completion"),
    optional=("tools",),
    shape=Completion,
    example_of=example_of,
    synonyms=({"prompt": "prompt", "response": "completion"},),
)
