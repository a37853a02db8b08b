"""Generation: conversations as a model sees them, answers in batches, the recipe's prompts before and after."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import upstream
from llmpipe.data.formats import Rejected
from llmpipe.data.template import bounded
from llmpipe.errors import UserError


@contextmanager
def own_rng(seed: int = 0) -> Iterator[None]:
    """Run with a generator of its own; Python's, NumPy's and torch's come out as they went in."""
    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class Sampling(NamedTuple):
    """How an answer is drawn; temperature 0 is greedy, top_k 0 is no limit."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


def render(
    tokenizer: Tokenizer,
    ask: dict[str, Any],
    template_kwargs: dict[str, Any] | None = None,
    tools: list[dict] | None = None,
    *,
    open_turn: bool = True,
) -> str:
    """A conversation as the model sees it, up to where its answer begins; the bare text without a template.

    `ask`: {"text": str}, which no template touches, or {"messages": [...]}.
    """
    if "text" in ask:
        return ask["text"]
    if not tokenizer.chat_template:
        return "\n\n".join(turn["content"] for turn in ask["messages"])
    try:
        with bounded():  # a template is as untrusted as the model it comes with
            return tokenizer.apply_chat_template(
                ask["messages"],
                tools=tools,
                tokenize=False,
                add_generation_prompt=open_turn,
                **(template_kwargs or {}),
            )
    except Rejected as error:
        raise UserError(f"the chat template is refused: {error.detail}") from None
    except TemplateError as error:
        raise UserError(f"the chat template refuses a conversation: {error}") from None


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    sampling: Sampling,
    streamer: Any = None,
) -> list[dict[str, Any]]:
    """Answers to tokenized prompts, one batch: [{answer, tokens, ended}], `ended` by a stop token of the model's."""
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(e)) + e for e in prompts], device=model.device)
    mask = torch.tensor(
        [[0] * (width - len(e)) + [1] * len(e) for e in prompts], device=model.device
    )
    stop = model.generation_config.eos_token_id
    stop = tokenizer.eos_token_id if stop is None else stop
    how = (
        {"do_sample": True, **sampling._asdict()}
        if sampling.temperature
        else {"max_new_tokens": sampling.max_new_tokens}
    )
    most = getattr(model.config, "max_position_embeddings", None)
    if most and width + sampling.max_new_tokens > most:
        raise UserError(
            f"a prompt of {width:,} tokens and {sampling.max_new_tokens:,} new ones exceed the model's {most:,}"
        )
    # nothing of the model's own configuration but where it stops: a repetition penalty would be no greedy answer
    config = GenerationConfig(**how, eos_token_id=stop, pad_token_id=pad)
    was_training = model.training
    model.eval()
    try:
        with upstream.generating(model):
            out = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer
            )
    finally:
        model.train(was_training)
    stop_ids = set(stop if isinstance(stop, list) else [stop])
    answers = []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in stop_ids), None)
        text = tokenizer.decode(row if end is None else row[:end], skip_special_tokens=True)
        answers.append(
            {
                "answer": text,
                "tokens": len(row) if end is None else end + 1,
                "ended": end is not None,
            }
        )
    return answers
