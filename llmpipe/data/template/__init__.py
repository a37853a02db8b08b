"""The chat template: how messages become one text, and which parts of it the assistant spoke.

sandbox     where templates are compiled and rendered, within limits
rendering   a compiled template, and what it makes of messages
turns       the spans of the assistant's turns
ends        what ends a turn, learned from the template
choice      the template of the recipe and the model's tokenizer, brought together

Token ids equal `apply_chat_template(tokenize=True)` of transformers (a test holds this). A template
comes with the model and is as untrusted as the model: render only within `bounded()`.
"""

from llmpipe.data.template.choice import Choice, choose, template_source
from llmpipe.data.template.rendering import Template, clean
from llmpipe.data.template.sandbox import Span, bounded
from llmpipe.data.template.turns import shared_prefix, turns

__all__ = [
    "Choice",
    "Span",
    "Template",
    "bounded",
    "choose",
    "clean",
    "shared_prefix",
    "template_source",
    "turns",
]
