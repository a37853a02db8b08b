"""The server of llama-cpp-python around one GGUF file, with what it leaves open settled.

Left to itself it

- ends a stream when another request comes, and all of them at a signal;
- has a penalty of repetition and cuts off rare tokens, where the client says nothing of it: words
  are others than the model's likeliest;
- reads another configuration where the environment names one (`CONFIG_FILE`);
- hands the arguments of a call to the template as the text that clients send, which a template that
  writes JSON puts in quotes once more; here they are what the text says.

Needs llama-cpp-python and what its server does: pip install 'llmpipe[serve,gguf]'.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from llama_cpp.llama_chat_format import get_chat_completion_handler
from llama_cpp.server import types
from sse_starlette.sse import AppStatus

from llmpipe.upstream.llama_cpp_weights import leave_as_in_file

DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
"""Of a request that says nothing of it, as OpenAI has them: all of the model's distribution."""

for _kind in (types.CreateCompletionRequest, types.CreateChatCompletionRequest):
    for _name, _value in DEFAULTS.items():
        _kind.model_fields[_name].default = _value
    _kind.model_rebuild(force=True)


def application(
    file: str, name: str, template_kwargs: dict[str, Any], context: int, on_gpu: bool
) -> Any:
    """What answers, with memory for `context` tokens.

    Raises ValueError and RuntimeError where llama.cpp does not load the file.
    """
    from llama_cpp.server import app as server  # which reads the defaults when it is imported
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    leave_as_in_file()
    AppStatus.disable_automatic_graceful_drain()
    os.environ.pop("CONFIG_FILE", None)
    threads = len(os.sched_getaffinity(0))
    model = ModelSettings(
        model=file,
        model_alias=name,
        n_ctx=context,
        n_gpu_layers=-1 if on_gpu else 0,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=False,
        chat_template_kwargs=template_kwargs or None,
        verbose=False,
    )
    settings = ServerSettings(interrupt_requests=False)
    app = server.create_app(server_settings=settings, model_settings=[model])
    llama = server._llama_proxy(name)
    of_file = llama._chat_handlers.get(llama.chat_format)
    llama.chat_handler = _reading(of_file or get_chat_completion_handler(llama.chat_format))
    return app


def _reading(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler of chats that is given the arguments of calls as they are meant."""

    def handle(*, messages: list[dict[str, Any]], **more: Any) -> Any:
        return handler(messages=[_meant(message) for message in messages], **more)

    return handle


def _meant(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        with suppress(ValueError, TypeError):
            function["arguments"] = json.loads(function["arguments"])
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}
