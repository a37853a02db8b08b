"""vLLM as a reader of model folders, and of adapters on their base, where it is installed.

It runs in a process of the Python that has it (`run.interpreters`), which is seldom
llmpipe's: the script there is `upstream/vllm_reader.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llmpipe import upstream
from llmpipe.errors import Say
from llmpipe.export.ask import until_stop
from llmpipe.export.source import Source
from llmpipe.export.tensors import refuse
from llmpipe.faults import reading
from llmpipe.models.adapters import WEIGHTS
from llmpipe.run.context import tokens_of
from llmpipe.run.folders import ADAPTER
from llmpipe.run.interpreters import environment_of
from llmpipe.run.probe import (
    ANSWER_TOKENS,
    DATE,
    DECIMALS,
    Probe,
    Said,
    agreement_of,
    as_clients_say,
)
from llmpipe.ties import die_with_parent

SCRIPT = Path(upstream.__file__).with_name("vllm_reader.py")

ROW = 1024
"""Tokens of a row that is measured at most; longer questions of the probe have room as well."""


class Unread(Exception):
    """vLLM does not take what it is given, or fails at it, in its own words."""


def leaving_room(source: Source) -> Source:
    """The source without the questions that fill its context: vLLM wants room for a token more."""
    context = tokens_of(source.model.config.to_dict())
    if context is None:
        return source
    said = [
        replace(one, continuation=[])
        if len(one.tokens) + max(len(one.continuation), ANSWER_TOKENS) >= context
        else one
        for one in source.probe.said
    ]
    return replace(source, probe=replace(source.probe, said=said))


class VLLM:
    """A folder in vLLM, on whatever device that computes."""

    def __init__(self, python: str, folder: Path, source: Source, dtype: torch.dtype | None):
        """`dtype`: to compute in; None leaves it to the folder, where weights have few bits.

        Raises Unread where vLLM does not take the folder, and UserError (3) where it takes an
        adapter and does not apply all of it.
        """
        self.source = source
        self.computes_in = dtype or torch.bfloat16
        self.folder = folder
        self.is_adapter = (folder / ADAPTER).exists()
        self.tensors = 0
        self.room = tempfile.TemporaryDirectory()
        self.errors = Path(self.room.name) / "errors.txt"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [python, str(SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment_of(python),
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        try:
            self.name: str = self._ask(self._order(dtype))["name"]
        except BaseException:
            self.close()
            raise

    def _order(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """What is read, as `vllm_reader` takes it."""
        base, folder = self.source.base, str(self.folder)
        longest = max(len(said.tokens) + len(said.continuation) for said in self.source.probe.said)
        context = tokens_of(self.source.model.config.to_dict())
        needed = max(ROW, longest + ANSWER_TOKENS) + 1
        return {
            "model": str(base) if self.is_adapter else folder,
            "adapter": folder if self.is_adapter else None,
            "tokenizer": folder,  # a base may have none, or no template
            "dtype": str(dtype).removeprefix("torch.") if dtype else "auto",
            "tokens": min(needed, context) if context else needed,
        }

    def _ask(self, asked: dict[str, Any]) -> Any:
        """Raises Unread where vLLM fails at it, or has ended."""
        assert self.process.stdin and self.process.stdout
        answer = b""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(asked).encode() + b"\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if not answer:
            raise Unread(self._last_words())
        said = json.loads(answer)
        if "error" in said:
            raise Unread(said["error"])
        return said

    def _last_words(self) -> str:
        """Of a process that has ended."""
        code = self.process.wait()
        said = self.errors.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(said) if line.strip()), "and said nothing")
        return f"it ended with {code}: {last}"

    # --- the probe ---

    def probe(self) -> Probe:
        """As its users get it: by its chat, its tokenizer, and what it takes for the end."""
        stops = self._ask({"stops": self.source.probe.stops})["stops"]
        return self._probe(stops, adapted=True)

    def _probe(self, stops: list[int], *, adapted: bool) -> Probe:
        expected = self.source.probe.said
        # nothing is asked that exceeds the model's context, and what a template refuses is
        questions = [
            None if said.tokens and not said.continuation else self._question(said)
            for said in expected
        ]
        asked = [question for question in questions if question]
        heard = iter(self._ask({"questions": asked, "adapted": adapted})["said"])
        said = [
            _said(before, next(heard), stops) if question else before
            for before, question in zip(expected, questions, strict=True)
        ]
        return Probe(precision=str(self.computes_in), stops=stops, said=said)

    def _question(self, said: Said) -> dict[str, Any]:
        question = said.question
        has_template = bool(self.source.tokenizer.chat_template)
        return {
            "messages": [as_clients_say(message) for message in question.messages],
            "tools": question.tools,
            # without a template there is no chat, and the text of it is what was made here
            "text": question.text if has_template else said.text,
            "kwargs": DATE | self.source.template_kwargs,
            "continuation": said.continuation,
            "answer_tokens": ANSWER_TOKENS,
        }

    def refuse_unapplied(self, most: float, say: Say) -> None:
        """Raise UserError (3) where not every number of an adapter is in vLLM's layers.

        `most`: nats that rounding explains; what the base alone says has to be further away, or
        it is said that the questions do not tell the two from one another.
        """
        with reading(self.folder / WEIGHTS, "safetensors", Exception):
            written = load_file(self.folder / WEIGHTS).values()
        numbers = sum(int(tensor.count_nonzero()) for tensor in written)
        applied = self._ask({"applied": True})["applied"]
        if not applied or applied != numbers:
            refuse(f"{self.name} applied {applied:,} of {numbers:,} numbers of the adapter")
        self.tensors = len(written)
        bare = agreement_of(self.source.probe, self._probe([], adapted=False))
        away = f"the base alone is {bare.log_prob_difference:.2g} nats away"
        if bare.log_prob_difference <= most:
            away += f", which rounding may be as well (up to {most:.2g}): the questions tell little"
        say(f"adapter, {self.name}: all of {len(written)} tensors are in its layers; {away}")

    # --- predictions ---

    def predicts(self, ids: list[int]) -> Tensor:
        file = Path(self.room.name) / "logits.safetensors"
        self._ask({"ids": ids, "file": str(file)})
        with reading(file, "safetensors", Exception):
            return load_file(file)["logits"]

    def close(self) -> None:
        self.process.kill()
        with suppress(BrokenPipeError):
            self.process.communicate()
        self.room.cleanup()


def _said(expected: Said, heard: dict[str, Any] | None, stops: list[int]) -> Said:
    """What vLLM made of a question, which is the text of its tokens."""
    if heard is None:
        heard = {"text": None, "tokens": [], "answer": [], "margins": [], "words": ""}
    same = heard["tokens"] == expected.tokens
    answer, margins = until_stop(tuple(heard["answer"]), tuple(heard["margins"]), stops)
    return Said(
        question=expected.question,
        text=expected.text if same else heard["text"],
        tokens=heard["tokens"],
        continuation=expected.continuation if heard["tokens"] else [],
        log_probs=[round(value, DECIMALS) for value in heard.get("log_probs", [])],
        answer=answer,
        margins=[round(value, DECIMALS) for value in margins],
        words=heard["words"],
    )
