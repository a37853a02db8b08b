"""The recipe's prompts, answered before and after training."""

from __future__ import annotations

import json
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.files.json import json_lines
from llmpipe.files.writing import write_whole
from llmpipe.models.drawing.draw import Sampling
from llmpipe.models.generate import generate, render
from llmpipe.models.rng import isolated_rng
from llmpipe.parallel.parts import is_sharded, looking
from llmpipe.parallel.world import World
from llmpipe.run.artifact import Artifact
from llmpipe.training.training import Trained

When = Literal["before", "after"]


def answer_samples(trainer: Trained, tokenizer: Tokenizer, when: When) -> None:
    """Answer the recipe's prompts and add them to samples.jsonl as `when`; answers stay.

    Collective.
    """
    if when == "before" and trainer.resumes:
        return
    writes = trainer.is_world_process_zero()
    if writes or is_sharded(trainer.plain_model()):
        answers = _answers(trainer, tokenizer, when)
    World(trainer.accelerator).wait()
    if not writes:
        return
    path = trainer.artifact.path / "samples.jsonl"
    there = json_lines(path) if when == "after" and path.exists() else []
    lines = [line for line in there if line["when"] == "before"] + answers
    if when == "after":
        for line in lines:
            cut = "" if line["ended"] else " (cut)"
            trainer.say(f"  {line['when']:>6} | {line['prompt']} -> {line['answer']!r}{cut}")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(path, text.encode())  # whole at any moment: checkpoints know what it begins with


def samples_size(artifact: Artifact) -> dict[str, int]:
    """Bytes of samples.jsonl, by its name; nothing where there are none."""
    path = artifact.path / "samples.jsonl"
    return {path.name: path.stat().st_size} if path.exists() else {}


def _answers(trainer: Trained, tokenizer: Tokenizer, when: When) -> list[dict[str, Any]]:
    """Lines of samples.jsonl: a prompt and its greedy answer each."""
    prompts = trainer.recipe.samples.prompts
    if not prompts:
        return []
    model = trainer.plain_model()
    with isolated_rng(), looking(model):
        batch = [_encode(trainer, tokenizer, prompt) for prompt in prompts]
        sampling = Sampling(trainer.recipe.samples.max_new_tokens)
        responses = generate(model, tokenizer, batch, sampling)
    pairs = zip(prompts, responses, strict=True)
    return [{"when": when, "prompt": prompt, **response.record()} for prompt, response in pairs]


def _encode(trainer: Trained, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt as the model sees it, up to where its answer begins."""
    conversation = {"messages": [{"role": "user", "content": prompt}]}
    kwargs = trainer.recipe.data.preparation.template_kwargs
    text = render(tokenizer, conversation, kwargs)
    encoded = tokenizer(text, add_special_tokens=not tokenizer.chat_template)
    return list(encoded["input_ids"])
