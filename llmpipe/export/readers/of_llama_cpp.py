"""llama.cpp as a reader of GGUF files, by llama-cpp-python, and as what quantizes them.

Imported only where it is installed: pip install 'llmpipe[gguf]'.
"""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from torch import Tensor

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.export.ask import until_stop
from llmpipe.export.source import Source
from llmpipe.export.tensors import refuse
from llmpipe.export.vocabulary import battery_of
from llmpipe.run.probe import ANSWER_TOKENS, DATE, DECIMALS, Probe, Question, Said
from llmpipe.upstream.llama_cpp_weights import leave_as_in_file

CONTEXT = 1024
"""Tokens of a row that is measured at most; longer questions of the probe have room as well."""


@llama_cpp.llama_log_callback
def _silent(*_: Any) -> None:
    """What llama.cpp logs of every tensor, it logs to nobody."""


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU."""

    computes_in = torch.float16
    """Of keys and values, whatever the file has."""

    def __init__(self, file: Path, source: Source, tensors: int):
        """Raises UserError (3) where llama.cpp does not load the file, or splits texts otherwise
        than the tokenizer."""
        leave_as_in_file()
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        self.name = f"llama.cpp ({version('llama_cpp_python')})"
        self.tensors = tensors
        self.source = source
        longest = max(len(said.tokens) + len(said.continuation) for said in source.probe.said)
        try:
            self.llama: Any = llama_cpp.Llama(
                str(file),
                n_ctx=max(CONTEXT, longest) + ANSWER_TOKENS,
                logits_all=True,
                n_threads=torch.get_num_threads(),
                n_threads_batch=torch.get_num_threads(),
                n_gpu_layers=0,
                swa_full=True,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            problem = f"{file.name}: llama.cpp does not load it: {error}"
            raise UserError(problem, code=INTEGRITY) from None
        self._refuse_another_vocabulary()

    def _refuse_another_vocabulary(self) -> None:
        """Raise UserError (3) for a text of the battery that becomes other tokens."""
        pre = self.llama.metadata.get("tokenizer.ggml.pre")
        for text in battery_of(self.source.tokenizer):
            ours = self.source.tokenizer(text, add_special_tokens=False)["input_ids"]
            theirs = self.llama.tokenize(text.encode(), add_bos=False, special=True)
            if ours != theirs:
                at = next(
                    (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                    min(len(ours), len(theirs)),
                )
                refuse(
                    f"the pre-tokenizer {pre} splits {text!r:.60} otherwise: from token {at} on "
                    f"{ours[at : at + 5]} here, {theirs[at : at + 5]} in llama.cpp"
                )

    def probe(self) -> Probe:
        vocabulary = llama_cpp.llama_model_get_vocab(self.llama.model)
        stops = [
            token
            for token in range(self.llama.n_vocab())
            if llama_cpp.llama_vocab_is_eog(vocabulary, token)
        ]
        said = [self._said(expected, stops) for expected in self.source.probe.said]
        return Probe(precision="llama.cpp", stops=stops, said=said)

    def _said(self, expected: Said, stops: list[int]) -> Said:
        """What llama.cpp makes of a question, which is answered where the source answered it."""
        question = expected.question
        text = self._written(question)
        templated = question.text is None and self.source.tokenizer.chat_template
        tokens = self._tokens(text, bare=not templated) if text is not None else []
        continuation = expected.continuation if tokens else []
        log_probs: list[float] = []
        answer: list[int] = []
        margins: list[float] = []
        if continuation:
            behind = self.predicts(tokens + continuation)[len(tokens) - 1 : -1].log_softmax(-1)
            chosen = behind.gather(1, torch.tensor(continuation)[:, None])
            log_probs = [round(value, DECIMALS) for value in chosen.squeeze(1).tolist()]
            answer, margins = self._answer(tokens, self.source.probe.stops)
        words = [token for token in answer if token not in stops]
        return Said(
            question=question,
            text=text,
            tokens=tokens,
            continuation=continuation,
            log_probs=log_probs,
            answer=answer,
            margins=margins,
            words=self.llama.detokenize(words).decode(errors="replace"),
        )

    def _written(self, question: Question) -> str | None:
        """A question as the file's template writes it in llama-cpp-python's engine."""
        if question.text is not None:
            return question.text
        template = self.llama.metadata.get("tokenizer.chat_template")
        if template is None:
            plain = "\n\n".join(turn["content"] for turn in question.messages)
            return None if question.tools else plain
        bos, eos = (
            self.llama._model.token_get_text(token) if token != -1 else ""
            for token in (self.llama.token_bos(), self.llama.token_eos())
        )
        formatter = Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)
        messages: Any = question.messages
        tools: Any = question.tools
        try:
            prompt: str = formatter(messages=messages, tools=tools, **DATE).prompt
        except Exception:  # whatever a template raises, it refuses the conversation
            return None
        return prompt

    def _tokens(self, text: str, *, bare: bool) -> list[int]:
        tokens: list[int] = self.llama.tokenize(text.encode(), add_bos=bare, special=True)
        return tokens

    def _answer(self, tokens: list[int], stops: list[int]) -> tuple[list[int], list[float]]:
        """The likeliest answer, and by how much each token is the likeliest."""
        self.llama.reset()
        self.llama.eval(tokens)
        answer: list[int] = []
        margins: list[float] = []
        while len(answer) < ANSWER_TOKENS and not (answer and answer[-1] in stops):
            if answer:
                self.llama.eval(answer[-1:])
            last = torch.from_numpy(self.llama.scores[self.llama.n_tokens - 1])
            best = last.topk(2)
            answer.append(int(best.indices[0]))
            margins.append(round(float(best.values[0] - best.values[1]), DECIMALS))
        return until_stop(tuple(answer), tuple(margins), stops)

    def predicts(self, ids: list[int]) -> Tensor:
        self.llama.reset()
        self.llama.eval(ids)
        logits = torch.from_numpy(np.array(self.llama.scores[: len(ids)], dtype=np.float32))
        return logits

    def close(self) -> None:
        self.llama.close()


def quantize(whole: Path, file: Path, numbers: str) -> None:
    """Write a GGUF file of fewer bits of one in f32, as llama.cpp mixes them. Raises UserError
    (3)."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{numbers.upper()}")
    options.nthread = torch.get_num_threads()
    code = llama_cpp.llama_model_quantize(
        str(whole).encode(), str(file).encode(), ctypes.byref(options)
    )
    if code:
        problem = f"{file.name}: llama.cpp could not quantize it (code {code})"
        raise UserError(problem, code=INTEGRITY)
