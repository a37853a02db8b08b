"""Every format of an export: written, read back by its reader, compared, and only then given its
name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmpipe import screen
from llmpipe.errors import INTEGRITY, Say, UserError
from llmpipe.evaluation.candidate import Candidate
from llmpipe.evaluation.task import Marked
from llmpipe.evaluation.tasks.perplexity import Passage, marked, windows
from llmpipe.export.adapter import write_adapter
from llmpipe.export.calibration import rows_to_look_at
from llmpipe.export.compressed import Scheme, read_compressed, write_compressed
from llmpipe.export.gguf_file import TYPES, check_weights, write_gguf
from llmpipe.export.measure import Yardstick, of_probe, yardstick
from llmpipe.export.merged import DTYPES, write_merged
from llmpipe.export.modelfile import write_modelfile
from llmpipe.export.readers import Reader
from llmpipe.export.readers.of_transformers import (
    predictions,
    read_adapter,
    read_gguf,
    read_model,
)
from llmpipe.export.readers.of_vllm import VLLM, Unread, leaving_room
from llmpipe.export.source import Source, load_source
from llmpipe.export.weight_only import (
    read_bitsandbytes,
    read_torchao,
    write_bitsandbytes,
    write_torchao,
)
from llmpipe.files.tables import differences, table
from llmpipe.files.writing import publishing, remove
from llmpipe.run.context import tokens_of
from llmpipe.run.exports import Export, Reading, read_exports, write_exports
from llmpipe.run.interpreters import VLLM as COMMAND
from llmpipe.run.interpreters import python_of
from llmpipe.run.made import Made
from llmpipe.run.probe import compare

if TYPE_CHECKING:
    from llmpipe.run.job import Job
    from llmpipe.stages.export import Accept, Schema

WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Format:
    """One format: how it is written, and who reads it."""

    name: str
    write: Callable[[Source, Path], list[str]]
    """Returns what its user has to know."""
    read: Callable[[Path, Source], Reader]
    dtype: torch.dtype | None
    """To which weights and sums are rounded; None where they have fewer bits."""

    @property
    def for_vllm(self) -> bool:
        """Whether vLLM takes it, where it takes the model. What bitsandbytes holds it reads on
        GPUs alone, which nobody has seen here."""
        return not self.name.startswith(("gguf-", "bitsandbytes-"))


def formats_of(recipe: Schema, looked_at: Sequence[list[int]] = ()) -> Iterator[Format]:
    """What a recipe asks for, in the order of `Formats.names`.

    `looked_at`: tokens of the rows for calibration.
    """
    for precision in recipe.formats.merged:
        dtype = DTYPES[precision]
        yield Format(
            name=f"merged-{precision}",
            write=partial(write_merged, dtype=dtype),
            read=partial(read_model, dtype=dtype),
            dtype=dtype,
        )
    if recipe.formats.adapter:
        yield Format("adapter", write_adapter, read_adapter, torch.float32)
    for numbers in recipe.formats.gguf:
        dtype = GGUF_DTYPES.get(numbers)
        yield Format(
            name=f"gguf-{numbers}",
            write=partial(_write_gguf, numbers=numbers),
            read=partial(_read_gguf, dtype=dtype),
            dtype=dtype,
        )
    for bits in recipe.formats.torchao:
        yield Format(
            name=f"torchao-{bits}",
            write=partial(write_torchao, bits=bits),
            read=read_torchao,
            dtype=None,
        )
    for few in recipe.formats.bitsandbytes:
        yield Format(
            name=f"bitsandbytes-{few}",
            write=partial(write_bitsandbytes, bits=few),
            read=read_bitsandbytes,
            dtype=None,
        )
    for name in recipe.formats.compressed_tensors:
        scheme = Scheme(name)
        yield Format(
            name=f"compressed-tensors-{name}",
            write=partial(write_compressed, scheme=scheme, rows=list(looked_at)),
            read=partial(read_compressed, scheme=scheme),
            dtype=None,
        )


GGUF_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def _write_gguf(source: Source, folder: Path, numbers: str) -> list[str]:
    """A GGUF file and its Modelfile; what is not written here llama.cpp makes of an f32 file."""
    file = folder / f"model-{numbers}.gguf"
    if numbers in TYPES:
        write_gguf(source, file, numbers)
    else:
        from llmpipe.export.readers.of_llama_cpp import quantize

        whole = folder / "whole.gguf"
        write_gguf(source, whole, "f32")
        quantize(whole, file, numbers)
        whole.unlink()
    return write_modelfile(source, file)


def _read_gguf(folder: Path, source: Source, dtype: torch.dtype | None) -> Reader:
    """By llama.cpp where it is installed, else by transformers."""
    [file] = folder.glob("*.gguf")
    tensors = check_weights(source, file, dtype)
    if not find_spec("llama_cpp"):
        return read_gguf(file, source, dtype)
    from llmpipe.export.readers.of_llama_cpp import LlamaCpp

    return LlamaCpp(file, source, tensors)


def export_all(job: Job[Schema], passages: list[Passage], looked_at: list[Passage]) -> Made:
    """Make every format of the recipe that is not there already.

    `passages`: what is measured on; `looked_at`: the rows for calibration.

    Raises UserError (3) naming each format that is too far from the model; those that are not are
    kept, and made no second time.
    """
    recipe, home, say = job.recipe, job.artifact.path, job.say
    job.plan.refuse_changed_models()
    source = load_source(job.model, job.bases.get("model"), say)
    standard = _yardstick(source, passages, recipe.task is None, say)
    done = {export.format: export for export in read_exports(home) if _is_whole(home, export)}
    candidate = _candidate(source, say)
    rows = (
        []
        if not looked_at
        else rows_to_look_at(looked_at, passages, lambda row: marked(candidate, row).ids, say)
    )
    refused = []
    for form in formats_of(recipe, rows):
        if form.name in done:
            say(f"{form.name}: is there already")
            continue
        try:
            done[form.name] = export_one(form, source, standard, home, recipe.accept, say)
        except TooFar as far:
            refused.append(far.args[0])
            continue
        write_exports(home, list(done.values()))
    if refused:
        hint = "take more bits, or say in `accept:` what is near enough; the others are kept"
        raise UserError("\n".join(refused), hint, INTEGRITY)
    numbers = {name: done[name].numbers() for name in recipe.formats.names}
    return Made(final=numbers, probe=source.probe)


class TooFar(Exception):
    """A format that is not near enough to the model, in words."""


def export_one(
    form: Format, source: Source, standard: Yardstick, home: Path, accept: Accept, say: Say
) -> Export:
    """Write one format, and publish it once its reader says what the model says.

    Raises UserError (3) where it does not, and TooFar where its fewer bits say something else.
    """
    folder = home / form.name
    remove(folder)
    with publishing(folder) as staging:
        with screen.doing(f"writing {form.name}"):
            notes = form.write(source, staging)
        with screen.doing(f"reading {form.name} back"):
            export = read_back(form, source, standard, staging)
        also, refusals = read_by_vllm(form, source, standard, staging, say)
        export = replace(export, also=also)
        problem = too_far(export, accept)
        if problem and accept.otherwise == "refuse":
            raise TooFar(f"the export is refused: {problem}")
    if problem:
        say(f"warning: {problem}")
    export = replace(export, notes=notes + refusals, warning=problem, files=table(folder))
    for told in (export.told, *(reading.told for reading in export.also)):
        say(f"{export.format}: {told}")
    for note in export.notes:
        say(f"{export.format}: {note}")
    return export


def read_back(form: Format, source: Source, standard: Yardstick, folder: Path) -> Export:
    """What the reader makes of a format, compared with the model. Raises UserError (3)."""
    reader = form.read(folder, source)
    try:
        reading = _held_against(reader, form, source, standard)
    finally:
        reader.close()
    return Export(
        format=form.name,
        lossless=form.dtype is not None,
        size=sum(path.stat().st_size for path in folder.iterdir() if path.suffix in WEIGHTS),
        tensors=reader.tensors,
        reader=reading.reader,
        agreement=reading.agreement,
        measured=reading.measured,
        tokens_per_second=reading.tokens_per_second,
        template_kwargs=source.template_kwargs,
    )


def _held_against(reader: Reader, form: Format, source: Source, standard: Yardstick) -> Reading:
    """How far what a reader says is what the model says. Raises UserError (3)."""
    most = _most(reader, form, source)
    agreement = compare(source.probe, reader.probe(), f"{form.name}, {reader.name}", most)
    measured, rate = standard.measure(reader.predicts)
    return Reading(
        reader=reader.name, agreement=agreement, measured=measured, tokens_per_second=rate
    )


def _most(reader: Reader, form: Format, source: Source) -> float | None:
    """Nats that rounding may move a log-probability by; None where weights have fewer bits."""
    return source.tolerance(form.dtype, reader.computes_in) if form.dtype else None


def read_by_vllm(
    form: Format, source: Source, standard: Yardstick, folder: Path, say: Say
) -> tuple[list[Reading], list[str]]:
    """What vLLM makes of a format, where it is installed; and a note, where it does not take it.

    Raises UserError (3) where it makes something else of it, or takes it and then fails.
    """
    python = python_of(COMMAND) if form.for_vllm else None
    if python is None:
        return [], []
    whole, source = source, leaving_room(source)
    if left_out := len(whole.probe.asked) - len(source.probe.asked):
        say(f"{form.name}: vLLM is not asked {left_out} of the questions: they fill the context")
    with screen.doing(f"reading {form.name} by vLLM"):
        try:
            reader = VLLM(python, folder, source, form.dtype)
        except Unread as why:
            say(f"{form.name}: vLLM does not read it: {why}")
            return [], ["vLLM did not take it"]
        try:
            reading = _held_against(reader, form, source, standard)
            if reader.is_adapter:
                reader.refuse_unapplied(_most(reader, form, source) or 0.0, say)
        except Unread as why:
            problem = f"{form.name}, {reader.name}: it took the folder, and then failed: {why}"
            hint = "export again; with vLLM off PATH it is published without being read by it"
            raise UserError(problem, hint, INTEGRITY) from None
        finally:
            reader.close()
    return [reading], []


def too_far(export: Export, accept: Accept) -> str:
    """How a format is further from the model than is accepted, in words: one with fewer bits for
    these, and any other for what nothing else has shown to be lost."""
    problems = []
    for reading in (export.reading, *export.also):
        kl, ratio = reading.measured.mean_kl, reading.measured.perplexity_ratio
        by = f" by {reading.reader}" if export.also else ""
        if not kl <= accept.mean_kl:
            limit = f"not at most {accept.mean_kl:g}"
            problems.append(f"a mean KL of {kl:.3g} nats per token{by}, {limit}")
        if not ratio <= accept.perplexity_ratio:
            limit = f"not at most {accept.perplexity_ratio:g}"
            problems.append(f"{ratio:.3f} times the model's perplexity{by}, {limit}")
    return f"{export.format} has {' and '.join(problems)}" if problems else ""


def _is_whole(home: Path, export: Export) -> bool:
    """Whether a format that exports.jsonl lists lies there as it was written."""
    folder = home / export.format
    return folder.is_dir() and not differences(folder, export.files)


def _yardstick(source: Source, passages: list[Passage], few: bool, say: Say) -> Yardstick:
    """What readers are measured with, said."""
    probe = leaving_room(source).probe
    sequences = of_probe(probe) if few else list(_sequences(source, passages, say))
    with screen.doing("computing the model's own predictions"):
        standard = yardstick(sequences, partial(predictions, source.model))
    what = "the probe's continuations, since held_out: names no rows" if few else "held-out rows"
    say(f"measured on {what}: {standard.words}")
    if not standard.tokens:
        raise UserError("held_out: no token of these rows is scored", "take other rows")
    return standard


def _sequences(source: Source, passages: list[Passage], say: Say) -> Iterator[Marked]:
    """Rows as training encodes them, what they teach marked."""
    candidate = _candidate(source, say)
    context = tokens_of(source.model.config.to_dict())
    window = min(WINDOW, context - 1) if context else WINDOW  # vLLM wants room for a token more
    for passage in passages:
        yield from windows(marked(candidate, passage), window, window // 2)


def _candidate(source: Source, say: Say) -> Candidate:
    """The model, by which rows are encoded."""
    return Candidate(
        label="the model",
        folder=source.folder,
        model=source.model,
        tokenizer=source.tokenizer,
        ranks=False,
        kwargs=source.template_kwargs,
        batch_size=1,
        say=say,
    )


WINDOW = 1024
"""Most tokens of a row that are read at once."""
