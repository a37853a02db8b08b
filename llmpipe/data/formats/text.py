"""`text`: a document to go on with.

{"text": "Once upon a time ..."}
"""

from __future__ import annotations

from llmpipe.data.formats.examples import Document
from llmpipe.data.formats.fields import Values, text_of
from llmpipe.data.formats.format import Format


def example_of(values: Values) -> Document:
    return Document(text_of(values["text"], "text"))


FORMAT = Format(
    name="text",
    required=("text",),
    optional=(),
    shape=Document,
    example_of=example_of,
)
