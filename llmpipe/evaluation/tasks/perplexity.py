"""Perplexity: how likely a model finds texts, and what an assistant said in conversations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmpipe.data.examples import Messages, Tools
from llmpipe.data.formats import (
    Completion,
    Conversation,
    Document,
    Example,
    Rejected,
)
from llmpipe.errors import UserError
from llmpipe.evaluation.book import Score, Scored
from llmpipe.evaluation.task import Item, Marked, OnItems, Place, nothing_scored
from llmpipe.recipe.sections import Positive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from llmpipe.evaluation.candidate import Candidate


class Passage(Item):
    """A text, a conversation, or a prompt with its completion, as its row has it."""

    text: str | None = None
    messages: Messages | None = None
    tools: Tools = None
    first: int = 0
    """The first message that counts."""
    prompt: str = ""
    completion: str = ""

    @property
    def example(self) -> Document | Conversation | Completion:
        """The row again."""
        if self.text is not None:
            return Document(self.text)
        if self.messages is not None:
            return Conversation(self.messages, self.tools, self.first)
        return Completion(self.prompt, self.completion)

    @property
    def start(self) -> str:
        """The beginning of what counts, for a person to read."""
        text = self.text or self.completion
        if self.messages is not None:
            text = self.messages[-1]["content"]
        return text if len(text) <= 200 else text[:197] + "..."


class Perplexity(OnItems):
    shapes: ClassVar = (Document, Conversation, Completion)
    item_type: ClassVar = Passage

    task: Literal["perplexity"]
    """Negative log-likelihood per token: of texts with a sliding window, of conversations on the
    assistant's turns. Bits per byte compare models with different tokenizers: the bytes are those
    of the text that is scored, tool calls and thinking included, special tokens not."""
    window: Annotated[int, Field(ge=2, le=1 << 24)] = 1024
    """Most tokens that the model sees at once."""
    stride: Positive = 512
    """New tokens per window: smaller gives each more context and takes longer."""

    @model_validator(mode="after")
    def _fits(self) -> Perplexity:
        if self.stride >= self.window:
            raise ValueError(
                f"stride ({self.stride}) must be below window ({self.window}),"
                " or tokens go unscored"
            )
        return self

    def metrics(self, kind: str | None) -> set[str]:
        named = {"perplexity", "nats_per_token", "bits_per_byte"}
        return set() if kind == "reward-model" else named

    def item_of(self, row: Example, others: dict[str, Any], place: Place) -> Passage:
        # `first` stands in the file only where it leaves something out
        fields = {name: value for name, value in vars(row).items() if name != "first" or value}
        return Passage(**place._asdict(), **fields)

    def score_batch(self, model: Candidate, batch: list[Passage], seed: int) -> list[Scored]:
        parts = [list(windows(marked(model, item), self.window, self.stride)) for item in batch]
        sums = iter(model.log_probs([part for parts_of_item in parts for part in parts_of_item]))
        scored = []
        for item, parts_of_item in zip(batch, parts, strict=True):
            nats = 0.0
            tokens = 0
            for _ in parts_of_item:
                log_prob, count = next(sums)
                nats -= log_prob
                tokens += count
            size = model.taught_bytes(item.example)
            if not (tokens and size):
                raise nothing_scored(item.at, model.label)
            scores: dict[str, Score] = {
                "perplexity": [nats, tokens],
                "nats_per_token": [nats, tokens],
                "bits_per_byte": [nats / math.log(2), size],
            }
            scored.append(Scored({"text": item.start}, scores))
        return scored


def marked(model: Candidate, item: Passage) -> Marked:
    """Every token of a text; of a conversation or a completion those that training teaches."""
    if item.text is not None:
        ids = model.tokenizer(item.text, add_special_tokens=False)["input_ids"]
        return Marked.after([token_before(model.tokenizer), *ids], 1)
    try:
        return model.taught(item.example)
    except Rejected as error:
        raise UserError(f"{item.at}: {model.label}: {error}") from None


def token_before(tokenizer: Tokenizer) -> int:
    """The token in front of a text: bos if the tokenizer writes one, else the end of documents."""
    first: int = tokenizer("a")["input_ids"][0]
    bos: int | None = tokenizer.bos_token_id
    eos: int | None = tokenizer.eos_token_id
    return first if eos is None or (bos is not None and first == bos) else eos


def windows(sequence: Marked, window: int, stride: int) -> Iterator[Marked]:
    """A sequence in windows that overlap by `window - stride`.

    Each marked token is scored once, in the first window that holds it; the first token of a window
    has nothing before it and is not scored there.
    """
    ids, marks = sequence
    done = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        fresh = [marks[i] and i >= done and i > begin for i in range(begin, end)]
        if any(fresh):
            yield Marked(ids[begin:end], fresh)
        done = end
        if end == len(ids):
            break
