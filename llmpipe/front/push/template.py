"""How a model's chat template writes a question, for the card."""

from __future__ import annotations

from pathlib import Path

from llmpipe.front.push.card import TemplateFacts
from llmpipe.run.manifest import Manifest


def template_of(model: Path, manifest: Manifest, question: str) -> TemplateFacts | None:
    """The template in a model's folder, with a question as the model reads it; None without one.

    A date that it writes stands as its pattern (`%d %b %Y`), so that the card says the same
    tomorrow. Raises UserError where tokenizer or template cannot be read.
    """
    from llmpipe.data.template.rendering import Template
    from llmpipe.data.template.sandbox import bounded
    from llmpipe.data.tokenizer import Tokenizer, own_template

    text = own_template(model)
    if text is None:
        return None
    special = Tokenizer(model).special
    kwargs = manifest.asked.chat_template_kwargs
    variables = kwargs | {"strftime_now": _pattern}
    with bounded():
        template = Template(text, special, variables)
        example = template.attempt([{"role": "user", "content": question}], open_turn=True)
    return TemplateFacts(example, kwargs)


def _pattern(layout: str) -> str:
    return layout
