"""Draw responses, with the log-probability of every token under the very distribution that it was
drawn from.

Each episode has uniform numbers of its own, and a token is where its number falls in the
distribution's cumulative sum: a response depends neither on the batch nor on the process that it is
drawn in, nor on what was drawn before. A prompt that is asked several times is read once.

`draw` is the form for CPUs, and for what `replay` cannot serve on a GPU. It reads one tensor
from the device for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from llmpipe.parallel.parts import device_of

# Rows whose responses are finished leave the batch once they are at least one in so many.
FINISHED_SHARE = 8

UNREAD = 16  # tokens of every row whose allowed ids are read at once


@dataclass(frozen=True)
class Sampling:
    """How a response is drawn; temperature 0 is greedy, top_k 0 is no limit."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def options(self) -> dict[str, Any]:
        """In the words of transformers' GenerationConfig."""
        if self.temperature:
            return {"do_sample": True, **asdict(self)}
        return {"max_new_tokens": self.max_new_tokens}


class Inserted(NamedTuple):
    """What somebody else says in the middle of a response."""

    at: int
    """How many tokens of the response stand before it."""
    ids: list[int]


@dataclass(frozen=True)
class Episode:
    """A prompt and a response to it, as token ids. What an environment says between the turns of a
    response is no part of it: nothing there was drawn, and nothing there is learned."""

    prompt: list[int]
    response: list[int]
    """The policy's own tokens, those of all its turns."""
    ended: bool
    """Whether the last token of the response is an end token, and no environment waits for more."""
    log_probs: Tensor
    """Of the response's tokens as they were drawn, float32 [tokens]."""
    allowed: list[Tensor] | None
    """Token ids that could be drawn at each place; None where all could."""
    inserted: tuple[Inserted, ...] = ()
    """The environment's turns, in their order; one behind each turn of the policy but the last."""

    @property
    def tokens(self) -> int:
        """Tokens of the whole text."""
        return len(self.prompt) + len(self.response) + self.inserted_tokens

    @property
    def inserted_tokens(self) -> int:
        return sum(len(ids) for _, ids in self.inserted)

    @property
    def turns(self) -> int:
        """Of the policy."""
        return 1 + len(self.inserted)

    @property
    def ids(self) -> list[int]:
        """The whole text: the prompt, and the response with the environment's turns in it."""
        ids, begin = [*self.prompt], 0
        for at, others in self.inserted:
            ids += self.response[begin:at] + others
            begin = at
        return ids + self.response[begin:]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where in `ids` the response's tokens are, [start, end) of each turn."""
        spans, start, begin = [], len(self.prompt), 0
        for at, others in self.inserted:
            end = start + at - begin
            spans.append((start, end))
            start, begin = end + len(others), at
        return [*spans, (start, start + len(self.response) - begin)]


@dataclass(frozen=True)
class Drawn:
    """One token for every row."""

    tokens: Tensor
    """int64 [rows]."""
    log_probs: Tensor
    """float32 [rows]."""
    allowed: Tensor | None
    """As `allowed_tokens` has it."""


def pick(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Drawn:
    """The token of every row that its number falls on, or the likeliest: logits [rows, vocabulary]
    as the model has them, numbers float64 [rows, 1]. The host reads nothing."""
    logits = logits.float()
    if not sampling.temperature:
        likeliest = logits.argmax(-1)
        return Drawn(likeliest, torch.zeros_like(likeliest, dtype=torch.float32), None)
    logits = logits / sampling.temperature
    allowed = allowed_tokens(logits, sampling.top_k, sampling.top_p)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    log_probs = logits.log_softmax(-1)
    cumulative = log_probs.double().exp().cumsum(-1)
    place = uniforms * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, place, right=True).clamp(max=logits.shape[1] - 1)
    # for a number that rounding put behind what could be drawn
    likeliest = log_probs.argmax(-1, keepdim=True)
    token = torch.where(log_probs.gather(1, token) > -torch.inf, token, likeliest)
    return Drawn(token.squeeze(1), log_probs.gather(1, token).squeeze(1), allowed)


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


def allowed_ids(masks: Tensor) -> list[Tensor]:
    """The ids that each row of bool [rows, vocabulary] allows, int32 on the CPU: two reads."""
    counts = masks.sum(1).tolist()
    return list(masks.nonzero()[:, 1].int().cpu().split(counts))


def left_padded(prompts: Sequence[list[int]], pad_token: int) -> Tensor:
    """A row for each prompt, its end at the right: int64 [prompts, the longest one's tokens], on
    the CPU."""
    width = max(map(len, prompts))
    return torch.tensor([[pad_token] * (width - len(prompt)) + prompt for prompt in prompts])


def draw(
    model: Any,
    prompts: list[list[int]],
    uniforms: Tensor,
    sampling: Sampling,
    end_tokens: list[int],
    pad_token: int,
) -> list[Episode]:
    """Responses to tokenized prompts, in their order.

    `uniforms`: float64 [prompts, sampling.max_new_tokens], each in [0, 1). The model is as it is:
    adapters, mode and autocast are the caller's.
    """
    record = _Record(len(prompts), end_tokens)
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    with torch.no_grad():
        batch = _Batch.of(model, [list(prompt) for prompt in distinct], uniforms, pad_token)
        for t in range(sampling.max_new_tokens):
            logits = _logits(model, batch)
            if t == 0 and len(distinct) < len(prompts):
                numbers = {prompt: row for row, prompt in enumerate(distinct)}
                logits = logits[batch.repeat([numbers[tuple(prompt)] for prompt in prompts])]
            drawn = pick(logits, batch.uniforms[:, t, None], sampling)
            record.add(drawn, batch.episodes)
            batch.advance(drawn.tokens)
            going = [row for row, i in enumerate(batch.episodes) if i not in record.finished]
            if not going:
                break
            finished = len(batch.episodes) - len(going)
            if FINISHED_SHARE * finished >= len(batch.episodes):
                batch.keep(going)
        return record.episodes(prompts)


@dataclass
class _Batch:
    """The rows that the model computes."""

    episodes: list[int]
    """Which episode each row is."""
    uniforms: Tensor
    """The rows' numbers, float64 [rows, tokens of a response]."""
    ids: Tensor
    """Tokens that are not in the cache yet, int64 [rows, new tokens]."""
    positions: Tensor
    """Of `ids`."""
    mask: Tensor
    """1 for a token and 0 for padding, int64 [rows, tokens so far]."""
    cache: DynamicCache

    @classmethod
    def of(cls, model: Any, prompts: list[list[int]], uniforms: Tensor, pad_token: int) -> _Batch:
        """Prompts, each once, their ends at the right; `uniforms` of all that is asked."""
        device = device_of(model)
        ids = left_padded(prompts, pad_token)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        mask = (torch.arange(-ids.shape[1], 0) >= -lengths[:, None]).long().to(device)
        return cls(
            episodes=list(range(len(uniforms))),
            uniforms=uniforms.to(device),
            ids=ids.to(device),
            positions=(mask.cumsum(1) - 1).clamp(min=0),
            mask=mask,
            cache=DynamicCache(config=model.config),
        )

    def advance(self, tokens: Tensor) -> None:
        """Go on with one token a row, int64 [rows]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.ids = tokens[:, None]
        self.positions = self.positions[:, -1:] + 1

    def repeat(self, rows: list[int]) -> Tensor:
        """Go on with a row for each episode, from the one that has read its prompt, on the device:
        int64 [episodes]."""
        read = torch.tensor(rows).to(self.ids.device)
        self._select(read)
        return read

    def keep(self, rows: list[int]) -> None:
        """Leave only these rows."""
        kept = torch.tensor(rows).to(self.ids.device)
        self._select(kept)
        self.episodes = [self.episodes[row] for row in rows]
        self.uniforms = self.uniforms[kept]

    def _select(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.ids = self.ids[rows]
        self.positions = self.positions[rows]
        self.mask = self.mask[rows]


def _logits(model: Any, batch: _Batch) -> Tensor:
    """Of the next token of every row, [rows, vocabulary]."""
    out = model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        past_key_values=batch.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = out.logits[:, -1]
    return logits


class _Record:
    """What was drawn, token by token. Tokens are read as they are drawn, since they say whose
    response ended; the rest where many are read at once."""

    def __init__(self, count: int, end_tokens: list[int]):
        self.finished: set[int] = set()
        """Episodes whose last token is an end token."""
        self._ends = set(end_tokens)
        self._responses: list[list[int]] = [[] for _ in range(count)]
        self._allowed: list[list[Tensor]] = [[] for _ in range(count)]
        self._owners: list[list[int | None]] = []
        """Whose token is in each row, None where that response had ended, for each step."""
        self._log_probs: list[Tensor] = []
        self._masks: list[Tensor] = []

    def add(self, drawn: Drawn, episodes: list[int]) -> None:
        """Note a token of each row that has not ended."""
        self._owners.append([i if i not in self.finished else None for i in episodes])
        for owner, token in zip(self._owners[-1], drawn.tokens.tolist(), strict=True):
            if owner is None:
                continue
            self._responses[owner].append(token)
            if token in self._ends:
                self.finished.add(owner)
        self._log_probs.append(drawn.log_probs)
        if drawn.allowed is not None:
            self._masks.append(drawn.allowed)
            if len(self._masks) == UNREAD:
                self._read_masks()

    def _read_masks(self) -> None:
        owners = (owner for row in self._owners[-len(self._masks) :] for owner in row)
        for owner, ids in zip(owners, allowed_ids(torch.cat(self._masks)), strict=True):
            if owner is not None:
                self._allowed[owner].append(ids)
        self._masks.clear()

    def episodes(self, prompts: list[list[int]]) -> list[Episode]:
        """What was drawn, episode by episode."""
        partial = bool(self._masks) or any(self._allowed)
        if self._masks:
            self._read_masks()
        log_probs: list[list[float]] = [[] for _ in prompts]
        owners = (owner for row in self._owners for owner in row)
        for owner, value in zip(owners, torch.cat(self._log_probs).tolist(), strict=True):
            if owner is not None:
                log_probs[owner].append(value)
        return [
            Episode(
                prompt,
                self._responses[i],
                i in self.finished,
                torch.tensor(log_probs[i]),
                self._allowed[i] if partial else None,
            )
            for i, prompt in enumerate(prompts)
        ]
