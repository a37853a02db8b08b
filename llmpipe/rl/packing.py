"""Texts end to end in one row, each with positions of its own: no padding is computed.

The texts of an update are sent to the device once; a row is made of them there, by lengths that the
host knows, so that nothing waits for either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from llmpipe.data.pack import IGNORED
from llmpipe.kernels.log_probs import Allowed
from llmpipe.models.drawing.draw import Episode


@dataclass(frozen=True)
class Text:
    """A prompt and a response to it, on the device."""

    ids: Tensor
    """int64 [tokens]."""
    spans: list[tuple[int, int]]
    """Where the response's tokens are, [start, end) of each of its turns: what is learned from.
    All else is read only, an environment's turns as well."""
    allowed: Tensor | None
    """Token ids that could be drawn, one place of the response after the other, int32; None where
    all could."""
    counts: list[int]
    """How many of these each place has."""


@dataclass(frozen=True)
class Packed:
    """Texts end to end, and which of their tokens are learned from."""

    ids: Tensor
    """int64 [1, tokens]."""
    positions: Tensor
    """Places in the texts, int64 [1, tokens]."""
    predictors: Tensor
    """Where each target is predicted from: the place before it, int64 [targets]."""
    targets: Tensor
    """Token ids, int64 [targets]."""
    ends: Tensor
    """Where each text begins, and where the last one ends, int32 [texts + 1]."""
    longest: int
    """Tokens of the longest text."""
    allowed: Allowed | None
    """Which token ids could be drawn at each target; None where all could."""


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device; the host waits for nothing."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def texts_of(episodes: Sequence[Episode], device: torch.device) -> list[Text]:
    """Episodes on the device, sent at once."""
    ids = torch.tensor([i for each in episodes for i in each.ids])
    parts = sent(ids, device).split([each.tokens for each in episodes])
    counts = [[len(each) for each in episode.allowed or []] for episode in episodes]
    allowed: Sequence[Tensor | None] = [None] * len(episodes)
    if episodes[0].allowed is not None:
        all_ids = torch.cat([ids for each in episodes for ids in each.allowed or []])
        allowed = sent(all_ids, device).split([sum(each) for each in counts])
    columns = zip(parts, episodes, allowed, counts, strict=True)
    return [Text(ids, each.spans, those, many) for ids, each, those, many in columns]


def pack(texts: Sequence[Text]) -> Packed:
    """Texts end to end; the tokens of the responses are the targets."""
    device = texts[0].ids.device
    lengths = [len(text.ids) for text in texts]
    starts = list(accumulate(lengths, initial=0))
    places = torch.arange(starts[-1], device=device)
    predictors = [
        places[start + begin - 1 : start + end - 1]
        for text, start in zip(texts, starts, strict=False)
        for begin, end in text.spans
    ]
    return Packed(
        torch.cat([text.ids for text in texts])[None],
        torch.cat([places[:length] for length in lengths])[None],
        torch.cat(predictors),
        torch.cat([text.ids[begin:end] for text in texts for begin, end in text.spans]),
        sent(torch.tensor(starts, dtype=torch.int32), device),
        max(lengths),
        _allowed(texts),
    )


def _allowed(texts: Sequence[Text]) -> Allowed | None:
    """Of all targets."""
    ids = [text.allowed for text in texts if text.allowed is not None]
    if not ids:
        return None
    counts = [count for text in texts for count in text.counts]
    ends = list(accumulate(counts, initial=0))
    on_device = sent(torch.tensor(counts), ids[0].device)
    rows = torch.repeat_interleave(on_device, output_size=ends[-1])
    return Allowed(torch.cat(ids), rows, ends)


def pack_episodes(episodes: Sequence[Episode], device: torch.device) -> Packed:
    """Prompts with their responses, whose tokens are the targets."""
    return pack(texts_of(episodes, device))


def pack_rows(rows: Sequence[dict[str, Any]], device: torch.device) -> Packed:
    """Rows of sft data: their documents, whose learned tokens are the targets. Of none: nothing."""
    ids = [token for row in rows for token in row["input_ids"]]
    labels = [label for row in rows for label in row["labels"]]
    lengths = [length for row in rows for length in row["seq_lengths"]]
    positions = [i for length in lengths for i in range(length)]
    learned = [i for i, label in enumerate(labels) if label != IGNORED and positions[i]]
    starts = list(accumulate(lengths, initial=0))
    return Packed(
        sent(torch.tensor([ids]), device),
        sent(torch.tensor([positions]), device),
        sent(torch.tensor(learned, dtype=torch.long) - 1, device),
        sent(torch.tensor([labels[i] for i in learned], dtype=torch.long), device),
        sent(torch.tensor(starts, dtype=torch.int32), device),
        max(lengths, default=0),
        None,
    )
