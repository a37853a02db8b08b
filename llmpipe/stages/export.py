"""`llmpipe export`: a model for other engines, proved in the engine that will use it.

Inputs: a model or an adapter, and rows that were held out, if there are any. Makes: an `export`, a
folder for each format and exports.jsonl, which says of each who read it back and how far its
predictions are from the model's. The story is `export.formats.export_all`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from llmpipe.data.prepared import RECORD, PreparedFolder
from llmpipe.errors import Mistake, UserError
from llmpipe.evaluation.tasks.perplexity import Perplexity
from llmpipe.files.writing import publishing
from llmpipe.recipe.sections import Machine, Recipe, Rows, Section, Start, cosmetic
from llmpipe.run.exports import EXPORTS
from llmpipe.run.interpreters import LLM_COMPRESSOR, python_of
from llmpipe.sums import Kept, check, is_sealed, seal

if TYPE_CHECKING:
    from llmpipe.run.job import Job
    from llmpipe.run.made import Made
    from llmpipe.run.outlook import Outlook

ACCEPTS = ("model", "adapter")
MAKES = "export"
PROGRESS = EXPORTS

Precision = Literal["fp32", "bf16", "fp16"]
Ggml = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m"
]
WRITTEN = ("f32", "f16", "bf16", "q8_0")
"""What needs no llama.cpp to be written."""

Compressed = Literal["fp8", "w4a16", "w4a16_gptq", "w4a16_awq"]
LOOK_AT_ROWS = ("w4a16_gptq", "w4a16_awq")
"""Which choose how to round by rows that go through the layers."""


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

    torchao: list[Literal["int8", "int4"]] = []
    """Model folders for transformers with linear layers in few bits by torchao, and all else in
    fp32 (`pip install 'llmpipe[torchao]'`). `int8`: a scale a row; `int4`: a scale for 32 weights,
    as PyTorch's own models for phones have it. Each of these lies in a byte of its own, so that the
    folder is as large as one of `int8`: 4 bits on the disk are `bitsandbytes`, `gguf` and
    `compressed_tensors`."""

    bitsandbytes: list[Literal["int8", "nf4"]] = []
    """Model folders for transformers with linear layers, GPT-2's too, in few bits by bitsandbytes,
    and all else in bf16. `int8`: LLM.int8(), which rounds what goes through the layers as well;
    `nf4`: the 4 bits of QLoRA, with double quantization, which are 4 on the disk, too."""

    compressed_tensors: list[Compressed] = []
    """Model folders for vLLM and transformers, in the form of compressed-tensors, made by
    llm-compressor from an environment of its own, whose bin/ is on PATH, and read back by
    transformers (`pip install 'llmpipe[compressed-tensors]'`). `fp8`: 8 bits, and 8 for what goes
    through the layers; `w4a16`: 4 bits, each rounded to the nearest; `w4a16_gptq` and `w4a16_awq`:
    rounded by what goes through the layers when the rows of `calibration` do."""

    @model_validator(mode="after")
    def _some(self) -> Formats:
        if not self.names:
            known = "merged, adapter, gguf, torchao, bitsandbytes or compressed_tensors"
            raise ValueError(f"name a format: {known}")
        return self

    @property
    def names(self) -> list[str]:
        """Of the folders that are made."""
        return [
            *(f"merged-{precision}" for precision in self.merged),
            *(["adapter"] if self.adapter else []),
            *(f"gguf-{numbers}" for numbers in self.gguf),
            *(f"torchao-{bits}" for bits in self.torchao),
            *(f"bitsandbytes-{bits}" for bits in self.bitsandbytes),
            *(f"compressed-tensors-{scheme}" for scheme in self.compressed_tensors),
        ]

    @property
    def looks_at_rows(self) -> bool:
        """Whether one of them is made by rows that go through the layers."""
        return not set(LOOK_AT_ROWS).isdisjoint(self.compressed_tensors)


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
    calibration: list[Rows] = []
    """Rows that go through the layers for GPTQ and AWQ, such as were trained on: the first 512 of
    them, up to 1,024 tokens of each. Those that are held out as well are left out, and counted."""
    accept: Accept = cosmetic(default_factory=Accept)
    """How far from the model a format may be; rounding to half precision has a bound besides."""
    launch: OneProcess = cosmetic(default_factory=OneProcess)
    """The machine: never part of the result's identity."""

    @model_validator(mode="after")
    def _calibrated(self) -> Schema:
        looked_at = ", ".join(LOOK_AT_ROWS)
        if self.formats.looks_at_rows and not self.calibration:
            raise ValueError(f"calibration: name rows: {looked_at} look at some")
        if self.calibration and not self.formats.looks_at_rows:
            raise ValueError(f"calibration: nobody looks at these rows: {looked_at} would")
        if any(rows in self.held_out for rows in self.calibration):
            raise ValueError("calibration: names rows that are held out")
        return self

    @property
    def task(self) -> Perplexity | None:
        """What is measured, in the words of `eval`."""
        return _passages(self.held_out)

    @property
    def looked_at(self) -> Perplexity | None:
        """The rows of `calibration`, in the same words."""
        return _passages(self.calibration)

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
            *(
                (f"formats.bitsandbytes.{i}", "bitsandbytes")
                for i in range(len(formats.bitsandbytes))
            ),
            *(
                (f"formats.compressed_tensors.{i}", "compressed_tensors")
                for i in range(len(formats.compressed_tensors))
            ),
        ]

    def rows(self) -> dict[str, Rows]:
        named = {"held_out": self.held_out, "calibration": self.calibration}
        return {
            f"{field}.{i}": source
            for field, sources in named.items()
            for i, source in enumerate(sources)
        }


def _passages(rows: list[Rows]) -> Perplexity | None:
    return Perplexity(task="perplexity", data=rows) if rows else None


def foresee(recipe: Schema, outlook: Outlook) -> Iterator[Mistake]:
    """Whether llm-compressor is there, where it is asked for."""
    if outlook.works and recipe.formats.compressed_tensors and not python_of(LLM_COMPRESSOR):
        hint = (
            "python -m venv ./lc-env && ./lc-env/bin/pip install 'llmcompressor==0.14.*',"
            " and put ./lc-env/bin on PATH, last: its versions are not llmpipe's"
        )
        problem = f"llm-compressor is not installed: no {LLM_COMPRESSOR} on PATH"
        yield Mistake("formats.compressed_tensors", UserError(problem, hint))


class PreparedPassages(PreparedFolder):
    """prepared.json of an export."""

    passages: int
    """How many rows were read."""


PREPARED = PreparedPassages
ITEMS = "passages.jsonl"
LOOKED_AT = "calibration.jsonl"


def shapes(recipe: Schema) -> dict[str, tuple[type, ...]]:
    return dict.fromkeys(recipe.rows(), Perplexity.shapes)


def prepare(job: Job[Schema]) -> PreparedPassages:
    """Held-out rows, and those for calibration -> passages."""
    from llmpipe.evaluation.items import items_of

    folder = job.prepared / f"export-{job.plan.identity[:16]}"
    if is_sealed(folder):
        check(Kept(folder))
    read = 0
    with publishing(folder) as staging:
        for task, name in _files(job.recipe):
            passages = items_of(task, job.plan.content, job.say)
            task.write(passages, staging / name)
            read += len(passages)
        PreparedPassages(passages=read).to_file(staging / RECORD)
        seal(staging, folder.name)
    return PreparedPassages.of_folder(folder)


def _files(recipe: Schema) -> list[tuple[Perplexity, str]]:
    """What rows become, and in which file."""
    named = [(recipe.task, ITEMS), (recipe.looked_at, LOOKED_AT)]
    return [(task, name) for task, name in named if task]


def train(job: Job[Schema], prepared: PreparedPassages) -> Made:
    """Write every format, have it read back, and hold it against the model."""
    from llmpipe.run.machine import rank
    from llmpipe.run.made import Made

    if rank():  # somebody's launcher started more than there is work for
        return Made(final={})
    from llmpipe.export.formats import export_all

    folder = prepared.folder(job.prepared)
    passages: dict[str, list[Any]] = {
        name: task.read(folder / name) for task, name in _files(job.recipe)
    }
    return export_all(job, passages.get(ITEMS, []), passages.get(LOOKED_AT, []))
