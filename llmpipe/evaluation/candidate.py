"""A model that is measured: what it sees of a question, how likely an answer is, what it answers.

Sequences whose tokens are scored are padded on the left: what is scored is at their end, and logits
are made for that part alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import scores, upstream
from llmpipe.data import template
from llmpipe.data.encode import Answered, Encoder, encoder_of
from llmpipe.data.formats import Completion, Conversation, Document, Example, Rejected
from llmpipe.data.kinds import rows
from llmpipe.data.pack import IGNORED
from llmpipe.errors import NUMERIC, Say, UserError
from llmpipe.evaluation.book import Settings
from llmpipe.evaluation.task import Answer, Ask, Marked, Tools
from llmpipe.models.device import has_bf16, release_memory
from llmpipe.models.drawing.draw import Sampling
from llmpipe.models.drawing.replay import Replay
from llmpipe.models.generate import Response, check_rows, generate, render, replayed
from llmpipe.models.load import load_any
from llmpipe.models.pretrained import load_tokenizer
from llmpipe.models.rng import isolated_rng
from llmpipe.parallel.world import World
from llmpipe.run.artifact import is_reward_model, template_kwargs
from llmpipe.run.context import tokens_of
from llmpipe.run.results import MeasuredModel

LOGITS = 2**28  # of a batch at most: a gigabyte


class LogProb(NamedTuple):
    """Of the marked tokens of a sequence."""

    log_prob: float
    """Their sum, in nats."""
    tokens: int

    @property
    def mean(self) -> float:
        return self.log_prob / self.tokens


@dataclass
class Candidate:
    """A model that is measured, with the tokenizer and the template it was trained with."""

    label: str
    folder: Path
    model: PreTrainedModel
    tokenizer: Tokenizer
    ranks: bool
    """Whether it is a reward model, which gives a text one score."""
    kwargs: dict[str, Any]
    """`chat_template_kwargs` it was trained with."""
    batch_size: int
    say: Say
    replay: Replay | None = None
    """What draws greedy answers on a GPU, of the sampling that was asked for last."""

    def describe(self, parent: str | None) -> MeasuredModel:
        """What results.json says of it; `parent`: which of the others it was made from."""
        chat_template = self.tokenizer.chat_template
        return MeasuredModel(
            template=chat_template and sha256(str(chat_template).encode()).hexdigest(),
            stops_at=None if self.ranks else self.model.generation_config.eos_token_id,
            vocab_size=len(self.tokenizer),
            parameters=self.model.num_parameters(),
            dtype=str(self.model.dtype).removeprefix("torch."),
            parent=parent,
        )

    @cached_property
    def encoder(self) -> Encoder:
        """Conversations as training encodes them, uncut."""
        return encoder_of(self.folder, self.kwargs)

    # --- text and tokens --------------------------------------------------------------------------

    def sees_text(self, ask: Ask) -> bool:
        """Whether a question reaches it as bare text, without a template."""
        return ask.text is not None or not self.tokenizer.chat_template

    def prompt(self, ask: Ask, tools: Tools, at: str) -> str:
        """What the model sees of a question, up to where its answer begins.

        Raises UserError (2) naming the row `at`, where the template does not render all of it.
        """
        if self.sees_text(ask):
            if tools:
                problem = "the row has tools, and bare text says nothing of them"
                raise UserError(f"{at}: {self.label}: {problem}")
            return render(self.tokenizer, ask.model_dump(exclude_unset=True))
        assert ask.messages is not None
        try:
            with template.bounded():
                reading = template.prompt(self._templates[bool(tools)], ask.messages, tools)
            self._spelled.check(reading, ask.messages, tools)
        except Rejected as error:
            raise UserError(f"{at}: {self.label}: {error}") from None
        return reading.text

    @cached_property
    def _templates(self) -> dict[bool, template.Template]:
        """Which one transformers takes for rows without tools, and for rows with some."""
        variables = self.tokenizer.special_tokens_map
        texts = {
            some: self.tokenizer.get_chat_template(tools=[] if some else None)
            for some in (False, True)
        }
        return {
            some: template.Template(text, variables, self.kwargs) for some, text in texts.items()
        }

    @cached_property
    def _spelled(self) -> template.Spelled:
        added = self.tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special]
        return template.Spelled(special, self.tokenizer.all_special_tokens)

    def ids(self, text: str, ask: Ask) -> list[int]:
        """Tokens of what the model sees of a question: a template writes the first token itself."""
        encoded = self.tokenizer(text, add_special_tokens=self.sees_text(ask))
        ids: list[int] = encoded["input_ids"]
        return ids

    def answered(self, ask: Ask, tools: Tools, answer: Answer) -> Answered:
        """Tokens of a question with one answer, up to the end of the last turn, as in training.

        Raises Rejected where the template refuses the conversation.
        """
        policy_without_template = not (self.ranks or self.tokenizer.chat_template)
        if ask.messages is not None and policy_without_template:
            turns = [*ask.messages, *answer]
            return Answered(self.ids(render(self.tokenizer, {"messages": turns}), ask), [])
        return self.encoder.answered(ask.prompt, answer, tools)

    def answer_marked(self, ask: Ask, tools: Tools, answered: Answered, at: str) -> Marked:
        """What `answered` gave, with the assistant's tokens marked.

        The answer begins where its rendering and the prompt's part.
        """
        prompt = self.ids(self.prompt(ask, tools, at), ask)
        ids = answered.ids
        return Marked(ids, answered.learned(template.shared_prefix(prompt, ids)))

    def taught(self, example: Example) -> Marked:
        """A row as training encodes it, what it teaches marked. Raises Rejected."""
        pieces, _ = rows.encode(self.encoder, example, {})
        ids, labels = pieces[0]
        return Marked(ids.tolist(), (labels != IGNORED).tolist())

    def taught_bytes(self, example: Example) -> int:
        """UTF-8 bytes of the text whose tokens `taught` marks: of a conversation as its template
        writes what the assistant says, tool calls and thinking included.

        Special tokens are no text: one that ends a turn has no bytes.
        """
        match example:
            case Conversation():
                text = self.encoder.spoken(example.messages, example.tools, example.first)
            case Completion():
                text = example.completion
            case Document():
                text = example.text
            case _:
                raise TypeError(f"{type(example).__name__}: teaches no text")
        for special in sorted(self.tokenizer.all_special_tokens, key=len, reverse=True):
            text = text.replace(special, "")
        return len(text.encode())

    # --- what the model makes of them -------------------------------------------------------------

    def log_probs(self, sequences: list[Marked]) -> list[LogProb]:
        """Of the marked tokens of each sequence. Raises UserError (4) where one is not finite."""
        check_rows(self.model, self.tokenizer, (sequence.ids for sequence in sequences))
        lengths = [len(sequence.ids) for sequence in sequences]
        tokens = LOGITS // len(self.tokenizer)
        values: dict[int, LogProb] = {}
        for batch in batches(lengths, self.batch_size, tokens):
            scored = self._log_probs([sequences[i] for i in batch])
            values.update(zip(batch, scored, strict=True))
        return [values[i] for i in range(len(sequences))]

    def rewards(self, texts: list[list[int]], tokens: int | None = None) -> list[float]:
        """A reward model's score of each tokenized text, in batches of at most so many tokens; all
        are read at once."""
        if not texts:
            return []
        check_rows(self.model, self.tokenizer, texts)
        order = list(batches([len(ids) for ids in texts], self.batch_size, tokens))
        scores = torch.cat([self._rewards([texts[i] for i in batch]) for batch in order]).tolist()
        places = [i for batch in order for i in batch]
        values: dict[int, float] = dict(zip(places, scores, strict=True))
        return [values[i] for i in range(len(texts))]

    def responses(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Response]:
        """A response to each tokenized prompt, drawn from `seed`."""
        responses: list[Response] = []
        if self.replay is None or self.replay.sampling != sampling:
            self.forget_recorded()
            self.replay = replayed(self.model, self.tokenizer, sampling, self.say)
        with isolated_rng(seed):
            for start in range(0, len(prompts), self.batch_size):
                batch = prompts[start : start + self.batch_size]
                responses += generate(
                    self.model, self.tokenizer, batch, sampling, replay=self.replay
                )
        return responses

    def forget_recorded(self) -> None:
        """Give back the memory that drawing keeps."""
        if self.replay:
            self.replay.release()
        self.replay = None

    def _log_probs(self, sequences: list[Marked]) -> list[LogProb]:
        """`log_probs` of one batch."""
        width = max(len(ids) for ids, _ in sequences)
        self._check_fits(width)
        pads = [width - len(ids) for ids, _ in sequences]
        padded = list(zip(sequences, pads, strict=True))
        ids = torch.tensor([[0] * pad + ids for (ids, _), pad in padded])
        marks = torch.tensor([[False] * pad + marks for (_, marks), pad in padded])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])

        # logits from the token in front of the first one that is scored
        first = min(pad + _first(marks) for (_, marks), pad in padded)
        device = self.model.device
        with torch.no_grad(), upstream.contiguous_head(self.model):
            out = self.model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
                logits_to_keep=min(width - first + 1, width),
                use_cache=False,
            )
        logits = out.logits[:, :-1].float()  # of a token the next one's
        kept = logits.shape[1]
        targets = ids[:, -kept:].to(device)
        scored = marks[:, -kept:].to(device)
        log_probs = logits.gather(2, targets[..., None]).squeeze(2) - logits.logsumexp(2)
        sums = torch.where(scored, log_probs, 0).double().sum(1).tolist()
        if not all(math.isfinite(value) for value in sums):
            problem = f"{self.label}: a log-probability is not finite"
            raise UserError(problem, "the model is broken", NUMERIC)
        return [LogProb(*pair) for pair in zip(sums, scored.sum(1).tolist(), strict=True)]

    def _check_fits(self, width: int) -> None:
        most = tokens_of(self.model.config.to_dict())
        if most is not None and width > most:
            problem = f"{self.label}: an item has {width:,} tokens, the model takes {most:,}"
            raise UserError(problem, "shorten it, or lower the window of perplexity")

    def _rewards(self, texts: list[list[int]]) -> Tensor:
        """`rewards` of one batch, padded on the right, float32 on the model's device.

        Reward models read up to the last token that is no pad token, which is one before the end of
        turn where the two are the same.
        """
        width = max(map(len, texts))
        self._check_fits(width)
        pad = self.tokenizer.pad_token_id
        device = self.model.device
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids in texts], device=device)
        mask = torch.tensor(
            [[1] * len(ids) + [0] * (width - len(ids)) for ids in texts], device=device
        )
        with torch.no_grad():
            logits = self.model(input_ids=ids, attention_mask=mask).logits
        rewards: Tensor = logits[:, 0].float()
        return rewards


def _first(marks: list[bool]) -> int:
    return marks.index(True) if True in marks else len(marks)


def batches(lengths: list[int], size: int, tokens: int | None = None) -> Iterator[list[int]]:
    """Positions in batches of like length, the longest first.

    At most `size` in a batch, and at most `tokens` with the padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        count = size if tokens is None else min(size, tokens // lengths[order[0]])
        batch = order[: max(1, count)]
        order = order[len(batch) :]
        yield batch


def settings_of(precision: str, batch_size: int, any_adapters: bool) -> Settings:
    """What an evaluation's numbers depend on beside the recipe; `precision` may be `auto`."""
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16())
    # left out where nothing is merged, not null: the file stays as older versions write and read it
    merged: Any = {"adapters": "merged"} if any_adapters and not bf16 else {}
    return Settings(
        batch_size=batch_size,
        precision="bf16" if bf16 else "fp32",
        device="cuda" if torch.cuda.is_available() else "cpu",
        scores=scores.VERSION,
        **merged,
    )


@contextmanager
def candidate(
    label: str, folder: Path, base: Path | None, settings: Settings, world: World, say: Say
) -> Iterator[Candidate]:
    """Load a model for measuring; its memory is free again afterwards."""
    tokenizer = load_tokenizer(folder)
    bf16 = settings.precision == "bf16"
    model = load_any(folder, base, tokenizer, bf16=bf16, alone=world.size == 1)
    say(f"{label}: {model.num_parameters() / 1e6:,.1f} M parameters, {settings.precision}")
    if not tokenizer.chat_template:
        say(f"{label}: has no chat template: it sees prompts as bare text")
    loaded = Candidate(
        label=label,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        ranks=is_reward_model(folder),
        kwargs=template_kwargs(folder),
        batch_size=settings.batch_size,
        say=say,
    )
    try:
        yield loaded
    finally:
        loaded.forget_recorded()
        # the caller still holds `loaded` while the next one is loaded
        loaded.model = model = None
        release_memory()
