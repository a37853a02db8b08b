"""What a model in memory makes of the questions of the probe (`run.probe`).

A prompt is read once: its cache is copied for the continuation, and the answer goes on from it. A
model that has no such cache reads everything again for each token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import screen, upstream
from llmpipe.errors import UserError
from llmpipe.models.drawing.draw import Sampling, left_padded
from llmpipe.models.generate import causal_of, draws, render, stop_tokens
from llmpipe.models.pretrained import rows_of
from llmpipe.models.rng import isolated_rng
from llmpipe.parallel.parts import device_of
from llmpipe.run.context import tokens_of
from llmpipe.run.probe import ANSWER_TOKENS, DATE, DECIMALS, QUESTIONS, Probe, Question, Said

LIKE = 64
"""Tokens that the prompts of a batch may differ by: those with tools are far longer than others."""


@dataclass(frozen=True)
class Asked:
    """A question as a model sees it."""

    question: Question
    text: str | None
    tokens: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Reply:
    """What comes behind a prompt."""

    log_probs: list[float]
    """Of the continuation's tokens."""
    answer: list[int]
    margins: list[float]


@screen.doing("asking the questions that the model is known by")
@torch.no_grad()
def ask(
    model: Any, tokenizer: Tokenizer, template_kwargs: dict[str, Any], precision: str = ""
) -> Probe:
    """A probe of a causal language model, or PEFT's model of one, as it lies in memory.

    `template_kwargs`: variables of the chat template in training; `precision`: of the weights,
    where the logits do not tell it. The model is left in the mode it was in.
    """
    asked = questions_for(tokenizer, template_kwargs, causal_of(model), rows_of_model(model))
    stops = stop_tokens(model, tokenizer)
    was_training = model.training
    model.eval()
    try:
        with isolated_rng(), upstream.generating(model):
            replies = _replies(model, tokenizer, asked, stops)
    finally:
        model.train(was_training)
    said = [said_of(one, replies.get(i), tokenizer, stops) for i, one in enumerate(asked)]
    kind = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Probe(precision=precision or kind, stops=stops, said=said)


def rows_of_model(model: Any) -> int:
    """Tokens that a model has rows of embeddings for."""
    return int(model.get_input_embeddings().weight.shape[0])


def questions_for(
    tokenizer: Tokenizer, template_kwargs: dict[str, Any], model: Any, rows: int
) -> list[Asked]:
    """Every question as text and tokens; without a continuation where it does not fit the model."""
    context = tokens_of(model.config.to_dict())
    asked = []
    for question in QUESTIONS:
        text = written(tokenizer, question, template_kwargs)
        tokens = tokens_in(tokenizer, question, text) if text is not None else []
        continuation = tokenizer(question.continuation, add_special_tokens=False)["input_ids"]
        width = len(tokens) + max(len(continuation), ANSWER_TOKENS)
        fits = context is None or width <= context
        known = rows >= rows_of(tokenizer) or all(t < rows for t in [*tokens, *continuation])
        usable = bool(tokens) and fits and known
        asked.append(Asked(question, text, tokens, continuation if usable else []))
    return asked


def written(tokenizer: Tokenizer, question: Question, kwargs: dict[str, Any]) -> str | None:
    """A question as the tokenizer's template writes it; None where that refuses it."""
    if question.text is not None:
        return question.text
    if not tokenizer.chat_template and question.tools:
        return None  # bare text says nothing of tools
    try:
        ask = {"messages": question.messages}
        return render(tokenizer, ask, DATE | kwargs, question.tools)
    except UserError:
        return None


def tokens_in(tokenizer: Tokenizer, question: Question, text: str) -> list[int]:
    """Tokens of a question: a template writes the first token itself."""
    bare = question.text is not None or not tokenizer.chat_template
    ids: list[int] = tokenizer(text, add_special_tokens=bare)["input_ids"]
    return ids


def said_of(asked: Asked, reply: Reply | None, tokenizer: Tokenizer, stops: list[int]) -> Said:
    """A question with its reply, as a manifest keeps it."""
    answer = reply.answer if reply else []
    words = [token for token in answer if token not in stops]
    return Said(
        question=asked.question,
        text=asked.text,
        tokens=asked.tokens,
        continuation=asked.continuation,
        log_probs=[round(value, DECIMALS) for value in reply.log_probs] if reply else [],
        answer=answer,
        margins=[round(value, DECIMALS) for value in reply.margins] if reply else [],
        words=tokenizer.decode(words, skip_special_tokens=True),
    )


# --- what comes behind a prompt -------------------------------------------------------------------


def _replies(
    model: Any, tokenizer: Tokenizer, asked: list[Asked], stops: list[int]
) -> dict[int, Reply]:
    """The reply to each question that can be asked, by its place."""
    places = [i for i, one in enumerate(asked) if one.continuation]
    if not draws(model, Sampling(ANSWER_TOKENS)):
        return {i: _without_cache(model, asked[i], stops) for i in places}
    replies: dict[int, Reply] = {}
    for batch in _of_like_length(asked, places):
        in_batch = _batch(model, tokenizer, [asked[i] for i in batch], stops)
        replies.update(zip(batch, in_batch, strict=True))
    return replies


def _of_like_length(asked: list[Asked], places: list[int]) -> Iterator[list[int]]:
    """Places of questions in batches, by their prompts' lengths."""
    batch: list[int] = []
    for place in sorted(places, key=lambda i: len(asked[i].tokens)):
        if batch and len(asked[place].tokens) - len(asked[batch[0]].tokens) > LIKE:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _batch(model: Any, tokenizer: Tokenizer, asked: list[Asked], stops: list[int]) -> list[Reply]:
    """Replies to prompts that are padded on the left, and read once."""
    device = device_of(model)
    pad = tokenizer.pad_token_id or 0
    ids = left_padded([one.tokens for one in asked], pad).to(device)
    lengths = torch.tensor([len(one.tokens) for one in asked], device=device)
    places = torch.arange(-ids.shape[1], 0, device=device)
    mask = (places >= -lengths[:, None]).long()
    cache = DynamicCache(config=causal_of(model).config)
    reading = _Reading(model, mask, cache)
    last = reading.logits(ids)[:, -1]
    continued = _continued(reading.copy(), asked, last, pad)
    answers = _answered(reading, last, stops)
    pairs = zip(continued, answers, strict=True)
    return [Reply(log_probs, answer, margins) for log_probs, (answer, margins) in pairs]


@dataclass
class _Reading:
    """Rows that a model has read."""

    model: Any
    mask: Tensor
    """1 for a token and 0 for padding, int64 [rows, tokens so far]."""
    cache: DynamicCache
    begun: bool = False

    def copy(self) -> _Reading:
        """Another one, to go on with otherwise."""
        return _Reading(self.model, self.mask, copy.deepcopy(self.cache), self.begun)

    def logits(self, ids: Tensor, ones: Tensor | None = None) -> Tensor:
        """Read on: [rows, tokens, vocabulary], of a prompt the last token's alone.

        `ids`: int64 [rows, tokens], `ones`: 1 where it is a token.
        """
        if self.begun:
            ones = torch.ones_like(ids) if ones is None else ones
            self.mask = torch.cat([self.mask, ones], 1)
        keep = 0 if self.begun else 1
        self.begun = True
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: Tensor = out.logits.float()
        return logits


def _continued(
    reading: _Reading, asked: list[Asked], last: Tensor, pad: int
) -> Iterator[list[float]]:
    """Log-probabilities of the continuations. `last`: logits behind the prompts."""
    width = max(len(one.continuation) for one in asked)
    rows = [one.continuation + [pad] * (width - len(one.continuation)) for one in asked]
    ids = torch.tensor(rows, device=last.device)
    lengths = torch.tensor([len(one.continuation) for one in asked], device=last.device)
    ones = (torch.arange(width, device=last.device) < lengths[:, None]).long()
    logits = torch.cat([last[:, None], reading.logits(ids, ones)[:, :-1]], 1)
    log_probs = logits.log_softmax(-1).gather(2, ids[..., None]).squeeze(2)
    for row, one in zip(log_probs.tolist(), asked, strict=True):
        yield row[: len(one.continuation)]


def _answered(
    reading: _Reading, last: Tensor, stops: list[int]
) -> Iterator[tuple[list[int], list[float]]]:
    """The likeliest answers, and by how much each token is the likeliest."""
    tokens, margins = [], []
    for number in range(ANSWER_TOKENS):
        best = last.topk(2)
        tokens.append(best.indices[:, 0].tolist())
        margins.append((best.values[:, 0] - best.values[:, 1]).tolist())
        if number + 1 < ANSWER_TOKENS:
            last = reading.logits(best.indices[:, :1])[:, -1]
    for answer, by in zip(zip(*tokens, strict=True), zip(*margins, strict=True), strict=True):
        yield until_stop(answer, by, stops)


def until_stop(
    answer: tuple[int, ...], margins: tuple[float, ...], stops: list[int]
) -> tuple[list[int], list[float]]:
    """An answer up to the token that ends it."""
    end = next((i + 1 for i, token in enumerate(answer) if token in stops), len(answer))
    return list(answer[:end]), list(margins[:end])


def _without_cache(model: Any, asked: Asked, stops: list[int]) -> Reply:
    """The reply of a model that keeps nothing of what it read."""
    whole = _rows(model, asked.tokens + asked.continuation)
    behind = whole[len(asked.tokens) - 1 : -1].log_softmax(-1)
    log_probs = behind.gather(1, torch.tensor(asked.continuation)[:, None]).squeeze(1).tolist()
    answer: list[int] = []
    margins: list[float] = []
    while len(answer) < ANSWER_TOKENS and not (answer and answer[-1] in stops):
        best = _rows(model, asked.tokens + answer)[-1].topk(2)
        answer.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
    return Reply(log_probs, answer, margins)


def _rows(model: Any, ids: list[int]) -> Tensor:
    """Logits of every token of a sequence: float32 [tokens, vocabulary], on the CPU."""
    row = torch.tensor([ids], device=device_of(model))
    logits: Tensor = model(input_ids=row, use_cache=False).logits[0].float().cpu()
    return logits
