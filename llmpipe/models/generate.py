"""Generation: a conversation as a model sees it, and its responses to a batch of prompts."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import upstream
from llmpipe.data.formats import Rejected
from llmpipe.data.template import bounded
from llmpipe.errors import UserError
from llmpipe.run.context import tokens_of


@contextmanager
def isolated_rng(seed: int = 0) -> Iterator[None]:
    """Run with fresh generators; those of Python, NumPy and torch come out as they went in."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


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


@dataclass(frozen=True)
class Response:
    """What a model generated after a prompt."""

    text: str
    """Without special tokens."""
    tokens: int
    """How many were generated, with the one that ended it."""
    ended: bool
    """Whether a stop token ended it, and not the limit of new tokens."""

    def record(self) -> dict[str, Any]:
        """As a line of samples.jsonl has it."""
        return {"answer": self.text, "tokens": self.tokens, "ended": self.ended}


def render(
    tokenizer: Tokenizer,
    ask: dict[str, Any],
    template_kwargs: dict[str, Any] | None = None,
    tools: list[dict] | None = None,
    *,
    open_turn: bool = True,
) -> str:
    """A conversation as the model sees it, up to where its response begins.

    `ask`: {"text": str}, which no template touches, or {"messages": [...]}, whose contents are
    joined by empty lines when the tokenizer has no template. Raises UserError (2) when the template
    refuses the conversation, or is refused itself for what it does.
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
def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    sampling: Sampling,
    streamer: Any = None,
) -> list[Response]:
    """Responses to prompts, each a list of token ids, in one batch and in the prompts' order.

    The model is left in the mode it was in. Raises UserError (2) when the longest prompt and the
    new tokens exceed the model's context.
    """
    width = max(map(len, prompts))
    check_rows(model, tokenizer, prompts)
    _fits_context(model, width, sampling)
    stops = stop_tokens(model, tokenizer)
    # only where it stops is the model's own: with its sampling or its penalties nothing is greedy
    config = GenerationConfig(
        **sampling.options(),
        eos_token_id=stops if len(stops) > 1 else stops[0],
        pad_token_id=tokenizer.pad_token_id,
    )
    input_ids, attention_mask = _left_padded(prompts, width, tokenizer.pad_token_id, model.device)
    was_training = model.training
    model.eval()
    try:
        with upstream.generating(model), _configured_by(config, model):
            rows = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=config,
                streamer=streamer,
            )
    finally:
        model.train(was_training)
    return [_response(tokenizer, row, stops) for row in rows[:, width:].tolist()]


@contextmanager
def _configured_by(config: GenerationConfig, model: Any) -> Iterator[None]:
    """Let `config` alone decide: transformers fills what it leaves open from the model's own."""
    holder = getattr(model, "get_base_model", lambda: model)()  # of an adapter
    of_model = holder.generation_config
    holder.generation_config = config
    try:
        yield
    finally:
        holder.generation_config = of_model


def check_rows(
    model: PreTrainedModel, tokenizer: Tokenizer, sequences: Iterable[list[int]]
) -> None:
    """Raise UserError (2) for a token that the model has no row for, since its tokenizer is longer:
    an IndexError, or on a GPU an assertion of the device.
    """
    rows: int = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= rows:
        return
    beyond = next((token for ids in sequences for token in ids if token >= rows), None)
    if beyond is not None:
        shown = tokenizer.convert_ids_to_tokens(beyond)
        raise UserError(
            f"the tokenizer has {len(tokenizer):,} tokens and the model {rows:,} rows of "
            f"embeddings: there is none for {shown}, which the text holds",
            "a stage that trains it gives it these rows, and a model with them can be measured",
        )


def stop_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """The ids that end a response of the model's; the tokenizer's end token where it names none."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    return ids if isinstance(ids, list) else [ids]


def _fits_context(model: PreTrainedModel, width: int, sampling: Sampling) -> None:
    context = tokens_of(model.config.to_dict())
    new = sampling.max_new_tokens
    if context and width + new > context:
        problem = (
            f"a prompt of {width:,} tokens and {new:,} new ones exceed the model's {context:,}"
        )
        raise UserError(problem, "lower max_new_tokens, or shorten the prompt")


def _left_padded(
    prompts: list[list[int]], width: int, pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 [prompts, width] each."""
    padding = [width - len(prompt) for prompt in prompts]
    pairs = list(zip(padding, prompts, strict=True))
    ids = [[pad] * missing + prompt for missing, prompt in pairs]
    mask = [[0] * missing + [1] * len(prompt) for missing, prompt in pairs]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _response(tokenizer: Tokenizer, generated: list[int], stops: list[int]) -> Response:
    end = next((place for place, token in enumerate(generated) if token in stops), None)
    text = tokenizer.decode(generated[:end], skip_special_tokens=True)
    tokens = len(generated) if end is None else end + 1
    return Response(text, tokens, ended=end is not None)
