"""`prompt`: something to answer, a text to go on from or the turns of a conversation.

{"prompt": "The sky is"}
{"prompt": [{"role": "user", "content": "What colour is the sky?"}]}
"""

from __future__ import annotations

from llmpipe.data.conversation import given, is_of_a_chat, prompt_messages, tools_of, with_system
from llmpipe.data.examples import Prompt
from llmpipe.data.fields import Rejected, Values, text_of
from llmpipe.data.format import Format


def example_of(values: Values) -> Prompt:
    prompt = given(values, "prompt")
    if isinstance(prompt, str) and not is_of_a_chat(values):
        return Prompt(text_of(prompt, "prompt"))
    messages = with_system(values, prompt_messages(values))
    if messages[-1]["role"] == "assistant":
        problem = "a prompt ends with the user or a tool, not with the assistant"
        raise Rejected("unknown role", problem)
    return Prompt(messages, tools_of(values))


FORMAT = Format(
    name="prompt",
    precedence=0,
    required=("prompt",),
    optional=("system", "tools"),
    shape=Prompt,
    example_of=example_of,
)
