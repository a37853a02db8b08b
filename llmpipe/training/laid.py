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
class Targeted:
    """A collator of padded responses, with the places of what is learned, so that no device is
    asked for them: `targets`, int64 [targets], among the tokens of all rows but their first ones.
    """

    collate: Collate

    def __call__(self, rows: list[Any]) -> Batch:
        batch = self.collate(rows)
        masks = [name for name in batch if name.endswith("completion_mask")]
        targets = {
            name.replace("completion_mask", "targets"): batch[name][:, 1:].flatten().nonzero()[:, 0]
            for name in masks
        }
        return {**batch, **targets}
