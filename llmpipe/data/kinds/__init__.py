"""The kinds of training data, a file each: what an example becomes, and how that is written.

A stage names its kind: `tokens(job, PAIRS)`. The way of a row is the same for all of them:

    row --convert--> example --Kind.encode--> pieces --Kind.layout--> sequences --Kind.table--> file

A new kind is a new file here that fills in one `Kind`, and a stage that names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from llmpipe.data.encode import Encoder
from llmpipe.data.formats import Example
from llmpipe.data.pack import Layout, Piece, Sequence


class Encoded(NamedTuple):
    """What one example becomes."""

    pieces: list[Piece]
    """Examples of training, mostly one: the columns of the kind, in their order."""
    truncated: bool = False
    """Whether something was cut off."""


class Table(NamedTuple):
    """Sequences in the form that a trainer reads, and what is counted of them."""

    batch: pa.RecordBatch
    tokens: int
    supervised: int
    """Tokens that are learned."""
    content: bytes
    """What is hashed into the digest of all tokens."""


@dataclass(frozen=True)
class Kind:
    """Everything that tells one kind of training data from another.

    It is sent to worker processes, so its functions are those of a module.
    """

    name: str
    columns: dict[str, pa.DataType]
    """The columns of a piece, all of them lists of numbers. By the first one rows are told apart:
    those that are equal in it are held out together."""
    shapes: tuple[type, ...]
    """The shapes of examples that it takes, and so the formats of rows (`Format.shape`)."""
    encode: Callable[[Encoder, Example, dict[str, Any]], Encoded]
    """An example, and the row's columns that its format does not read, as the recipe calls them ->
    pieces. Raises Rejected."""
    length: Callable[[Piece], int]
    """Tokens of a piece, at most `max_length`."""
    layout: Callable[[int, bool], Layout]
    """`max_length` and `packing` -> how pieces are laid out in sequences."""
    table: Callable[[list[Sequence], bool], Table]
    """Sequences and `packing` -> what is written of them."""
    filler: Callable[[int], dict[str, Any]] | None = None
    """A token -> a written row of which nothing is learned, to even out the processes of a step."""
    also_reads: tuple[str, ...] = ()
    """Columns of a row that it reads beside those of the format."""
    chats: bool = True
    """Whether a chat template might be expected to touch its rows."""
    keeps_others: bool = False
    """Whether it keeps all columns of a row, for rewards to read."""
    lacks: str = ""
    """What rows of another format do not have; unless said, those are for another stage."""
    mapping: str = ""
    """How columns would be mapped to have what is lacking, as an example for the user."""
    learned: bool = True
    """Whether some of its tokens are learned."""
    settings: tuple[Any, ...] = ()
    """What a recipe says beside `data` of how rows become pieces, as JSON has it."""
    thinks: bool = False
    """Whether the template opens a block of thought where an answer begins."""
    packing_field: str = "packing"
    """What `packing` is called in a recipe."""
