"""The probe by HTTP: what a server answers, held against what the model said when it was published.

A question goes the way of any client's: its conversation and tools to chat completions, a text to
completions. Compared are

- how many tokens the server made of the question, where it says so: another template, or a second
  token of beginning, is seen by that;
- the likeliest answer, word by word. Where it departs, it has to depart at a token that another one
  was nearly as likely as, by the margin that the manifest keeps: both may have moved by what the
  rounding of the server's precision, of the weights, or of the probe's, explains (`tolerance`);
- what ended it: an answer that a stop token ended is asked with room behind it, and has to end.

Where weights have few bits no margin tells; then half of the answers have to be equal, or as many
as were when it was exported, less two: one may be exported that says fewer, with a warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.faults import reading
from llmpipe.front.serve.asking import CHAT, TEXT, Line, Reply, Unheard, reply_of
from llmpipe.front.serve.named import Served
from llmpipe.run.gguf import CONTROL, TOKEN_TYPES, TOKENS, arrays_of
from llmpipe.run.probe import ANSWER_TOKENS, DATE, Said, as_clients_say, tolerance

BEHIND = 8
"""Tokens that an answer may go on for which a stop token has to end."""

ENGINES_APART = 2
"""Answers in which two engines may depart that read the same weights of few bits."""

Words = Callable[[list[int]], str]
"""What tokens say, special ones left out."""

PART = "\ufffd"
"""What stands for a character of which an answer's last token is a part."""


@dataclass(frozen=True)
class Agreed:
    """How the server answered."""

    equal: int
    nearly: int
    """That depart where two tokens were as likely, as far as the precisions tell."""
    asked: int

    def __str__(self) -> str:
        other = self.asked - self.equal
        ties = ", where two were as likely" if self.nearly else ""
        departs = f"; {other} otherwise{ties}" if other else ""
        return f"{self.equal} of {self.asked} answers equal{departs}"


def agree(line: Line, model: Served, precision: str) -> Agreed:
    """Ask a server the questions of the probe. Raises UserError (3) where it does not answer as the
    model did.

    `precision`: what the server computes in, as far as it says so.
    """
    computed = [precision] if precision else []
    most = tolerance(model.probe, model.layers, model.rounded, *computed)
    words = _words_of(model)
    equal = 0
    departing: list[str] = []
    asked = model.probe.asked
    for said in asked:
        try:
            problem = _departs(line, model, said, words, most)
        except Unheard as error:
            problem = f"the server ended while it was asked '{said.question.name}': {error}"
            raise UserError(problem, code=INTEGRITY) from None
        equal += not problem
        departing += [problem] if problem else []
    if most is None and equal < (least := _least(model)):
        few = f"{equal} of {len(asked)} answers are equal, where {least} have to be"
        raise _refused(f"{few}; {departing[0]}")
    return Agreed(equal, len(departing) if most is not None else 0, len(asked))


def _least(model: Served) -> int:
    """Answers of weights with few bits that have to be equal."""
    half = math.ceil(len(model.probe.asked) / 2)
    if model.as_exported is None:
        return half
    return min(half, max(model.as_exported - ENGINES_APART, 0))


def _words_of(model: Served) -> Words:
    """By the tokenizer of the folder, or the vocabulary of a GGUF file: byte-level BPE, as `export`
    writes no other. Raises UserError (3) for a tokenizer that cannot be read."""
    if model.gguf:
        texts, types = arrays_of(model.gguf, TOKENS, TOKEN_TYPES)
        decoder = ByteLevel()
        return lambda ids: decoder.decode([texts[i] for i in ids if types[i] != CONTROL])
    file = model.folder / "tokenizer.json"
    with reading(file, "tokenizer", Exception, code=INTEGRITY):
        tokenizer = Tokenizer.from_file(str(file))
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def _departs(line: Line, model: Served, said: Said, words: Words, most: float | None) -> str:
    """How an answer departs that may, in words; nothing where it is equal. Raises UserError (3)
    where nothing explains it."""
    name = said.question.name
    reply = _ask(line, model, said)
    if reply.prompt_tokens not in (None, len(said.tokens)):
        numbers = f"{len(said.tokens)} tokens when published, {reply.prompt_tokens} here"
        raise _refused(f"its template writes the question '{name}' otherwise: {numbers}")
    if reply.text != said.words and said.question.tools and model.has_template:
        # a call may have been taken out of the text
        reply = reply_of(line.post(TEXT, _text(model, said)))
    ended = said.answer[-1] in model.probe.stops
    if reply.text.rstrip(PART) == said.words.rstrip(PART):
        if ended and reply.finish == "length":
            raise _refused(f"it does not stop where its answer to '{name}' ended")
        return ""
    at = _same_tokens(reply.text, said.answer[:-1] if ended else said.answer, words)
    margin = said.margins[at] if at < len(said.margins) else math.inf
    problem = f"'{name}': {said.words!r} when published, {reply.text!r} here"
    if most is not None and margin > most:
        reason = f"one token was likelier by {margin:.2g} nats, and {most:.2g} may be rounding"
        raise _refused(f"{problem}; {reason}")
    return problem


def _same_tokens(text: str, answer: list[int], words: Words) -> int:
    """How many of an answer's tokens a text begins with."""
    for count in range(len(answer), 0, -1):
        if text.startswith(words(answer[:count]).rstrip(PART)):
            return count
    return 0


def _refused(problem: str) -> UserError:
    hint = "nobody was let in: what is served is not the model that was published"
    return UserError(f"serve: {problem}", hint, INTEGRITY)


# --- the questions, as clients ask them -----------------------------------------------------------


def _ask(line: Line, model: Served, said: Said) -> Reply:
    if said.question.text is not None or not model.has_template:
        return reply_of(line.post(TEXT, _text(model, said)))
    messages = [as_clients_say(message) for message in said.question.messages]
    body: dict[str, Any] = {"messages": messages, "chat_template_kwargs": DATE}
    if said.question.tools:
        body["tools"] = said.question.tools
    return reply_of(line.post(CHAT, body | _greedily(model, said)))


def _text(model: Served, said: Said) -> dict[str, Any]:
    return {"prompt": said.text} | _greedily(model, said)


def _greedily(model: Served, said: Said) -> dict[str, Any]:
    ended = said.answer[-1] in model.probe.stops
    longest = ANSWER_TOKENS + BEHIND if ended else len(said.answer)
    return {"model": model.name, "temperature": 0, "max_tokens": longest}
