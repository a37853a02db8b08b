"""How far transformers is with a GGUF file, of which it says nothing itself; and half of its work
is not done again: the vocabulary is parsed once, not for each of the configuration, the tokenizer
and the weights, and the names of tensors are listed once, not for each module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import gguf
from transformers import core_model_loading, modeling_gguf_pytorch_utils

Show = Callable[[float], None]
"""Is told of the share of the weights that is read."""


@contextmanager
def reading_gguf(show: Show) -> Iterator[None]:
    """Meanwhile `show` is told of each tensor that is read of a GGUF, once as the whole goes on."""
    furthest = 0.0

    def each(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        nonlocal furthest
        known = list(tensors)
        sizes = [getattr(tensor, "n_bytes", 1) for tensor in known]
        done, total = 0, sum(sizes) or 1
        for tensor, size in zip(known, sizes, strict=True):
            yield tensor
            done += size
            if done / total > furthest:  # what is read goes by once more, when it is placed
                furthest = done / total
                show(furthest)

    modules: list[Any] = [modeling_gguf_pytorch_utils, core_model_loading]
    before = [module.tqdm for module in modules]
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(reader), cache(names)
    for module in modules:
        module.tqdm = each
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
        for module, tqdm in zip(modules, before, strict=True):
            module.tqdm = tqdm
