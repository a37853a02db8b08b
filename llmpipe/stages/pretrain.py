"""`llmpipe pretrain`: from raw text to a model, or more text for a model that is there.

Inputs: documents, and either `model:` or `architecture:` with a `tokenizer:`, which may be trained
here first. Makes: a `model` with a chat template, ready for `sft`. Documents are laid end to end,
each with its end-of-document token, and cut into blocks without padding; loss is on every token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmpipe.files.json import digest
from llmpipe.files.writing import publishing
from llmpipe.recipe.sections import (
    AdamW,
    Generating,
    Length,
    Positive,
    Preparation,
    Prepared,
    Reference,
    Section,
    Share,
)
from llmpipe.recipe.trainer import TrainerConfig
from llmpipe.stages import sft
from llmpipe.sums import Kept, check, is_sealed, seal

if TYPE_CHECKING:  # they read the whole of a run, which checking a recipe does not need
    from llmpipe.data.prepared import PreparedRows, TokenCounts
    from llmpipe.run.job import Job
    from llmpipe.run.made import Made

ACCEPTS = ("model", "adapter")
MAKES = "model"
PROGRESS = sft.PROGRESS


class Corpus(Prepared):
    """Documents laid end to end, each with its end-of-document token, and cut into blocks without
    padding."""

    max_length: Length = 1024
    """Tokens of a block; the last one may be shorter."""
    packing: bool = Field(False, alias="isolate")
    """Attention does not cross from one document to the next within a block."""
    stream: bool = False
    """Tokenize while training and keep no copy, for more text than the disk holds. Blocks come in
    the order of the rows, unshuffled, the same for any number of processes, each of which reads
    them all."""

    @property
    def preparation(self) -> Preparation:
        return Preparation(
            self.max_length, packing=self.packing, learn_all=True, stream=self.stream
        )


class TokenOptim(AdamW):
    batch_tokens: Positive
    """Tokens per optimizer step, over all processes and micro-batches: a multiple of
    `data.max_length`."""
    tokens: Annotated[int, Field(ge=1, le=10**15)] | None = None
    """Train on this many tokens instead, seeing the data as often as that takes; overrides
    `epochs`."""
    scheduler: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up; wsd (warmup, stable, decay; Hu 2024) stays at
    the peak."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """wsd: share of the steps, at the end, in which the learning rate falls."""
    final: Share = 0.1
    """Learning rate at the end, as a share of the peak (cosine, wsd)."""

    def sequences(self, length: int) -> int:
        return self.batch_tokens // length


class Architecture(Section):
    kind: Literal["llama", "gpt2", "qwen3"] = "llama"
    """Whose layers."""
    layers: Positive
    """Transformer blocks."""
    width: Positive
    """Size of the hidden states."""
    heads: Positive
    """Attention heads; they share the width."""
    kv_heads: Positive | None = None
    """Heads of keys and values (grouped-query attention); as many as `heads` unless set."""
    ffn: Positive | None = None
    """Size within the feed-forward layers; for gpt2 4 times the width, else 8/3 of it, up to a
    multiple of 64."""
    tied: bool = True
    """Embeddings and head share their weights."""
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the rotary positions (not gpt2)."""
    rope_scaling: dict[str, Any] = {}
    """Scaling of the rotary positions, in transformers' words: `{rope_type: linear, factor: 2.0}`.
    """

    @model_validator(mode="after")
    def _fits(self) -> Architecture:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if self.kind == "gpt2" and (self.kv_heads or self.rope_scaling):
            raise ValueError("gpt2 has neither kv_heads nor rotary positions")
        return self


class TrainTokenizer(Section):
    vocab_size: Annotated[int, Field(ge=300)]
    """Tokens of a byte-level BPE tokenizer that is trained on the documents first."""


class Schema(Generating):
    trainer_config: ClassVar[TrainerConfig] = sft.TRAINER._replace(
        owned=sft.TRAINER.owned | {"lr_scheduler_kwargs": "optim.final"}
    )

    stage: Literal["pretrain"] = "pretrain"
    """Pretraining on raw text."""
    model: Reference | None = None
    """A model to train on (continued pretraining); otherwise set `architecture`."""
    architecture: Architecture | None = None
    """The model to begin with random weights."""
    tokenizer: Reference | TrainTokenizer | None = None
    """With `architecture`: a model folder, Hub id or artifact to take the tokenizer of, or
    `{vocab_size: N}` to train one on the documents."""
    data: Corpus
    """Documents and how they become blocks."""
    optim: TokenOptim
    """The optimizer and its schedule."""

    @model_validator(mode="after")
    def _begins(self) -> Schema:
        if (self.model is None) == (self.architecture is None):
            raise ValueError("give either model (to train on) or architecture (to begin)")
        if (self.architecture is None) != (self.tokenizer is None):
            raise ValueError("architecture needs a tokenizer, and a model brings its own")
        if self.adapter and self.architecture:
            raise ValueError("adapter: random weights cannot stay frozen")
        if self.optim.batch_tokens % self.data.max_length:
            raise ValueError(
                f"optim.batch_tokens ({self.optim.batch_tokens}) must be a multiple of "
                f"data.max_length ({self.data.max_length})"
            )
        if self.data.stream and not self.steps:
            raise ValueError("data.stream needs optim.tokens or optim.steps, to know when to end")
        if self.data.stream and (
            self.data.eval.holdout or any(source.weight != 1 for source in self.data.train)
        ):
            raise ValueError(
                "data.stream: rows are not known beforehand: use data.eval.sources, and no weights"
            )
        if self.optim.scheduler == "wsd" and not self.steps:
            raise ValueError(
                "optim.scheduler: wsd needs optim.tokens or optim.steps, to know when to decay"
            )
        return self

    @property
    def steps(self) -> int | None:
        return (
            -(-self.optim.tokens // self.optim.batch_tokens)
            if self.optim.tokens
            else self.optim.steps
        )

    def references(self) -> dict[str, str]:
        named = {"model": self.model, "tokenizer": self.tokenizer}
        return {at: name for at, name in named.items() if isinstance(name, str)}


def shapes(recipe: Schema) -> dict[str, tuple[type, ...]]:
    from llmpipe.data.kinds.blocks import BLOCKS

    return dict.fromkeys(recipe.rows(), BLOCKS.shapes)


def prepare(job: Job[Schema]) -> PreparedRows:
    """Documents -> blocks of tokens, after the tokenizer was trained where the recipe asks."""
    from llmpipe.data.kinds.blocks import BLOCKS
    from llmpipe.data.prepare import prepare as tokenize

    recipe, pinned = job.recipe, job.plan.content
    if isinstance(recipe.tokenizer, TrainTokenizer):
        start = trained_tokenizer(job, recipe.tokenizer.vocab_size)
    else:
        start = job.models.get("model") or job.models["tokenizer"]
    return tokenize(
        recipe.data,
        BLOCKS,
        start,
        job.prepared,
        seed=recipe.seed,
        say=job.say,
        pinned=pinned,
    )


def trained_tokenizer(job: Job[Schema], vocab_size: int) -> Path:
    """The folder of a tokenizer trained on the documents, once for equal documents."""
    from llmpipe.data.train_tokenizer import train_tokenizer

    folder = job.prepared / f"tokenizer-{digest([job.plan.content, vocab_size])[:16]}"
    if is_sealed(folder):
        check(Kept(folder))
        return folder
    job.say(f"tokenizer: training {vocab_size:,} byte-level tokens")
    with publishing(folder) as staging:
        train_tokenizer(_texts(job), vocab_size, staging)
        seal(staging, folder.name)
    return folder


def _texts(job: Job[Schema]) -> Iterator[str]:
    """Every document to train on; rows that cannot be used are left out."""
    from llmpipe.data.formats import Document, Rejected
    from llmpipe.evaluation.items import rows_of

    data, content = job.recipe.data, job.plan.content
    for source in data.train:
        for _, row in rows_of(source, (Document,), "pretrain", content, data.stream):
            if not isinstance(row, Rejected):
                assert isinstance(row.example, Document)  # no row has another shape
                yield row.example.text


def train(job: Job[Schema], prepared: PreparedRows) -> Made:
    """Build or load the model, train, publish; returns what the manifest says of it."""
    from llmpipe.data.kinds.blocks import BLOCKS
    from llmpipe.models.load import load_new, load_policy, set_up
    from llmpipe.training.conclude import conclude
    from llmpipe.training.rows import streamed
    from llmpipe.training.samples import answer_samples
    from llmpipe.training.supervised import supervised_trainer
    from llmpipe.training.training import Training

    recipe = job.recipe
    setup = set_up(job, prepared)
    shape = recipe.architecture
    model = load_new(setup, shape) if shape else load_policy(setup)
    stream = streamed(setup) if recipe.data.stream else None
    training = Training(setup, BLOCKS, model, stream)

    trainer = supervised_trainer(training)
    answer_samples(trainer, setup.tokenizer, "before")
    final = trainer.fit()
    if prepared.tokens.eval_bytes:
        bits = bits_per_byte(final["eval_loss"], prepared.tokens)
        job.say(f"held-out: {bits:.4f} bits per byte")
        final["bits_per_byte"] = bits
    answer_samples(trainer, setup.tokenizer, "after")
    return conclude(trainer, training, final)


def bits_per_byte(loss: float, tokens: TokenCounts) -> float:
    """A held-out `loss` in nats per token as bits per byte of text, which tokenizers can share."""
    return loss / math.log(2) * tokens.eval / tokens.eval_bytes
