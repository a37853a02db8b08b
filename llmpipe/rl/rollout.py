"""Draw answers, with the log-probability of every token under the very distribution that it was drawn from.

Each episode has uniform numbers of its own, and a token is where its number falls in the distribution's cumulative sum:
an answer depends neither on the batch nor on the process that it is drawn in, nor on what was drawn before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

RIDE = 8  # finished answers are taken out of the batch when they are at least one in so many


ORDER, DRAW, SHUFFLE, HELD_OUT, MIXED = range(5)  # what a generator is for


@dataclass
class Episode:
    """A prompt, an answer to it, and what the algorithm makes of them: float32 [tokens of the answer] each."""

    prompt: list[int]
    answer: list[int]
    ended: bool
    """Whether the last token of the answer is an end token."""
    log_probs: Tensor
    """Of the answer's tokens, as they were drawn."""
    allowed: list[Tensor] | None
    """Token ids that could be drawn at each place; None where all could."""
    old: Tensor | None = None
    """Log-probabilities as the training pass computes them, before it changes anything."""
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None


def allowed_of(logits: Tensor, top_k: int, top_p: float) -> Tensor | None:
    """Which tokens may be drawn, bool [rows, vocabulary]: the `top_k` likeliest, and of these the likeliest that have
    `top_p` of the probability together (Holtzman 2020). None: all of them."""
    if not top_k and top_p == 1:
        return None
    ordered, ids = logits.sort(descending=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_k:
        keep[:, top_k:] = False
    if top_p < 1:
        share = ordered.masked_fill(~keep, -torch.inf).softmax(-1)
        keep &= share.cumsum(-1) - share < top_p
    return torch.zeros_like(keep).scatter_(1, ids, keep)


def seeded(*numbers: int) -> torch.Generator:
    """A generator of its own for each tuple of numbers."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 0x9E3779B97F4A7C15 + number + 0x632BE59BD9B4E019) % (1 << 63)
        mixed ^= mixed >> 29
    return torch.Generator().manual_seed(mixed)


class Shuffled:
    """Rows in an endless sequence of shuffled epochs, the same for a seed and a `use`."""

    def __init__(self, rows: Any, seed: int, use: int):
        self.rows, self.seed, self.use, self.epoch = rows, seed, use, -1

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch, i = divmod(position, len(self.rows))
        if self.epoch != epoch:
            self.epoch = epoch
            self.order = torch.randperm(
                len(self.rows), generator=seeded(self.seed, self.use, epoch)
            ).tolist()
        return self.rows[self.order[i]]


@torch.no_grad()
def draw(
    model: Any, prompts: list[list[int]], luck: Tensor, how: Any, stops: list[int], pad: int
) -> list[Episode]:
    """Answers to tokenized prompts. `luck`: uniform numbers, float64 [prompts, how.max_new_tokens]; `how`: the recipe's
    `rollout`. The model is as it is: adapters, mode and autocast are the caller's."""
    device, width = model.device, max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    luck, ends = luck.to(device), torch.tensor(stops, device=device)
    rows = torch.arange(len(prompts), device=device)  # which episode each row of the batch is
    going = torch.ones(len(prompts), dtype=torch.bool, device=device)  # of the rows
    answers: list[list[int]] = [[] for _ in prompts]
    log_probs: list[list[float]] = [[] for _ in prompts]
    sets: list[list[Tensor]] = [[] for _ in prompts]
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for t in range(how.max_new_tokens):
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        logits = out.logits[:, -1].float() / how.temperature
        allowed = allowed_of(logits, how.top_k, how.top_p)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        log_p = logits.log_softmax(-1)
        cumulative = log_p.double().exp().cumsum(-1)
        at = luck[rows, t, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, at, right=True).clamp(max=logits.shape[1] - 1)
        likeliest = log_p.argmax(
            -1, keepdim=True
        )  # for a number that rounding put behind what could be drawn
        token = torch.where(log_p.gather(1, token) > -torch.inf, token, likeliest)
        chosen = log_p.gather(1, token).squeeze(1).tolist()
        token = token.squeeze(1)
        which = (
            [None] * len(rows)
            if allowed is None
            else [row.nonzero().squeeze(1).int() for row in allowed.cpu()]
        )
        for episode, on, one, log_one, own in zip(
            rows.tolist(), going.tolist(), token.tolist(), chosen, which, strict=True
        ):
            if on:
                answers[episode].append(one)
                log_probs[episode].append(log_one)
                sets[episode].append(own)
        going = going & ~torch.isin(token, ends)
        left = int(going.sum())
        if not left:
            break
        if RIDE * (len(rows) - left) >= len(rows):
            kept = going.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            rows, mask, token, going = rows[kept], mask[kept], token[kept], going[kept]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        ids, positions = token[:, None], mask.sum(1, keepdim=True) - 1
    limited = how.top_k or how.top_p < 1
    return [
        Episode(prompt, answer, answer[-1] in stops, torch.tensor(drawn), own if limited else None)
        for prompt, answer, drawn, own in zip(prompts, answers, log_probs, sets, strict=True)
    ]
