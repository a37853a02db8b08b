"""Generation: a conversation as a model sees it, and its responses to a batch of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import screen, upstream
from llmpipe.data.formats import Rejected
from llmpipe.data.template import bounded
from llmpipe.errors import Say, UserError
from llmpipe.models.drawing import replay as replays
from llmpipe.models.drawing.draw import Sampling, draw
from llmpipe.models.drawing.replay import Replay
from llmpipe.models.drawing.token_step import layer_windows
from llmpipe.parallel.parts import device_of
from llmpipe.run.context import tokens_of


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
    replay: Replay | None = None,
) -> list[Response]:
    """Responses to prompts, each a list of token ids, in one batch and in the prompts' order.

    Greedy ones are drawn as `ppo` draws, by `replay` where there is one (of `replayed`): rows that
    have ended are not computed any further, and no token is another one. What samples is
    transformers', whose numbers depend on the whole batch.

    The model is left in the mode it was in. Raises UserError (2) when the longest prompt and the
    new tokens exceed the model's context.
    """
    check_rows(model, tokenizer, prompts)
    _fits_context(model, max(map(len, prompts)), sampling)
    was_training = model.training
    model.eval()
    try:
        answering = f"answering {len(prompts)} prompt{'s' * (len(prompts) > 1)}"
        shown = screen.doing(answering) if streamer is None else nullcontext()
        with upstream.generating(model), shown:
            if streamer is None and draws(model, sampling):
                rows = _greedy(model, tokenizer, prompts, sampling, replay)
            else:
                rows = _generated(model, tokenizer, prompts, sampling, streamer)
    finally:
        model.train(was_training)
    stops = stop_tokens(model, tokenizer)
    return [_response(tokenizer, row, stops) for row in rows]


def replayed(
    model: PreTrainedModel, tokenizer: Tokenizer, sampling: Sampling, say: Say
) -> Replay | None:
    """What keeps the recorded steps of batch after batch, to be handed to `generate`; None where
    nothing would be recorded."""
    devices = set(getattr(causal_of(model), "hf_device_map", {}).values())
    records = model.device.type in replays.DEVICES and len(devices) < 2
    if not records or not draws(model, sampling):
        return None
    ends = stop_tokens(model, tokenizer)
    return Replay(causal_of(model), sampling, ends, tokenizer.pad_token_id, say)


# --- greedy, token by token ---

STANDARD = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_sample")
"""What `generate` does for every architecture that does not override it."""

INPUTS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep"}


def draws(model: Any, sampling: Sampling) -> bool:
    """Whether a response is greedy, and an architecture is given by `draw` what `generate` gives
    it."""
    causal = causal_of(model)
    kind = type(causal)
    standard = all(getattr(kind, name) is getattr(GenerationMixin, name) for name in STANDARD)
    text = causal.config.get_text_config(decoder=True)
    rope = str(getattr(text, "rope_parameters", None))
    return (
        not sampling.temperature
        and standard
        and set(signature(kind.forward).parameters) >= INPUTS
        and layer_windows(causal) is not None
        # positions that follow from the longest text of a batch
        and "dynamic" not in rope
        and "longrope" not in rope
    )


def causal_of(model: Any) -> Any:
    """A model as transformers knows it; its layers hold the adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _greedy(
    model: Any,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    sampling: Sampling,
    replay: Replay | None,
) -> list[list[int]]:
    """The responses' tokens, up to those that end them."""
    unused = torch.zeros(len(prompts), sampling.max_new_tokens, dtype=torch.float64)
    if replay:
        with replay.rollout_begun():
            return [episode.response for episode in replay.draw(prompts, unused)]
    ends, pad = stop_tokens(model, tokenizer), tokenizer.pad_token_id
    drawn = draw(causal_of(model), prompts, unused, sampling, ends, pad)
    return [episode.response for episode in drawn]


# --- by transformers ---


def _generated(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    sampling: Sampling,
    streamer: Any,
) -> list[list[int]]:
    """The responses' tokens, and padding behind those that end them."""
    stops = stop_tokens(model, tokenizer)
    # only where it stops is the model's own: with its sampling or its penalties nothing is greedy
    config = GenerationConfig(
        **sampling.options(),
        eos_token_id=stops or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    input_ids, attention_mask = _left_padded(prompts, width, pad, device_of(model))
    with _configured_by(config, model):
        rows = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            streamer=streamer,
        )
    tokens: list[list[int]] = rows[:, width:].tolist()
    return tokens


@contextmanager
def _configured_by(config: GenerationConfig, model: Any) -> Iterator[None]:
    """Let `config` alone decide: transformers fills what it leaves open from the model's own."""
    holder = causal_of(model)
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
    """The ids that end a response of the model's; the tokenizer's end token where it names none,
    and none where that has none either."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return []
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
