"""Generation: conversations as a model sees them, answers in batches, the recipe's prompts before and after."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.data.formats import Rejected
from llmpipe.data.templates import bounded
from llmpipe.engine import upstream
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
                ask["messages"], tools=tools, tokenize=False, add_generation_prompt=open_turn, **(template_kwargs or {})
            )
    except Rejected as error:
        raise UserError(f"the chat template is refused: {error.detail}") from None
    except TemplateError as error:
        raise UserError(f"the chat template refuses a conversation: {error}") from None


@torch.no_grad()
def answer(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: list[list[int]], sampling: Sampling, streamer: Any = None
) -> list[dict[str, Any]]:
    """Answers to tokenized prompts, one batch: [{answer, tokens, ended}], `ended` by a stop token of the model's."""
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(e)) + e for e in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in prompts], device=model.device)
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
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer)
    finally:
        model.train(was_training)
    stop_ids = set(stop if isinstance(stop, list) else [stop])
    answers = []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in stop_ids), None)
        text = tokenizer.decode(row if end is None else row[:end], skip_special_tokens=True)
        answers.append({"answer": text, "tokens": len(row) if end is None else end + 1, "ended": end is not None})
    return answers


def answer_samples(trainer: Any, tokenizer: Tokenizer, when: str) -> None:
    """Answer the recipe's prompts and add them to samples.jsonl as `when`; answers that are there are kept."""
    if not trainer.is_world_process_zero():
        return
    samples, path = trainer.recipe.samples, trainer.artifact.path / "samples.jsonl"
    known = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []
    kept = [line for line in known if line["when"] == "before" and when == "after"]
    if when == "before" and (any(line["when"] == when for line in known) or trainer.resumes):
        return
    if samples.prompts:
        with own_rng():
            asks = [{"messages": [{"role": "user", "content": prompt}]} for prompt in samples.prompts]
            texts = [render(tokenizer, ask, trainer.recipe.data.chat_template_kwargs) for ask in asks]
            prompts = [tokenizer(t, add_special_tokens=not tokenizer.chat_template)["input_ids"] for t in texts]
            answers = answer(trainer.plain_model(), tokenizer, prompts, Sampling(samples.max_new_tokens))
        kept += [{"when": when, "prompt": p, **a} for p, a in zip(samples.prompts, answers, strict=True)]
    for line in kept if when == "after" else ():
        cut = "" if line["ended"] else " (cut)"
        trainer.say(f"  {line['when']:>6} | {line['prompt']} -> {line['answer']!r}{cut}")
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), encoding="utf-8")
