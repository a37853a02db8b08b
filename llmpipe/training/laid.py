"""Batches as a device likes them: what a step would have to ask for is counted before they leave
the host, and rows that lie end to end come in few shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmpipe.data.pack import IGNORED
from llmpipe.training.rows import counted_tokens

Batch = dict[str, Any]
Collate = Callable[[list[Any]], Batch]

FEWEST = 32
SHORT = 128
"""Ends of documents that a batch has at least, the last one once and again; and one for so many of
its tokens. Rows of text mostly have fewer documents, and an end more costs a kernel little."""


@dataclass(frozen=True)
class Counted:
    """A trainer's collator, with the tokens of a batch as `tokens`."""

    collate: Collate

    def __call__(self, rows: list[Any]) -> Batch:
        batch = self.collate(rows)
        return {**batch, "tokens": counted_tokens(batch)}


@dataclass(frozen=True)
class EndToEnd:
    """TRL's collator of rows that lie end to end, for a device that is not to be asked anything.

    Adds `predictors`, int64 [targets]: the places before those that are learned. Documents that
    nothing is learned of fill a batch up to a multiple of `tokens`, and their ends are doubled in
    number whenever they are more, so that layers are compiled for few shapes.
    """

    collate: Collate
    pad_token_id: int
    longest: int
    """Tokens of a document at most."""
    tokens: int = 1
    balances: bool = False
    """Whether an `attention_mask` says which tokens are real, for the balance of experts: attention
    itself goes by the ends."""

    def __call__(self, rows: list[Any]) -> Batch:
        batch = self.collate(rows)
        if "cu_seq_lens_q" not in batch:  # rows are padded
            return batch
        batch.pop("seq_idx")  # of layers that `attention.fits` refuses
        real = batch["input_ids"].shape[1]
        filled = -real % self.tokens
        places = torch.arange(filled)[None] % self.longest
        batch["input_ids"] = pad(batch["input_ids"], (0, filled), value=self.pad_token_id)
        batch["labels"] = pad(batch["labels"], (0, filled), value=IGNORED)
        batch["position_ids"] = torch.cat([batch["position_ids"], places], 1)
        ends = self._ends(batch["cu_seq_lens_q"], real + filled)
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = ends
        batch["max_length_q"] = batch["max_length_k"] = self.longest
        if self.balances:
            batch["attention_mask"] = (torch.arange(real + filled) < real).long()[None]
        batch["predictors"] = (batch["labels"][0, 1:] != IGNORED).nonzero().flatten()
        return batch

    def _ends(self, real: Tensor, tokens: int) -> Tensor:
        """int32 [a power of 2]: where documents begin and end, those that fill among them."""
        filling = torch.arange(int(real[-1]), tokens, self.longest, dtype=torch.int32)[1:]
        ends = torch.cat([real, filling])
        fewest = max(FEWEST, 1 << max(tokens // SHORT - 1, 0).bit_length())
        count = max(fewest, 1 << len(ends).bit_length())
        return pad(ends, (0, count - len(ends)), value=tokens)


@dataclass(frozen=True)
class Placed:
    """A collator of padded rows, with places that no device is asked for then, int64 [tokens].

    `real_tokens`, for each `attention_mask`: of what is no padding, among the tokens of all rows.
    `targets`, for each `completion_mask`: of what is learned, among all tokens but rows' first.
    """

    collate: Collate

    def __call__(self, rows: list[Any]) -> Batch:
        batch = self.collate(rows)
        for name in list(batch):
            if name.endswith("attention_mask"):
                batch[name.replace("attention_mask", "real_tokens")] = _places(batch[name])
            elif name.endswith("completion_mask"):
                batch[name.replace("completion_mask", "targets")] = _places(batch[name][:, 1:])
        return batch


def _places(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero()[:, 0]


def told(batch: Batch, prefix: str = "") -> Batch:
    """What `Placed` has put into a batch, as a pass takes it."""
    names = ("real_tokens", "targets")
    return {name: batch[prefix + name] for name in names if prefix + name in batch}
