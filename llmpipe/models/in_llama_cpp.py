"""A GGUF file that answers, in llama.cpp.

Imported only where it is installed: pip install 'llmpipe[gguf]'.
"""

from __future__ import annotations

import codecs
import ctypes
import os
from pathlib import Path
from typing import Any

import llama_cpp
import torch
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.models.drawing.draw import Sampling
from llmpipe.models.generate import Response
from llmpipe.run.gguf import check_gguf
from llmpipe.upstream.llama_cpp_weights import leave_as_in_file

WHOLE = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
"""All of the model's distribution, as others draw from it."""


@llama_cpp.llama_log_callback
def _silent(*_: Any) -> None:
    """What llama.cpp logs of every tensor, it logs to nobody."""


class LlamaCpp:
    """A file in llama.cpp, with the template that it holds."""

    def __init__(self, file: Path, template_kwargs: dict[str, Any], seed: int):
        """Raises UserError (3) where llama.cpp does not load it."""
        leave_as_in_file()
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        threads = len(os.sched_getaffinity(0))
        options: dict[str, Any] = {
            "n_gpu_layers": -1 if torch.cuda.is_available() else 0,
            "n_threads": threads,
            "n_threads_batch": threads,
            "seed": seed,
            "verbose": False,
        }
        try:
            context = check_gguf(file).context
            self.llama: Any = llama_cpp.Llama(str(file), n_ctx=context, **options)
        except (ValueError, RuntimeError) as error:
            problem = f"{file}: llama.cpp does not load it: {error}"
            raise UserError(problem, code=INTEGRITY) from None
        self.template = self.llama.metadata.get("tokenizer.chat_template")
        self.template_kwargs = template_kwargs

    @property
    def context(self) -> int:
        return int(self.llama.n_ctx())

    def written(self, turns: list[dict[str, str]]) -> str:
        """A conversation by the file's template. Raises UserError (2) where it refuses."""
        if self.template is None:
            return "\n\n".join(turn["content"] for turn in turns)
        tokens = (self.llama.token_bos(), self.llama.token_eos())
        bos, eos = (
            self.llama._model.token_get_text(token) if token >= 0 else "" for token in tokens
        )
        formatter = Jinja2ChatFormatter(self.template, eos_token=eos, bos_token=bos)
        messages: Any = turns
        try:
            prompt: str = formatter(messages=messages, **self.template_kwargs).prompt
        except Exception as error:  # whatever a template raises, it refuses the conversation
            raise UserError(f"the chat template refuses the conversation: {error}") from None
        return prompt

    def tokens(self, text: str) -> list[int]:
        # a template writes the special tokens itself
        bare = self.template is None
        ids: list[int] = self.llama.tokenize(text.encode(), add_bos=bare, special=True)
        return ids

    def answer(self, ids: list[int], sampling: Sampling, stream: bool) -> Response:
        """What comes behind them, up to a token that ends an answer."""
        vocabulary = llama_cpp.llama_model_get_vocab(self.llama.model)
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        said: list[int] = []
        words: list[str] = []
        ended = False
        for token in self.llama.generate(ids, temp=sampling.temperature, **WHOLE):
            ended = llama_cpp.llama_vocab_is_eog(vocabulary, token)
            piece = b"" if ended else self.llama.detokenize([token], prev_tokens=ids + said)
            said.append(token)
            words.append(text.decode(piece))
            if stream:
                print(words[-1], end="", flush=True)
            if ended or len(said) == sampling.max_new_tokens:
                break
        words.append(text.decode(b"", final=True))
        if stream:
            print(words[-1], flush=True)
        return Response("".join(words), len(said), ended)
