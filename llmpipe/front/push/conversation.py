"""How a model's chat template writes a question, for the card."""

from __future__ import annotations

from pathlib import Path

from llmpipe.run.manifest import Manifest


def conversation(model: Path, manifest: Manifest, question: str) -> str | None:
    """A question as the model reads it, up to where its answer begins; None without a template.

    A date that a template writes stands as its pattern (`%d %b %Y`): the card says the same
    tomorrow. Raises UserError where the tokenizer or the template cannot be read.
    """
    from llmpipe.data.template.ends import rendered
    from llmpipe.data.template.rendering import Template
    from llmpipe.data.tokenizer import Tokenizer, own_template

    text = own_template(model)
    if text is None:
        return None
    variables = manifest.asked.chat_template_kwargs | {"strftime_now": _pattern}
    template = Template(text, Tokenizer(model).special, variables)
    return rendered(template, [{"role": "user", "content": question}], open_turn=True)


def _pattern(layout: str) -> str:
    return layout
