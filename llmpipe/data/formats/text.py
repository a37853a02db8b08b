"""`text`: a document to go on with.

{"text": "Once upon a time ..."}
"""

from __future__ import annotations

from llmpipe.data.examples import Document
from llmpipe.data.fields import Values, text_of
from llmpipe.data.format import Format


def example_of(values: Values) -> Document:
    return Document(text_of(values["text"], "text"))


FORMAT = Format(
    name="text",
    precedence=10,
    required=("text",),
    optional=(),
    shape=Document,
    example_of=example_of,
)
