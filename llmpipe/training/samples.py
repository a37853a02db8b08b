"""The recipe's prompts, answered before and after training."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.models.generate import Sampling, generate, isolated_rng, render


def answer_samples(trainer: Any, tokenizer: Tokenizer, when: str) -> None:
    """Answer the recipe's prompts and add them to samples.jsonl as `when`; answers that are there are kept."""
    if not trainer.is_world_process_zero():
        return
    samples, path = trainer.recipe.samples, trainer.artifact.path / "samples.jsonl"
    known = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if path.exists()
        else []
    )
    kept = [line for line in known if line["when"] == "before" and when == "after"]
    if when == "before" and (any(line["when"] == when for line in known) or trainer.resumes):
        return
    if samples.prompts:
        with isolated_rng():
            asks = [
                {"messages": [{"role": "user", "content": prompt}]} for prompt in samples.prompts
            ]
            texts = [
                render(tokenizer, ask, trainer.recipe.data.chat_template_kwargs) for ask in asks
            ]
            prompts = [
                tokenizer(t, add_special_tokens=not tokenizer.chat_template)["input_ids"]
                for t in texts
            ]
            answers = generate(
                trainer.plain_model(), tokenizer, prompts, Sampling(samples.max_new_tokens)
            )
        kept += [
            {"when": when, "prompt": p, **a.record()}
            for p, a in zip(samples.prompts, answers, strict=True)
        ]
    for line in kept if when == "after" else ():
        cut = "" if line["ended"] else " (cut)"
        trainer.say(f"  {line['when']:>6} | {line['prompt']} -> {line['answer']!r}{cut}")
    path.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), encoding="utf-8"
    )
