"""Texts end to end in one row, each with positions of its own: no padding is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmpipe.data.pack import IGNORED
from llmpipe.rl.rollout import Episode


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
    allowed: list[Tensor] | None
    """Which token ids could be drawn at each target; None where all could."""


def pack_episodes(episodes: Sequence[Episode], device: torch.device) -> Packed:
    """Prompts with their responses, whose tokens are the targets."""
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    allowed: list[Tensor] = []
    for episode in episodes:
        first = len(ids) + len(episode.prompt) - 1
        ids += episode.prompt + episode.response
        positions += range(episode.tokens)
        predictors += range(first, first + len(episode.response))
        targets += episode.response
        allowed += episode.allowed or []
    return Packed(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        torch.tensor(predictors, device=device),
        torch.tensor(targets, device=device),
        None if episodes[0].allowed is None else allowed,
    )


def pack_rows(rows: Sequence[dict[str, Any]], device: torch.device) -> Packed:
    """Rows of sft data: their documents, whose learned tokens are the targets. Of none: nothing."""
    ids = [token for row in rows for token in row["input_ids"]]
    labels = [label for row in rows for label in row["labels"]]
    positions = [i for row in rows for length in row["seq_lengths"] for i in range(length)]
    learned = [i for i, label in enumerate(labels) if label != IGNORED and positions[i]]
    return Packed(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        torch.tensor(learned, device=device, dtype=torch.long) - 1,
        torch.tensor([labels[i] for i in learned], device=device, dtype=torch.long),
        None,
    )
