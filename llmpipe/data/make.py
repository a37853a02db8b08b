"""The steps from open sources to the files of a folder: tokenize, divide, write, count.

Two passes over the rows: the first tokenizes (in parallel) into a spool on disk and notes 8 bytes
of hash per row; then the held-out rows are known, and the second writes the files.

What is counted: `read = kept + rejected`. A kept row becomes one example, or several pieces if it
is a text longer than max_length (`split` rows, `pieces` extra examples); held-out rows and rows of
eval sources go to eval once; every other row goes to train as often as its source's weight says,
which may be never (`unseen`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from llmpipe import screen
from llmpipe.data import sources, template
from llmpipe.data.empty import longer, none_held_out, refuse_empty_sources, refuse_untrained_sources
from llmpipe.data.encode import Encoding
from llmpipe.data.intake import Intake, Totals, open_source, rejected_lines
from llmpipe.data.kinds import Kind
from llmpipe.data.prepared import Lengths, PreparedRows, RowCounts, SequenceCounts, TokenCounts
from llmpipe.data.spool import Division, Spool, held_out_cut
from llmpipe.data.tokenize import Task, pieces_of, tokenized
from llmpipe.data.write import Writer
from llmpipe.errors import DATA, NUMERIC, Say, UserError
from llmpipe.files.json import digest
from llmpipe.files.tables import in_bytes
from llmpipe.recipe.sections import Prepared

VERSION = 10  # of what is made; another one is made anew
SMALL = 4 << 20  # bytes of data below which one process is faster
LARGE_TOKENIZER = 8 << 20  # bytes; a larger one takes a second or more to read
SHOWN = 5  # rejected rows in a message
NOTHING_LEARNED = {"nothing to learn", "end of turn not supervised"}


def make(
    data: Prepared,
    kind: Kind,
    model: Path,
    folder: Path,
    origins: list[sources.Origin],
    seed: int,
    say: Say,
) -> PreparedRows:
    """Every file of a folder but prepared.json; what that will hold, but for key and seconds."""
    choice = _save_tokenizer(data, kind, model, folder, say)
    intakes = _open(data, kind, origins, choice, say)
    encoding = Encoding(folder / "tokenizer", choice.ends, choice.text_eos, data.preparation)
    task = Task(kind, encoding, seed)
    processes = _process_count(data, intakes)
    spool = Spool(folder / "spool.arrow", task.schema, len(data.train))
    first_rejected = _tokenize(intakes, task, processes, spool, folder / "rejected.jsonl")
    for intake in intakes:
        intake.finish(say)
    totals = Totals.of(intakes)
    if _any_kept(data, intakes):
        refuse_empty_sources(data, intakes)
    if totals.rejected.total() > data.max_rejected * totals.read or not _any_kept(data, intakes):
        raise _unusable(data, totals, folder, first_rejected)
    division = _divide(data, spool, seed)
    written = _write(spool, division, task, folder)
    spool.path.unlink()
    if not data.preparation.stream:
        save_file({"asks": written.asks}, folder / "seen.safetensors")
        _check_any_trained(written)
        refuse_untrained_sources(data, intakes, written.trained)
    return PreparedRows(
        version=VERSION,
        key="",
        sources=[intake.record() for intake in intakes],
        rows=_count_rows(totals, spool, division, written),
        tokens=_count_tokens(written),
        sequences=SequenceCounts(train=written.train.sequences, eval=written.held_out.sequences),
        lengths=_lengths(written.train),
        tokenizer=digest([choice.tokenizer.raw, choice.tokenizer.special]),
        template=choice.template and hashlib.sha256(choice.template.encode()).hexdigest(),
        template_name=choice.name,
        added_tokens=choice.added_tokens,
        stop_tokens=choice.stop_tokens,
        eos_token=choice.tokenizer.special["eos_token"],
        pad_token=choice.tokenizer.special["pad_token"],
        vocab_size=max(choice.tokenizer.backend.get_vocab().values()) + 1,
        content_digest=written.train.digest.hexdigest(),
        processes=processes,
        seconds=0,
    )


def _save_tokenizer(
    data: Prepared, kind: Kind, model: Path, folder: Path, say: Say
) -> template.Choice:
    name, kwargs = data.preparation.template, data.preparation.template_kwargs
    file = model / "tokenizer.json"
    if file.exists() and (size := file.stat().st_size) > LARGE_TOKENIZER:
        say(f"data: reading the tokenizer, {size / 1e6:.0f} MB")
    choice = template.choose(model, name, kwargs, thinks=kind.thinks)
    for note in choice.notes:
        say(f"data: {note}")
    choice.tokenizer.save(folder / "tokenizer", choice.template)
    return choice


def _open(
    data: Prepared, kind: Kind, origins: list[sources.Origin], choice: template.Choice, say: Say
) -> list[Intake]:
    has_template = choice.template is not None
    intakes = [open_source(origin, kind, has_template, say) for origin in origins]
    if data.preparation.stream:
        for intake in intakes[: len(data.train)]:
            intake.leave_to_training()
    return intakes


def _process_count(data: Prepared, intakes: list[Intake]) -> int:
    if data.processes != "auto":
        return data.processes
    from_files = all(intake.origin.files for intake in intakes)
    small = from_files and sum(intake.bytes for intake in intakes) < SMALL
    return 1 if small else len(os.sched_getaffinity(0))


def _tokenize(
    intakes: list[Intake], task: Task, processes: int, spool: Spool, rejected: Path
) -> list[str]:
    """Every row through the first pass, rejected ones into a file; the first of these in words."""
    in_words: list[str] = []
    size = sum(intake.bytes for intake in intakes)
    batches = tokenized([intake.origin for intake in intakes], task, processes)
    done = 0
    with (
        screen.doing("reading rows") as tell,
        rejected.open("w", encoding="utf-8") as lines,
        spool,
        contextlib.closing(batches),
    ):
        for source, chunk, batch in batches:
            intake = intakes[source]
            intake.count(chunk, batch)
            for line in rejected_lines(intake.origin, chunk.file, batch.rejected):
                lines.write(json.dumps(line._asdict()) + "\n")
                if len(in_words) < SHOWN:
                    in_words.append(f"{intake.origin.shown[chunk.file]}:{line.in_words()}")
            spool.add(source, batch.pieces)
            done += chunk.bytes
            share = f"{in_bytes(done)} of {in_bytes(size)}" if size else in_bytes(done)
            tell(f"reading rows: {share}")
    return in_words


def _any_kept(data: Prepared, intakes: list[Intake]) -> bool:
    """Whether a row is left to train on; of a stream nobody knows yet."""
    kept = (intake.counts["kept"] for intake in intakes[: len(data.train)])
    return data.preparation.stream or any(kept)


def _unusable(data: Prepared, totals: Totals, folder: Path, first_rejected: list[str]) -> UserError:
    """Too many rows were rejected, or none is left; rejected.jsonl stays in the cache."""
    kept = folder.parent / "rejected.jsonl"
    shutil.copyfile(folder / "rejected.jsonl", kept)
    count = totals.rejected.total()
    allowed = f"{count / totals.read:.1%}; data.max_rejected allows {data.max_rejected:.1%}"
    reasons = ", ".join(f"{rows:,} {reason}" for reason, rows in totals.rejected.most_common())
    lines = [f"{count:,} of {totals.read:,} rows cannot be used ({allowed}): {reasons}"]
    lines += first_rejected
    if count > len(first_rejected):
        lines.append("...")
    relative = os.path.relpath(kept)
    shown = kept if relative.startswith("..") else relative
    remedies = f"mend them, {longer(data, totals.longest)}or raise data.max_rejected"
    hint = f"all are listed in {shown}; {remedies}"
    nothing_learned = not totals.kept and set(totals.rejected) <= NOTHING_LEARNED
    return UserError("\n".join(lines), hint, NUMERIC if nothing_learned else DATA)


def _divide(data: Prepared, spool: Spool, seed: int) -> Division:
    cut = held_out_cut(spool.train_hashes, data.eval.holdout)
    if data.eval.holdout and not cut:
        raise none_held_out(data.eval.holdout, len(spool.train_hashes))
    return Division(cut, [source.weight for source in data.train], seed)


@dataclass(frozen=True)
class Written:
    """The two files of a folder, and what is known of their rows."""

    train: Writer
    held_out: Writer
    unseen: int
    """Rows that a weight below 1 leaves out."""
    held_out_bytes: int
    """Bytes of what the held-out rows teach."""
    trained: list[int]
    """Rows of each source to train on that are trained on at least once."""
    asks: np.ndarray
    """Hashes of what the rows to train on ask: uint64 (questions,), sorted, no two equal."""


def _write(spool: Spool, division: Division, task: Task, folder: Path) -> Written:
    """Every row of the spool to where it belongs."""
    kind, preparation = task.kind, task.encoding.preparation
    train = Writer(folder / "train.arrow", kind, preparation)
    held_out = Writer(folder / "eval.arrow", kind, preparation)
    unseen = held_out_bytes = 0
    of_source: Counter[int] = Counter()
    asks = array("Q")
    for source, batch in spool.batches():
        share = division.share(source, batch["hash"].to_numpy())
        first = batch["first"].to_numpy(zero_copy_only=False)
        unseen += int((first & (share.copies == 0)).sum())
        held_out_bytes += int(batch["bytes"].to_numpy()[first & share.held_out].sum())
        trained = first & ~share.held_out & (share.copies > 0)
        of_source[source] += int(trained.sum())
        asks.frombytes(batch["asks"].to_numpy()[trained].tobytes())
        for piece, is_held_out, copies in zip(pieces_of(batch, kind), *share, strict=True):
            writer = held_out if is_held_out else train
            for _ in range(copies):
                writer.add(piece)
    train.close()
    held_out.close()
    return Written(
        train,
        held_out,
        unseen,
        held_out_bytes,
        trained=[of_source[number] for number in range(len(division.weights))],
        asks=np.unique(np.asarray(asks)),
    )


def _check_any_trained(written: Written) -> None:
    if not written.train.rows:
        problem = "no row is left to train on: there would be nothing to learn"
        hint = "see data.eval.holdout and the weights of the sources"
        raise UserError(problem, hint, NUMERIC)


def _count_rows(totals: Totals, spool: Spool, division: Division, written: Written) -> RowCounts:
    hashes = spool.train_hashes
    trained = hashes[np.searchsorted(hashes, division.cut) :]
    return RowCounts(
        read=totals.read,
        kept=totals.kept,
        truncated=totals.truncated,
        split=totals.split,
        pieces=totals.pieces,
        rejected=totals.rejected.total(),
        rejected_by_reason=dict(sorted(totals.rejected.items())),
        duplicates=int((hashes[1:] == hashes[:-1]).sum()),
        unseen=written.unseen,
        overlap=int(np.isin(spool.eval_hashes, trained).sum()),
        train=written.train.rows,
        eval=written.held_out.rows,
    )


def _count_tokens(written: Written) -> TokenCounts:
    return TokenCounts(
        train=written.train.tokens,
        train_supervised=written.train.supervised,
        eval=written.held_out.tokens,
        eval_supervised=written.held_out.supervised,
        eval_bytes=written.held_out_bytes,
    )


def _lengths(train: Writer) -> Lengths:
    return Lengths(p50=train.quantile(0.5), p95=train.quantile(0.95), max=train.quantile(1.0))
