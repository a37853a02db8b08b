"""`transformers serve` around a model that is in memory already, with what it leaves open settled.

transformers' own command loads a model by its name, knows no adapters, and

- passes over fields of a request that it does not support; here they are refused;
- drops the name of a tool and the words beside a call, which the template may write; they are kept;
- takes a temperature without sampling by it, unless the model's own configuration samples;
- fails where a call is cut off, which is given back as text, and at a bias that is a whole number;
- lets anybody unload the model (`/reset`), and fails at `/v1/models` without a Hub cache.

Requests are answered one after the other: its continuous batching takes the sampling of the first
request for all that follow.

Needs fastapi and openai: pip install 'llmpipe[serve]'.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler, GenerationState, Modality

NEVER = -1
"""Seconds after which an idle model is unloaded."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto",),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
    "audio": (),
    "function_call": (),
    "functions": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
}
"""Fields that would change an answer and are not supported, with what they may say all the same.
`frequency_penalty` would be taken for a repetition penalty, which is another thing."""


@dataclass(frozen=True)
class Terms:
    """How a model is served."""

    name: str
    template_kwargs: dict[str, Any]
    """Variables of the chat template in training."""
    stops: list[int]
    """Tokens that end an answer."""
    writes_calls: bool
    """Whether the template has calls of tools in `<tool_call>` and JSON."""


def application(model: Any, tokenizer: Tokenizer, terms: Terms) -> FastAPI:
    """The application of `transformers serve` for one model, or PEFT's model of one."""
    _configure(model, tokenizer, terms)
    manager = _Manager(model, tokenizer, terms.name)
    state = GenerationState()
    chat = _Chat(manager, state, terms.template_kwargs)
    completion = _Completion(manager, state)
    # whoever stands before it lets nobody through to the others
    app = build_server(
        manager,
        chat,
        completion_handler=completion,
        response_handler=None,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    app.add_exception_handler(HTTPException, _refusal)
    return app


async def _refusal(_: Request, error: HTTPException) -> JSONResponse:
    """In OpenAI's form, whose client shows the message."""
    said = {"message": str(error.detail), "type": "invalid_request_error", "code": None}
    return JSONResponse({"error": said}, error.status_code)


def _configure(model: Any, tokenizer: Tokenizer, terms: Terms) -> None:
    """Where an answer ends, how it is drawn where the client does not say, what a call is."""
    config = model.generation_config
    config.eos_token_id = terms.stops or None
    config.pad_token_id = tokenizer.pad_token_id
    config.do_sample = True  # which a temperature of 0 turns off
    config.temperature = config.temperature or 1.0
    config.top_p = config.top_p or 1.0
    config.top_k = config.top_k or 0
    opening = _opening(tokenizer, terms.template_kwargs) if terms.writes_calls else ""
    if opening and getattr(tokenizer, "response_template", None) is None:
        tokenizer.response_template = _calls_in_json(tokenizer, terms.stops, opening)
        tokenizer.parse_response = partial(_parsed, tokenizer, tokenizer.parse_response)


def _opening(tokenizer: Tokenizer, template_kwargs: dict[str, Any]) -> str:
    """What a template writes where an answer begins."""
    asked, opened = (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}],
            tokenize=False,
            add_generation_prompt=opens,
            **template_kwargs,
        )
        for opens in (False, True)
    )
    return str(opened).removeprefix(asked)


def _calls_in_json(tokenizer: Tokenizer, stops: list[int], opening: str) -> dict[str, Any]:
    """How an answer is read whose calls are JSON in `<tool_call>`."""
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": opening,
        "fields": {
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {
                "close": tokenizer.convert_ids_to_tokens(stops),
                "content": "text",
                "content_args": {"strip": False},
            },
        },
    }


def _parsed(tokenizer: Tokenizer, parse: Any, answer: Any, *terms: Any, **more: Any) -> Any:
    """An answer with its calls; all of it as text where one of them is cut off or no JSON."""
    try:
        message = parse(answer, *terms, **more)
        for call in message.get("tool_calls") or []:
            if not {"name", "arguments"} <= set(call["function"]):
                raise ValueError("a call without a name or arguments")
        return message
    except (ValueError, TypeError):
        return {"content": tokenizer.decode(answer, skip_special_tokens=True)}


class _Manager(ModelManager):
    """Has one model, and never another."""

    def __init__(self, model: Any, tokenizer: Tokenizer, name: str):
        super().__init__(device=str(model.device))
        self.force_model = name
        self.model_timeout = NEVER
        held = TimedModel(model, timeout_seconds=NEVER, processor=tokenizer)
        self.loaded_models[self.process_model_name(name)] = held
        self._since = int(time.time())

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """What /v1/models lists."""
        known = {"object": "model", "created": self._since, "owned_by": "llmpipe"}
        return [{"id": self.force_model} | known]


class _Refuses(BaseHandler):
    """Refuses what it would pass over, and calls the model as clients do."""

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Tokenizer]:
        _, model, tokenizer = super()._resolve_model(body)
        return self.model_manager.force_model, model, tokenizer

    def _validate_request(self, body: dict[str, Any]) -> None:
        for name, neutral in NEUTRAL.items():
            value = body.pop(name, None)
            if value is not None and value not in neutral:
                raise HTTPException(400, f"{name}: {value!r} is not supported by this server")
        super()._validate_request(body)


class _Chat(_Refuses, ChatCompletionHandler):
    def _validate_request(self, body: dict[str, Any]) -> None:
        if bias := body.get("logit_bias"):
            body["logit_bias"] = {token: float(value) for token, value in bias.items()}
        super()._validate_request(body)

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        try:
            return await super().handle_request(body, request_id)
        except TemplateError as error:
            raise HTTPException(400, f"the chat template refuses this: {error}") from None

    @staticmethod
    def get_processor_inputs_from_messages(
        messages: list[dict[str, Any]], modality: Modality
    ) -> list[dict[str, Any]]:
        """Messages as the template takes them."""
        inputs = ChatCompletionHandler.get_processor_inputs_from_messages(messages, modality)
        names = {
            call.get("id"): call.get("function", {}).get("name")
            for message in messages
            for call in message.get("tool_calls") or []
        }
        for message, taken in zip(messages, inputs, strict=True):
            words = message.get("content")
            if "tool_calls" in message and isinstance(words, str):
                taken["content"] = words
            name = message.get("name") or names.get(message.get("tool_call_id"))
            if name and message["role"] == "tool":
                taken["name"] = name
            if message.get("reasoning_content"):
                taken["reasoning_content"] = message["reasoning_content"]
        return inputs


class _Completion(_Refuses, CompletionHandler):
    def _validate_request(self, body: dict[str, Any]) -> None:
        if body.get("logit_bias"):
            raise HTTPException(400, "logit_bias: is supported for chats alone")
        super()._validate_request(body)
