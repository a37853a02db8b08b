"""Whether generation writes several lines, and stops where a turn ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.data.tokenizer import SEVERAL_LINES
from llmpipe.errors import UserError
from llmpipe.faults import reading
from llmpipe.models.generate import render
from llmpipe.models.pretrained import take_generation
from llmpipe.models.rng import isolated_rng
from llmpipe.models.verify.logits import probe_of
from llmpipe.models.verify.saved import refuse

PROMPT_TOKENS = 8

LINES = "One:\n\n- two\n- three"  # few, since they are generated

NOT_UNDERSTOOD = (ValueError, TypeError, ImportError)
"""What transformers raises of a generation configuration."""

ONE_BY_ONE = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "cache_implementation": None,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
"""How one answer is generated token by token, whatever a saved configuration says of that."""


def stops_as_saved(model: Any, tokenizer: Tokenizer, folder: Path) -> int | list[int] | None:
    """Where a model stops that generates as the folder says; None of one that does not generate."""
    if not model.can_generate():
        return None
    configured = model.generation_config
    was_training = model.training
    take_generation(model, folder)
    model.eval()
    try:
        return stops_of(model, tokenizer)
    finally:
        model.generation_config = configured
        model.train(was_training)


def stops_of(model: PreTrainedModel, tokenizer: Tokenizer) -> int | list[int] | None:
    """Where generation stops as it is configured in the saved folder: seen at every stop token,
    behind several lines, and nowhere within these.
    """
    stops_at: int | list[int] | None = model.generation_config.eos_token_id
    stops = stops_at if isinstance(stops_at, list) else [stops_at]
    if tokenizer.eos_token_id not in stops:
        refuse("generation does not stop at the end of a turn")
    ordinary = tokenizer(SEVERAL_LINES, add_special_tokens=False)["input_ids"]
    for token in stops:
        if token in ordinary:
            shown = repr(tokenizer.decode([token]))
            refuse(f"generation would stop at {shown}, which ordinary text holds")
    _check_turn(tokenizer, stops)
    other = next(i for i in range(len(stops) + 1) if i not in stops)
    lines = tokenizer(LINES, add_special_tokens=False)["input_ids"] or [other] * 2
    for token in stops:
        words = [*lines, token, other]
        said = _forced(model, tokenizer, words)
        if said == words:
            refuse("generation does not stop at the end of a turn")
        if said != words[:-1]:
            last = repr(tokenizer.decode(said[-1:]))
            refuse(f"generation of several lines stops at {last}, not at the end of a turn")
    return stops_at


def _check_turn(tokenizer: Tokenizer, stops: list[Any]) -> None:
    """In a conversation, as the saved template writes it, a stop token stands behind the
    assistant's lines, and none within them.
    """
    if not tokenizer.chat_template:
        return
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": LINES}]
    try:
        text = render(tokenizer, {"messages": turns}, open_turn=False)
    except UserError:
        return  # it takes other conversations
    begin = text.rfind(LINES)
    if begin < 0:
        return
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    at_stops = [start - begin for token, (start, _) in places if token in stops]
    if any(0 <= place < len(LINES) for place in at_stops):
        refuse("generation would stop within an assistant's turn of several lines")
    if not any(place >= len(LINES) for place in at_stops):
        refuse("generation does not stop at what ends the assistant's turns")


def _forced(model: PreTrainedModel, tokenizer: Tokenizer, words: list[int]) -> list[int]:
    """What is generated as the saved folder configures it where only `words` are allowed."""
    prompt = probe_of(model, tokenizer)[:, :PROMPT_TOKENS]
    size = prompt.shape[1]

    def only_allowed(_: int, ids: torch.Tensor) -> list[int]:
        return [words[min(len(ids) - size, len(words) - 1)]]

    as_saved = reading("generation_config.json", "a generation configuration", *NOT_UNDERSTOOD)
    with isolated_rng(), torch.no_grad(), as_saved:
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(words),
            prefix_allowed_tokens_fn=only_allowed,
            tokenizer=tokenizer,  # where the configuration stops at texts
            **ONE_BY_ONE,
        )
    said: list[int] = output[0, size:].tolist()
    return said
