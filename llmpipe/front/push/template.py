"""How a model's chat template writes a question, for the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmpipe.front.push.facts import TemplateFacts
from llmpipe.run.probe import Probe


def template_of(model: Path, kwargs: dict[str, Any], question: str) -> TemplateFacts | None:
    """The template in a model's folder, with a question as the model reads it; None without one.

    `kwargs`: variables that it was given in training.

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
    variables = kwargs | {"strftime_now": _pattern}
    with bounded():
        template = Template(text, special, variables)
        example = template.attempt([{"role": "user", "content": question}], open_turn=True)
    return TemplateFacts(example, kwargs)


def template_in(probe: Probe, kwargs: dict[str, Any]) -> TemplateFacts:
    """The template by what it was seen to make of a probe's questions: the model that was exported
    has not to lie here still."""
    asked = [said for said in probe.said if said.question.messages and not said.question.tools]
    return TemplateFacts(next((said.text for said in asked if said.text is not None), None), kwargs)


def _pattern(layout: str) -> str:
    return layout
