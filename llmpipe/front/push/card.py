"""The model card: manifests in, Markdown with its metadata out. Nothing is read and nothing asked
here, and no time of day is written, so that the same artifact has the same card.

The metadata is `metadata`'s, the text card.md.jinja.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmpipe import __version__
from llmpipe.files.tables import Table, in_bytes
from llmpipe.front.push.ancestry import Ancestor, Ancestry, Link, Outside
from llmpipe.front.push.facts import (
    GGUF,
    RANKS_OF_VLLM,
    AdapterFacts,
    ExportFacts,
    Facts,
    FormatFacts,
)
from llmpipe.front.push.licences import Licence
from llmpipe.front.push.markdown import block, code, plain, table
from llmpipe.front.push.measured import Measured, asked_in_training
from llmpipe.front.push.metadata import metadata
from llmpipe.front.push.rows import Rows, RowsFile
from llmpipe.report.measures import measure
from llmpipe.report.scoreboard import less, verdict_of
from llmpipe.report.text import in_words, number
from llmpipe.run.manifest import Manifest
from llmpipe.run.results import Cell, TaskResults

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")
"""Whose versions are named."""

MOST_FILES = 10
"""Files of rows that are named one by one; the manifest has all."""

QUESTION = "Why is the sky blue?"
LONGEST_QUESTION = 80
"""Characters of a prompt of the recipe's that stands in an example."""

ROOM = 64
ROOM_TO_THINK = 1024
"""Tokens that an example leaves for an answer."""


def card(facts: Facts) -> str:
    """README.md of the repository."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"code": code, "plain": plain, "block": block, "json": _json}
    manifest, template = facts.manifest, facts.template
    text = templates.get_template("card.md.jinja").render(
        metadata=metadata(facts),
        facts=facts,
        manifest=manifest,
        tokenizer=facts.model.tokenizer,
        opening=_opening(facts),
        question=question(facts.ancestry),
        lineage=_lineage(facts.ancestry),
        outside=[_outside(one) for one in facts.ancestry.outside],
        rows=_rows_table(facts.rows, facts.licences.rows),
        rows_files=_files_of_rows(facts.rows),
        evaluations=[_evaluation(one, facts) for one in facts.measured],
        time=_time(facts.ancestry.made),
        seconds=number(round(sum(one.manifest.seconds for one in facts.ancestry.made))),
        files=_files(facts.files),
        versions=_versions(manifest),
        use=_use(facts),
        packages=facts.export.packages if facts.export else [],
        formats=_formats(facts.export) if facts.export else "",
        remarks=list(_remarks(facts)),
        measured_on=_measured_on(facts),
        max_rank=_rank_to_tell(facts.adapter),
        for_vllm=template.option("--default-chat-template-kwargs") if template else "",
        for_llama_cpp=f" --jinja{template.option('--chat-template-kwargs')}" if template else "",
        room=ROOM_TO_THINK if template and template.thinks else ROOM,
    )
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text


def question(ancestry: Ancestry) -> str:
    """What an example asks: the first prompt of the recipes that is short."""
    for one in reversed(ancestry.made):
        samples = one.manifest.asked.recipe.get("samples")
        prompts = samples.get("prompts") if isinstance(samples, dict) else None
        for prompt in prompts if isinstance(prompts, list) else ():
            if isinstance(prompt, str) and prompt.isprintable() and len(prompt) <= LONGEST_QUESTION:
                return prompt
    return QUESTION


def _rank_to_tell(adapter: AdapterFacts | None) -> int | None:
    """What vLLM has to be told of an adapter's rank, which it takes in steps."""
    if adapter is None or adapter.rank <= RANKS_OF_VLLM[0]:
        return None
    return next((rank for rank in RANKS_OF_VLLM if rank >= adapter.rank), None)


def _json(value: str | list[str]) -> str:
    """Texts as Python and JSON write them."""
    return json.dumps(value, ensure_ascii=False)


# --- where it comes from --------------------------------------------------------------------------


def _opening(facts: Facts) -> str:
    """A sentence of what it is."""
    manifest, base = facts.manifest, facts.ancestry.base
    line = [one.manifest.stage for one in _main_line(facts.ancestry)]
    what = {"adapter": "An adapter", "reward-model": "A reward model"}.get(manifest.kind, "A model")
    if facts.export:
        what = {"adapter": "An adapter", GGUF: "GGUF files of a model"}.get(
            facts.export.kind, "A model"
        )
    if facts.adapter and facts.scores:
        what = "A reward model, as an adapter"
    whence = f"{plain(_short(base.reference))}" if base else "weights that were drawn"
    return f"{what}, made from {whence} by {in_words([code(stage) for stage in line])}."


def _main_line(ancestry: Ancestry) -> list[Ancestor]:
    """The artifact and those that its weights began with, oldest first."""
    by_fingerprint = {one.manifest.fingerprint: one for one in ancestry.made}
    line = [ancestry.itself]
    while True:
        links = ancestry.links[line[0].manifest.fingerprint]
        link = next((link for link in links if link.field == "model"), None)
        if link is None or not link.fingerprint:
            return line
        line.insert(0, by_fingerprint[link.fingerprint])


def _short(reference: str) -> str:
    """A reference without the folders that lead to a file."""
    is_file = reference.startswith((".", "/", "~"))
    return reference.rstrip("/").rpartition("/")[2] if is_file else reference


def _lineage(ancestry: Ancestry) -> str:
    headings = ["artifact", "stage", "made with", "optimizer steps", "tokens", "fingerprint"]
    rows = [_step(one, ancestry.links[one.manifest.fingerprint]) for one in ancestry.made]
    return table(headings, rows, frozenset({3, 4}))


def _step(one: Ancestor, links: list[Link]) -> list[str]:
    manifest, training = one.manifest, one.manifest.training
    made_with = [_made_with(link) for link in links]
    merged = f" with {code(manifest.merged_from)} merged" if manifest.merged_from else ""
    return [
        code(manifest.name) + merged,
        code(manifest.stage),
        ", ".join(made_with) or "drawn weights",
        number(training.published_step) if training else "",
        number(training.tokens) if training else "",
        code(manifest.fingerprint[:12]),
    ]


def _made_with(link: Link) -> str:
    role = "" if link.field == "model" else f" ({plain(link.role)})"
    return f"{code(_short(link.name))}{role}"


def _outside(one: Outside) -> str:
    """A model from elsewhere, with what tells it from others."""
    kind = "of the Hub, at commit" if one.revision else "sha256"
    where = "a GGUF file" if "gguf" in one.identity else "a folder"
    what = kind if one.revision else f"{where}, {kind}"
    field = "" if one.field == "model" else f" ({plain(one.field)} of {code(one.used_by.name)})"
    return f"{code(_short(one.reference))}{field}: {what} {code(one.sum)}"


# --- formats of an export -------------------------------------------------------------------------


def _use(facts: Facts) -> str:
    """Which text says how to use it."""
    if facts.export and facts.export.kind == GGUF:
        return GGUF
    return "scores" if facts.scores else "answers"


def _formats(export: ExportFacts) -> str:
    """How far each format is from the model; exports.jsonl has all digits."""
    names = ["file", "called"] if export.kind == GGUF else []
    headings = ["format", *names, "size", "read by", "mean KL", "perplexity", "equal answers"]
    first = 1 + len(names)
    to_the_right = frozenset({first, first + 2, first + 3, first + 4})
    return table(headings, [_format(one) for one in export.formats], to_the_right)


def _format(one: FormatFacts) -> list[str]:
    measured, agreement = one.export.measured, one.export.agreement
    names = [code(one.file), code(one.tag)] if one.file else []
    return [
        code(one.export.format),
        *names,
        in_bytes(one.export.size),
        plain(one.export.reader),
        _digits(measured.mean_kl),
        f"× {_digits(measured.perplexity_ratio)}",
        f"{agreement.equal_answers} of {agreement.answers}",
    ]


def _remarks(facts: Facts) -> Iterator[str]:
    """What is to be known of formats; what is to be of an adapter stands above."""
    exports = [one.export for one in facts.export.formats] if facts.export else []
    for export in exports:
        if export.warning:
            yield f"**Further from the model than its recipe accepts**: {plain(export.warning)}."
    notes = dict.fromkeys(note for export in exports for note in export.notes)
    for note in notes if not facts.adapter else ():
        whose = [code(export.format) for export in exports if note in export.notes]
        yield f"{in_words(whose)}: {plain(note)}"


def _measured_on(facts: Facts) -> str:
    """The tokens on which formats were held against the model."""
    if facts.export is None:
        return ""
    measured = facts.export.formats[0].export.measured
    rows = facts.manifest.asked.recipe.get("held_out")
    named = [str(one.get("path")) for one in rows or () if isinstance(one, dict)]
    what = (
        f"rows of {in_words([code(_short(name)) for name in named])}"
        if named
        else ("continuations of the probe's questions")
    )
    return f"{number(measured.tokens)} tokens of {number(measured.rows)} {what}"


# --- rows -----------------------------------------------------------------------------------------


def _rows_table(rows: list[Rows], licences: dict[str, Licence]) -> str:
    headings = ["rows", "used by", "read", "kept", "rejected", "truncated", "licence"]
    cells = [_rows_cells(one, licences.get(one.path)) for one in rows]
    return table(headings, cells, frozenset({2, 3, 4, 5})) if cells else ""


def _rows_cells(one: Rows, licence: Licence | None) -> list[str]:
    source = one.source
    counts = [source.read, source.kept, one.rejected, source.truncated]
    by = _licence(licence) if licence else f"made by {code(one.made_by)} from the rows above"
    return [code(one.path), code(one.used_by), *map(number, counts), by]


def _licence(licence: Licence) -> str:
    return f"{plain(licence.title)} ({plain(licence.by)})"


def _files_of_rows(rows: list[Rows]) -> list[str]:
    """A line for every source with the sums of its files, each source once."""
    sources = {(one.path, one.revision): one.source for one in rows}
    lines = []
    for (path, revision), source in sources.items():
        if revision:
            lines.append(f"{code(path)}: commit {code(revision)}")
        named = [_rows_file(file) for file in source.files[:MOST_FILES]]
        lines += [f"{code(path)}: {line}" for line in named]
        if more := len(source.files) - MOST_FILES:
            lines += [f"{code(path)}: {more:,} more files, in the manifest"] if more > 0 else []
    return lines


def _rows_file(file: RowsFile) -> str:
    return f"{code(file.name)}, {number(file.rows)} rows, sha256 {code(file.sha256)}"


# --- evaluations ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationText:
    """An evaluation as the card shows it."""

    name: str
    label: str
    notes: list[str]
    numbers: str
    differences: str


def _evaluation(one: Measured, facts: Facts) -> EvaluationText:
    ancestry = facts.ancestry
    notes = [_measured_with(one)]
    if facts.export and not facts.adapter:
        notes.append(f"Measured was {code(facts.model.name)}, and not what was made of it here.")
    if one.as_adapter:
        notes.append(f"Measured as the adapter {code(one.as_adapter)}, before it was merged.")
    for name, task in one.results.tasks.items():
        if seen := asked_in_training(task, ancestry):
            asked = f"{seen:,} of {task.n or 0:,} items of {code(name)}"
            notes.append(f"Asked in training, too, were {asked}.")
    if next(reversed(one.results.models)) == one.label:
        verdicts = {True: "does not hold", False: "holds"}
        gates = [(plain(gate.text), verdicts[gate.failed]) for gate in one.gates]
        notes += [f"A gate of the recipe {verdict}: {text}." for text, verdict in gates]
    headings = ["task", "metric", "model", "value", "95 % interval", "items"]
    numbers = [row for name, task in one.results.tasks.items() for row in _numbers(name, task, one)]
    differences = [
        row for name, task in one.results.tasks.items() for row in _differences(name, task, one)
    ]
    beside = ["task", "metric", "difference", "value", "95 % interval", "items", "reading"]
    to_the_right = frozenset({3, 5})
    return EvaluationText(
        name=one.name,
        label=one.label,
        notes=notes,
        numbers=table(headings, numbers, to_the_right),
        differences=table(beside, differences, to_the_right) if differences else "",
    )


def _measured_with(one: Measured) -> str:
    """In which precision, and what was measured beside it."""
    others = []
    for label in one.results.models:
        reference = str(one.manifest.models.get(f"models.{label}", {}).get("reference", "unknown"))
        if label != one.label:
            others.append(f"{plain(label)} ({code(_short(reference))})")
    beside = f"; beside it {in_words(others)}" if others else ""
    return f"Measured in {plain(one.results.models[one.label].dtype)}{beside}."


def _numbers(name: str, task: TaskResults, one: Measured) -> Iterator[list[str]]:
    """The artifact's number of each metric, and then the others'."""
    for metric, cells in task.metrics.items():
        first = {one.label: cells[one.label]} if one.label in cells else {}
        for label, cell in (first | cells).items() if first else ():
            shown = f"**{plain(label)}**" if label == one.label else plain(label)
            yield [code(name), _metric(metric), shown, *_cell(cell)]


def _differences(name: str, task: TaskResults, one: Measured) -> Iterator[list[str]]:
    """The artifact's numbers less those of the others, on the same items."""
    for metric in task.metrics:
        of_metric = task.differences.get(metric, {})
        for other in one.results.models:
            cell = less(of_metric, one.label, other) if other != one.label else None
            if cell:
                pair = f"{plain(one.label)} − {plain(other)}"
                verdict = verdict_of(cell, measure(metric))
                yield [code(name), _metric(metric), pair, *_cell(cell, "+"), verdict]


def _metric(metric: str) -> str:
    known = measure(metric)
    direction = f", {known.direction}" if known.direction else ""
    return f"{code(metric)} ({plain(known.title)}{direction})"


def _cell(cell: Cell, sign: str = "") -> list[str]:
    """Value, interval and items, with four digits; the exact ones are in the metadata."""
    if not math.isfinite(cell.value):
        return ["not a number", "", number(cell.n)]
    interval = f"{_digits(cell.low, sign)} to {_digits(cell.high, sign)}"
    return [
        _digits(cell.value, sign),
        interval if cell.has_interval else cell.lacks,
        number(cell.n),
    ]


def _digits(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4g}".replace("-", "−")


# --- time, files, versions ------------------------------------------------------------------------


def _time(made: list[Ancestor]) -> str:
    headings = ["artifact", "seconds", "of these in training", "processes", "device"]
    return table(headings, [_time_cells(one) for one in made], frozenset({1, 2, 3}))


def _time_cells(one: Ancestor) -> list[str]:
    manifest, training = one.manifest, one.manifest.training
    hardware = manifest.hardware or {}
    return [
        code(manifest.name),
        number(manifest.seconds),
        number(training.seconds) if training else "",
        number(hardware.get("processes")),
        plain(in_words(_devices(manifest))),
    ]


def _devices(manifest: Manifest) -> list[str]:
    """Every device that computed some of its steps."""
    legs = manifest.training.legs if manifest.training else []
    names = [leg.platform["device"] for leg in legs if "device" in leg.platform]
    hardware = manifest.hardware or {}
    return list(dict.fromkeys(names)) or [str(hardware.get("device_name", "unknown"))]


def _files(files: Table) -> str:
    rows = [[code(name), f"{entry.size:,}", code(entry.sha256)] for name, entry in files.items()]
    return table(["file", "bytes", "sha256"], rows, frozenset({1}))


def _versions(manifest: Manifest) -> str:
    """By what the artifact was made."""
    commit = f" ({manifest.git})" if manifest.git else ""
    known = [f"{name} {version}" for name in LIBRARIES if (version := manifest.versions.get(name))]
    return plain(in_words([f"llmpipe {manifest.llmpipe or __version__}{commit}", *known]))
