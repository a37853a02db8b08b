"""`llmpipe export`: a model for other engines, proved in the engine that will use it.

Inputs: a model or an adapter, and rows that were held out, if there are any. Makes: an `export`, a
folder for each format and exports.jsonl, which says of each who read it back and how far its
predictions are from the model's. The story is `export.formats.export_all`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from llmpipe.data.prepared import RECORD, PreparedFolder
from llmpipe.evaluation.tasks.perplexity import Perplexity
from llmpipe.files import publishing
from llmpipe.recipe.sections import Machine, Recipe, Rows, Section, Start, cosmetic
from llmpipe.run.exports import EXPORTS
from llmpipe.sums import Kept, check, is_sealed, seal

if TYPE_CHECKING:
    from llmpipe.run.job import Job
    from llmpipe.run.made import Made

ACCEPTS = ("model", "adapter")
MAKES = "export"
PROGRESS = EXPORTS

Precision = Literal["fp32", "bf16", "fp16"]
Ggml = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m"
]
WRITTEN = ("f32", "f16", "bf16", "q8_0")
"""What needs no llama.cpp to be written."""


class Formats(Section):
    merged: list[Precision] = []
    """Model folders of safetensors, for transformers, vLLM and the Hub, in these precisions; an
    adapter is merged in fp32, and the sum is cast once."""
    adapter: bool = False
    """The adapter as PEFT has it, for transformers and vLLM, beside its base."""

    gguf: list[Ggml] = []
    """Files for llama.cpp and Ollama, each with a Modelfile: f32, f16, bf16 and q8_0 are written
    here, all else by llama.cpp, which reads back every one of them where it is installed
    (`pip install 'llmpipe[gguf]'`)."""

    torchao: list[Literal["int8"]] = []
    """Model folders with linear layers in 8 bits by torchao, for transformers
    (`pip install 'llmpipe[torchao]'`)."""

    @model_validator(mode="after")
    def _some(self) -> Formats:
        if not self.names:
            raise ValueError("name a format: merged, adapter, gguf or torchao")
        return self

    @property
    def names(self) -> list[str]:
        """Of the folders that are made."""
        return [
            *(f"merged-{precision}" for precision in self.merged),
            *(["adapter"] if self.adapter else []),
            *(f"gguf-{numbers}" for numbers in self.gguf),
            *(f"torchao-{bits}" for bits in self.torchao),
        ]


class Accept(Section):
    """What is asked of weights that are rounded to a few bits."""

    mean_kl: Annotated[float, Field(ge=0)] = 0.1
    """Nats per token, on average, that the predictions may be away from the model's."""
    perplexity_ratio: Annotated[float, Field(ge=1)] = 1.1
    """How many times as high the perplexity may be."""
    otherwise: Literal["refuse", "warn"] = "refuse"
    """What happens to a format that is further away: it is not published and the stage ends with
    exit code 3, or it is published with a warning."""


class OneProcess(Machine):
    processes: Literal[1] = 1
    """One process, on the CPU: the model is in fp32, and so are the predictions that readers are
    held against."""


class Schema(Recipe):
    stage: Literal["export"] = "export"
    """For other engines."""
    model: Start
    formats: Formats
    """What is written."""
    held_out: list[Rows] = []
    """Rows to measure on, the first 2,048 tokens of them; without any the continuations of the
    probe are taken, which are few."""
    accept: Accept = cosmetic(default_factory=Accept)
    """How far from the model a format with fewer bits may be."""
    launch: OneProcess = cosmetic(default_factory=OneProcess)
    """The machine: never part of the result's identity."""

    @property
    def task(self) -> Perplexity | None:
        """What is measured, in the words of `eval`."""
        return Perplexity(task="perplexity", data=self.held_out) if self.held_out else None

    def references(self) -> dict[str, str]:
        return {"model": self.model}

    def packages(self) -> list[tuple[str, str]]:
        formats = self.formats
        return [
            *(
                (f"formats.gguf.{i}", "llama_cpp")
                for i, numbers in enumerate(formats.gguf)
                if numbers not in WRITTEN
            ),
            *((f"formats.torchao.{i}", "torchao") for i in range(len(formats.torchao))),
        ]

    def rows(self) -> dict[str, Rows]:
        return {f"held_out.{i}": source for i, source in enumerate(self.held_out)}


class PreparedPassages(PreparedFolder):
    """prepared.json of an export."""

    passages: int
    """How many rows were read."""


PREPARED = PreparedPassages
ITEMS = "passages.jsonl"


def shapes(recipe: Schema) -> dict[str, tuple[type, ...]]:
    return dict.fromkeys(recipe.rows(), Perplexity.shapes)


def prepare(job: Job[Schema]) -> PreparedPassages:
    """Held-out rows -> passages."""
    from llmpipe.evaluation.items import items_of

    task = job.recipe.task
    folder = job.prepared / f"export-{job.plan.identity[:16]}"
    if is_sealed(folder):
        check(Kept(folder))
    with publishing(folder) as staging:
        passages = items_of(task, job.plan.content, job.say) if task else []
        if task:
            task.write(passages, staging / ITEMS)
        PreparedPassages(passages=len(passages)).to_file(staging / RECORD)
        seal(staging, folder.name)
    return PreparedPassages.of_folder(folder)


def train(job: Job[Schema], prepared: PreparedPassages) -> Made:
    """Write every format, have it read back, and hold it against the model."""
    from llmpipe.run.machine import rank
    from llmpipe.run.made import Made

    if rank():  # somebody's launcher started more than there is work for
        return Made(final={})
    from llmpipe.export.formats import export_all

    task = job.recipe.task
    passages: list[Any] = task.read(prepared.folder(job.prepared) / ITEMS) if task else []
    return export_all(job, passages)
