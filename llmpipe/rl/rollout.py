"""Draw responses, with the log-probability of every token under the very distribution that it was
drawn from.

Each episode has uniform numbers of its own, and a token is where its number falls in the
distribution's cumulative sum: a response depends neither on the batch nor on the process that it is
drawn in, nor on what was drawn before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from llmpipe.recipe.reinforcement import Rollout

# Rows whose responses are finished leave the batch once they are at least one in so many.
FINISHED_SHARE = 8


@dataclass(frozen=True)
class Episode:
    """A prompt and a response to it, as token ids."""

    prompt: list[int]
    response: list[int]
    ended: bool
    """Whether the last token of the response is an end token."""
    log_probs: Tensor
    """Of the response's tokens as they were drawn, float32 [tokens]."""
    allowed: list[Tensor] | None
    """Token ids that could be drawn at each place; None where all could."""

    @property
    def tokens(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.response)


def allowed_tokens(logits: Tensor, top_k: int, top_p: float) -> Tensor | None:
    """Which tokens may be drawn, bool [rows, vocabulary]; None: all of them.

    The `top_k` likeliest, and of these the likeliest that have `top_p` of the probability together
    (Holtzman 2020).
    """
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


@dataclass
class _Draft:
    """A response so far."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    allowed: list[Tensor] = field(default_factory=list)


@dataclass
class _Batch:
    """The rows that the model computes."""

    episodes: Tensor
    """Which episode each row is, int64 [rows]."""
    going: Tensor
    """Whether its response has not ended, bool [rows]."""
    ids: Tensor
    """Tokens that are not in the cache yet, int64 [rows, new tokens]."""
    positions: Tensor
    """Of `ids`."""
    mask: Tensor
    """1 for a token and 0 for padding, int64 [rows, tokens so far]."""
    cache: DynamicCache

    def advance(self, tokens: Tensor) -> None:
        """Go on with one token a row, int64 [rows]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.ids = tokens[:, None]
        self.positions = self.mask.sum(1, keepdim=True) - 1

    def keep(self, rows: Tensor) -> None:
        """Leave only these rows, int64 [kept]."""
        self.cache.batch_select_indices(rows)
        self.episodes = self.episodes[rows]
        self.mask = self.mask[rows]
        self.going = self.going[rows]


@dataclass(frozen=True)
class _Drawn:
    """One token for every row."""

    tokens: Tensor
    """int64 [rows]."""
    log_probs: Tensor
    """float32 [rows]."""
    allowed: Tensor | None
    """As `allowed_tokens` has it."""


def draw(
    model: Any,
    prompts: list[list[int]],
    uniforms: Tensor,
    rollout: Rollout,
    end_tokens: list[int],
    pad_token: int,
) -> list[Episode]:
    """Responses to tokenized prompts, in their order.

    `uniforms`: float64 [prompts, rollout.max_new_tokens], each in [0, 1). The model is as it is:
    adapters, mode and autocast are the caller's.
    """
    drafts = [_Draft() for _ in prompts]
    with torch.no_grad():
        batch = _left_padded(model, prompts, pad_token)
        uniforms = uniforms.to(model.device)
        ends = torch.tensor(end_tokens, device=model.device)
        for t in range(rollout.max_new_tokens):
            drawn = _step(model, batch, uniforms[batch.episodes, t, None], rollout)
            _write_down(drawn, batch, drafts)
            batch.going = batch.going & ~torch.isin(drawn.tokens, ends)
            tokens = _without_finished(batch, drawn.tokens)
            if tokens is None:
                break
            batch.advance(tokens)
    return [
        Episode(
            prompt,
            draft.tokens,
            draft.tokens[-1] in end_tokens,
            torch.tensor(draft.log_probs),
            draft.allowed if rollout.is_partial else None,
        )
        for prompt, draft in zip(prompts, drafts, strict=True)
    ]


def _left_padded(model: Any, prompts: list[list[int]], pad_token: int) -> _Batch:
    """A row for each prompt, its end at the right."""
    device = model.device
    width = max(map(len, prompts))
    ids = [[pad_token] * (width - len(prompt)) + prompt for prompt in prompts]
    marks = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    mask = torch.tensor(marks, device=device)
    return _Batch(
        episodes=torch.arange(len(prompts), device=device),
        going=torch.ones(len(prompts), dtype=torch.bool, device=device),
        ids=torch.tensor(ids, device=device),
        positions=(mask.cumsum(1) - 1).clamp(min=0),
        mask=mask,
        cache=DynamicCache(config=model.config),
    )


def _step(model: Any, batch: _Batch, uniforms: Tensor, rollout: Rollout) -> _Drawn:
    """Draw the next token of every row by its number, float64 [rows, 1]."""
    out = model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        past_key_values=batch.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits = out.logits[:, -1].float() / rollout.temperature
    allowed = allowed_tokens(logits, rollout.top_k, rollout.top_p)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    log_probs = logits.log_softmax(-1)
    cumulative = log_probs.double().exp().cumsum(-1)
    place = uniforms * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, place, right=True).clamp(max=logits.shape[1] - 1)
    # for a number that rounding put behind what could be drawn
    likeliest = log_probs.argmax(-1, keepdim=True)
    token = torch.where(log_probs.gather(1, token) > -torch.inf, token, likeliest)
    return _Drawn(token.squeeze(1), log_probs.gather(1, token).squeeze(1), allowed)


def _write_down(drawn: _Drawn, batch: _Batch, drafts: list[_Draft]) -> None:
    """Add the drawn tokens to the responses that have not ended."""
    tokens = drawn.tokens.tolist()
    log_probs = drawn.log_probs.tolist()
    allowed = None if drawn.allowed is None else drawn.allowed.cpu()
    going = batch.going.tolist()
    for row, episode in enumerate(batch.episodes.tolist()):
        if going[row]:
            draft = drafts[episode]
            draft.tokens.append(tokens[row])
            draft.log_probs.append(log_probs[row])
            if allowed is not None:
                draft.allowed.append(allowed[row].nonzero().squeeze(1).int())


def _without_finished(batch: _Batch, tokens: Tensor) -> Tensor | None:
    """Drop finished rows where they are many; the tokens of the others, None where all are
    finished."""
    rows = len(batch.going)
    unfinished = int(batch.going.sum())
    if not unfinished:
        return None
    if FINISHED_SHARE * (rows - unfinished) < rows:
        return tokens
    kept = batch.going.nonzero().squeeze(1)
    batch.keep(kept)
    return tokens[kept]
