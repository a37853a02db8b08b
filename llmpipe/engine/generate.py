"""Generation from a model in training: the recipe's prompts, answered before and after."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmpipe.recipe import Samples


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


def render(tokenizer: PreTrainedTokenizerBase, prompt: str, template_kwargs: dict[str, Any] | None = None) -> str:
    """A prompt as the model sees it: one user turn of the chat template, or the bare text without a template."""
    if not tokenizer.chat_template:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **(template_kwargs or {})
    )


@torch.no_grad()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[dict[str, Any]]:
    """Greedy answers to rendered prompts, one batch: [{answer, tokens, ended}], `ended` by a stop token."""
    encoded = [tokenizer(p, add_special_tokens=not tokenizer.chat_template)["input_ids"] for p in prompts]
    width = max(map(len, encoded))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(e)) + e for e in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded], device=model.device)
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("sdpa")  # runs in fp32, with a cache and padding on the left
    try:
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
    finally:
        model.set_attn_implementation(attention)
        model.train(was_training)
    stop = model.generation_config.eos_token_id
    stop_ids = set(stop if isinstance(stop, list) else [stop])
    answers = []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in stop_ids), None)
        text = tokenizer.decode(row if end is None else row[:end], skip_special_tokens=True)
        answers.append({"answer": text, "tokens": len(row) if end is None else end + 1, "ended": end is not None})
    return answers


def answer_samples(
    trainer: Any,
    tokenizer: PreTrainedTokenizerBase,
    samples: Samples,
    path: Path,
    when: str,
    kwargs: dict | None = None,
) -> None:
    """Answer the recipe's prompts and add them to samples.jsonl as `when`; answers that are there are kept."""
    if not trainer.is_world_process_zero():
        return
    known = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    kept = [line for line in known if line["when"] == "before" and when == "after"]
    if when == "before" and (any(line["when"] == when for line in known) or trainer.resumes):
        return
    if samples.prompts:
        with own_rng():
            prompts = [render(tokenizer, prompt, kwargs) for prompt in samples.prompts]
            answers = answer(trainer.plain_model(), tokenizer, prompts, samples.max_new_tokens)
        kept += [{"when": when, "prompt": p, **a} for p, a in zip(samples.prompts, answers, strict=True)]
        if when == "after":
            for line in kept:
                trainer.say(
                    f"  {line['when']:>6} | {line['prompt']} -> {line['answer']!r}{'' if line['ended'] else ' (cut)'}"
                )
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), encoding="utf-8")
