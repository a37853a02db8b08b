"""A model that is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import upstream
from llmpipe.data.encode import Encoder, Encoding
from llmpipe.data.template import choose
from llmpipe.errors import NUMERIC, Say, UserError
from llmpipe.evaluation.book import Line
from llmpipe.models.generate import render
from llmpipe.models.hardware import has_bf16, release_memory
from llmpipe.models.load import load_any
from llmpipe.models.pretrained import load_tokenizer
from llmpipe.recipe.sections import Preparation, Recipe
from llmpipe.run.artifact import is_reward_model, template_kwargs

Sequence_ = tuple[list[int], list[bool]]  # ids, and which of them are scored


@dataclass
class Candidate:
    """A model that is measured."""

    label: str
    folder: Path
    model: PreTrainedModel
    tokenizer: Tokenizer
    ranks: bool
    """Whether it is a reward model, which gives a text one score."""
    kwargs: dict[str, Any]
    """`chat_template_kwargs` it was trained with."""
    batch_size: int

    def describe(self) -> dict[str, Any]:
        template = self.tokenizer.chat_template
        return {
            "template": template and sha256(template.encode()).hexdigest(),
            "stops_at": None if self.ranks else self.model.generation_config.eos_token_id,
            "vocab_size": len(self.tokenizer),
            "parameters": self.model.num_parameters(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def prompt(self, item: Line) -> str:
        """What the model sees of an item's question."""
        return render(self.tokenizer, item["ask"], self.kwargs, item.get("tools"))

    def ids(self, text: str, item: Line) -> list[int]:
        """Tokens of a rendered text: a template writes the first token itself."""
        special = "text" in item["ask"] or not self.tokenizer.chat_template
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def scored(self, sequences: list[Sequence_]) -> list[tuple[float, int]]:
        """`log_probs` in batches whose logits take a gigabyte at most."""
        return batched(self.log_probs, sequences, self.batch_size, 2**28 // len(self.tokenizer))

    @torch.no_grad()
    def log_probs(self, sequences: list[Sequence_]) -> list[tuple[float, int]]:
        """(sum of log-probabilities in nats, tokens) over the marked tokens of each sequence, one batch."""
        width = max(len(ids) for ids, _ in sequences)
        most = getattr(self.model.config, "max_position_embeddings", width)
        if width > most:
            raise UserError(
                f"{self.label}: an item has {width:,} tokens, the model takes {most:,}",
                "shorten it",
            )
        pad = [width - len(ids) for ids, _ in sequences]
        first = [marks.index(True) if True in marks else len(marks) for _, marks in sequences]
        keep = width - min(at + p for at, p in zip(first, pad, strict=True)) + 1
        ids = torch.tensor([[0] * p + ids for (ids, _), p in zip(sequences, pad, strict=True)])
        mask = torch.tensor([[0] * p + [1] * (width - p) for p in pad])
        marked = torch.tensor(
            [[False] * p + marks for (_, marks), p in zip(sequences, pad, strict=True)]
        )
        device = self.model.device
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with upstream.contiguous_head(self.model):
            out = self.model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                logits_to_keep=min(keep, width),
                use_cache=False,
            )
        logits = out.logits[:, :-1].float()
        targets, marked = (
            ids[:, -logits.shape[1] :].to(device),
            marked[:, -logits.shape[1] :].to(device),
        )
        chosen = logits.gather(2, targets[..., None]).squeeze(2) - logits.logsumexp(2)
        sums = torch.where(marked, chosen, 0).double().sum(1).tolist()
        if not all(map(math.isfinite, sums)):
            raise UserError(
                f"{self.label}: a log-probability is not finite", "the model is broken", NUMERIC
            )
        return list(zip(sums, marked.sum(1).tolist(), strict=True))

    @torch.no_grad()
    def rewards(self, texts: list[list[int]]) -> list[float]:
        """The score of each text, one batch, padded on the right: reward models read up to the last token that is no
        pad token, which is one before the end of turn where the two are the same."""
        width = max(map(len, texts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor(
            [ids + [pad] * (width - len(ids)) for ids in texts], device=self.model.device
        )
        mask = torch.tensor(
            [[1] * len(ids) + [0] * (width - len(ids)) for ids in texts], device=self.model.device
        )
        return self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()

    def whole(self, item: Line, text: str | list[dict]) -> str:
        """A question with one answer to it, as the template writes the pair."""
        if isinstance(text, str) and "text" in item["ask"]:
            return item["ask"]["text"] + text
        turns = [{"role": "assistant", "content": text}] if isinstance(text, str) else text
        whole = {"messages": item["ask"]["messages"] + turns}
        return render(self.tokenizer, whole, self.kwargs, item.get("tools"), open_turn=False)


def machine(recipe: Recipe) -> dict[str, Any]:
    """What an evaluation's numbers depend on beside the recipe: in their last digits, and what is drawn by it."""
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and has_bf16())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "batch_size": recipe.launch.batch_size,
        "precision": "bf16" if bf16 else "fp32",
        "device": device,
    }


@contextmanager
def candidate(
    label: str, folder: Path, base: Path | None, recipe: Recipe, say: Say
) -> Iterator[Candidate]:
    """Load a model for measuring; its memory is free again afterwards."""
    bf16 = machine(recipe)["precision"] == "bf16"
    tokenizer = load_tokenizer(folder)
    model = load_any(folder, base, tokenizer, bf16=bf16)
    say(f"{label}: {model.num_parameters() / 1e6:,.1f} M parameters, {'bf16' if bf16 else 'fp32'}")
    if not tokenizer.chat_template:
        say(f"{label}: has no chat template: it sees prompts as bare text")
    kwargs, size = template_kwargs(folder), recipe.launch.batch_size
    made = Candidate(label, folder, model, tokenizer, is_reward_model(folder), kwargs, size)
    try:
        yield made
    finally:
        made.model = model = None  # the caller still holds `made` while the next one is loaded
        release_memory()


def batched(call: Callable, sequences: list, size: int, most: float = math.inf) -> list:
    """`call` on batches of at most `size` sequences of like length, `most` tokens; the results in the order given."""
    lengths = [len(s[0] if isinstance(s, tuple) else s) for s in sequences]
    order = sorted(range(len(sequences)), key=lambda i: -lengths[i])
    out: list = [None] * len(sequences)
    while order:
        count = max(1, int(min(size, most // lengths[order[0]])))
        part, order = order[:count], order[count:]
        for i, value in zip(part, call([sequences[i] for i in part]), strict=True):
            out[i] = value
    return out


def encoder_of(model: Candidate) -> Encoder:
    """Conversations as training encodes them, uncut."""
    if not hasattr(model, "_encoder"):
        choice = choose(model.folder, "auto", model.kwargs)
        uncut = Preparation(max_length=1 << 40, template_kwargs=model.kwargs)
        model._encoder = Encoder(Encoding(model.folder, choice.ends, choice.text_eos, uncut))
    return model._encoder
