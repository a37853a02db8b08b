"""The chat template: how messages become one text, and which parts of it the assistant spoke.

sandbox     where templates are compiled and rendered, within limits
rendering   a compiled template, and what it makes of messages
texts       what a conversation says, and sentinels that stand for it
proof       that a template renders all of it, once for every shape of conversation
spans       where the assistant's turns begin and end
turns       a conversation's text, and which characters are learned
results     whose result a tool's turn is
spelled     texts that a tokenizer would read as special tokens
ends        what ends a turn, learned from the template
choice      the template of the recipe and the model's tokenizer, brought together

Token ids equal `apply_chat_template(tokenize=True)` of transformers (a test holds this). A template
comes with the model and is as untrusted as the model: render only within `bounded()`.
"""

from llmpipe.data.template.choice import Choice, choose, template_source, thinking
from llmpipe.data.template.rendering import Template, clean
from llmpipe.data.template.sandbox import Span, bounded
from llmpipe.data.template.spans import shared_prefix
from llmpipe.data.template.spelled import Spelled
from llmpipe.data.template.texts import Text
from llmpipe.data.template.turns import Reading, prompt, turns

__all__ = [
    "Choice",
    "Reading",
    "Span",
    "Spelled",
    "Template",
    "Text",
    "bounded",
    "choose",
    "clean",
    "prompt",
    "shared_prefix",
    "template_source",
    "thinking",
    "turns",
]
