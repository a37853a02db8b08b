"""Documents to learn, for `pretrain`: laid end to end and cut into blocks without padding.

The files are those of rows. With `isolate` a block keeps in `seq_lengths` where its documents
begin, and attention does not cross from one to the next.
"""

from __future__ import annotations

from dataclasses import replace

from llmpipe.data.kinds.rows import ROWS
from llmpipe.data.pack import EndToEnd, Layout


def layout(max_length: int, packing: bool) -> Layout:
    return EndToEnd(max_length)


BLOCKS = replace(
    ROWS,
    name="blocks",
    chats=False,
    layout=layout,
    packing_field="isolate",
)
