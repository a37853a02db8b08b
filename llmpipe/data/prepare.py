"""Sources -> a folder of tokens, made once, kept by content, mapped into memory by every process that trains.

    cache/<key>/train.arrow, eval.arrow   int32 lists, see `pack`
                rejected.jsonl            {"file", "row", "reason", "detail"}, every rejected row
                seen.safetensors          "asks": uint64, sorted: what the rows to train on ask, for `eval` to compare
                tokenizer/                the tokenizer that made them and that is published with the model
                prepared.json             counts, lengths, digests; written last

Two passes over the rows: the first tokenizes (in parallel) into a spool on disk and notes 8 bytes of hash per row; then
the held-out rows are known, and the second writes the files. The result does not depend on how many processes there
were.

What is counted: `read = kept + rejected`. A kept row becomes one example, or several pieces if it is a text longer than
max_length (`split` rows, `pieces` extra examples); held-out rows and rows of eval sources go to eval once; every other
row goes to train as often as its source's weight says, which may be never (`unseen`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file
from tqdm import tqdm

from llmpipe.data import sources, template, tokenizer
from llmpipe.data.encode import Batch, Encoder, schema_of, start_worker, work
from llmpipe.data.formats import Rejected
from llmpipe.data.pack import COLUMNS, Blocks, Output, PairOutput, PromptOutput
from llmpipe.data.prepared import PreparedRows
from llmpipe.errors import DATA, NUMERIC, RESOURCES, Say, UserError
from llmpipe.files import digest, disk_full, files_below, fsync, read_json
from llmpipe.recipe.sections import Data, science

VERSION = 7
COUNTS = ("read", "kept", "truncated", "split", "pieces")  # rows, and for `pieces` examples
SMALL = 4 << 20  # bytes of data below which one process is faster
NOTHING_LEARNED = {"nothing to learn", "end of turn not supervised"}


def key_of(
    data: Data, model: Path, seed: int, pinned: dict[str, str] | None = None
) -> tuple[str, list[sources.Origin]]:
    """What names the prepared data, and where it comes from. Files are hashed, nothing is tokenized. `pinned`: commits
    of Hub data sets that are known already, by `sources.hub_key`.

    The key changes with the content of every file, the tokenizer, the template and the recipe's fields, not with where
    things lie or what they are called. Raises UserError for a missing or unreadable file.
    """
    trained = [sources.Origin(source, pinned or {}, data.stream) for source in data.train]
    evaluated = [sources.Origin(source, pinned or {}) for source in data.eval.sources]
    fields = science(data)
    fields["train"] = [origin.identity() for origin in trained]
    fields["eval"]["sources"] = [origin.identity() for origin in evaluated]
    fields["template"] = [data.template == "auto", template.template_source(model, data.template)]
    key = digest([VERSION, seed, fields, tokenizer.identity(model)])
    return key, [*trained, *evaluated]


def prepare(
    data: Data,
    model: Path,
    cache: Path,
    *,
    seed: int,
    say: Say,
    pinned: dict[str, str] | None = None,
) -> PreparedRows:
    """Rows -> tokens, in a folder of `cache`, and what is known of them.

    Raises UserError: code 2 for data that cannot be read or too many rejected rows, 3 for a broken tokenizer, 4 when
    nothing would be learned, 5 when a worker process dies or the disk is full.
    """
    started = time.monotonic()
    key, origins = key_of(data, model, seed, pinned)
    final = cache / key
    if ready := PreparedRows.from_file(final / "prepared.json"):
        say(f"data: {ready.rows.train:,} rows ready (cached)")
        return ready.model_copy(update={"data": key})
    for left in cache.glob(f".{key}.*"):  # of a process that was killed
        if not _other_runs(int(left.suffix[1:])):
            shutil.rmtree(left, ignore_errors=True)
    temporary = cache / f".{key}.{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        values = _make(data, model, temporary, origins, seed, say)
        seconds = round(time.monotonic() - started, 3)
        ready = PreparedRows(version=VERSION, key=key, seconds=seconds, **values)
        for path in (*files_below(temporary), temporary / "tokenizer"):
            fsync(path)
        ready.to_file(temporary / "prepared.json")
        try:
            temporary.rename(final)
        except OSError:  # another process was faster, or an unfinished folder is in the way
            if not read_json(final / "prepared.json"):
                shutil.rmtree(final)
                temporary.rename(final)
        fsync(cache)
    except OSError as error:
        raise disk_full(error, cache) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"data: {_in_words(ready, data)}")
    return ready.model_copy(update={"data": key})


def _in_words(ready: PreparedRows, data: Data) -> str:
    rows, tokens = ready.rows, ready.tokens
    learned = f"{tokens.train_supervised / max(tokens.train, 1):.0%} of them learned"
    what = f"{tokens.train:,} tokens, {learned}; {ready.sequences.train:,} sequences"
    if data.kind == "prompts":
        what = f"prompts of {tokens.train:,} tokens"
    what = f"{rows.train:,} rows to train on; {what}"
    if data.stream:
        what = "to be tokenized in training"
    notes = {
        "held out": rows.eval,
        "rejected": rows.rejected,
        "truncated": rows.truncated,
        "split": rows.split,
    }
    return what + "".join(f"; {count:,} {name}" for name, count in notes.items() if count)


def _other_runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return process != os.getpid()


def _make(
    data: Data, model: Path, folder: Path, origins: list[sources.Origin], seed: int, say: Say
) -> dict[str, Any]:
    kwargs = data.chat_template_kwargs
    choice = template.Choice(model, data.template, kwargs)
    for note in choice.notes:
        say(f"data: {note}")
    choice.tokenizer.save(folder / "tokenizer", choice.template)
    spec = (
        folder / "tokenizer",
        choice.ends,
        kwargs,
        choice.text_eos,
        data.max_length,
        data.loss,
        seed,
        data.kind,
    )
    records = [_open(origin, data.kind, say, choice.template is not None) for origin in origins]
    streamed = origins[: len(data.train)] if data.stream else []
    for origin in streamed:
        origin.chunks = iter(())  # left to the training
    size = sum(file.bytes for origin in origins if origin not in streamed for file in origin.files)
    small = size < SMALL and all(origin.files for origin in origins)
    auto = 1 if small else len(os.sched_getaffinity(0))
    processes = auto if data.processes == "auto" else data.processes

    hashes = (
        array("Q"),
        array("Q"),
    )  # one for each kept row: of the sources to train on, and of those to evaluate on
    spooled: list[int] = []  # the source of each batch of the spool
    errors: list[str] = []  # the first rows rejected
    spool_path = folder / "spool.arrow"
    with (
        tqdm(total=size, desc="data", unit="B", unit_scale=True, leave=False, disable=None) as bar,
        folder.joinpath("rejected.jsonl").open("w", encoding="utf-8") as rejected,
        pa.ipc.new_stream(str(spool_path), schema_of(data.kind)) as spool,
        contextlib.closing(encoded(origins, spec, processes)) as batches,
    ):
        for index, chunk, batch in batches:
            for line, text in _count(records[index], origins[index], chunk, batch):
                rejected.write(line + "\n")
                errors += [text] if len(errors) < 5 else []
            first = batch.pieces["first"].to_numpy(zero_copy_only=False)
            hashes[index >= len(data.train)].frombytes(
                batch.pieces["hash"].to_numpy()[first].tobytes()
            )
            spool.write_batch(batch.pieces)
            spooled.append(index)
            bar.update(chunk.bytes)
    totals = {name: sum(record[name] for record in records) for name in COUNTS}
    reasons = sum((Counter(record["rejected"]) for record in records), Counter())
    kept = sum(record["kept"] for record in records[: len(data.train)])
    if not (kept or streamed) or reasons.total() > data.max_rejected * totals["read"]:
        _refuse(data, folder, totals, reasons, errors)

    of_train, of_eval = map(np.asarray, hashes)
    of_train.sort()
    held = _held(of_train, data.eval.holdout)
    if data.eval.holdout and not held:
        say("data: all rows are equal, so none is held out")
    output = {"rows": Output, "blocks": Blocks, "pairs": PairOutput, "prompts": PromptOutput}[
        data.kind
    ]
    train, held_out = (
        output(folder / f"{name}.arrow", data.max_length, data.packing)
        for name in ("train", "eval")
    )
    weights = [source.weight for source in data.train]
    names = list(COLUMNS[data.kind])
    unseen, asks, size_held = _replay(
        spool_path, spooled, names, train, held_out, held, weights, seed
    )
    spool_path.unlink()
    if not streamed:
        save_file({"asks": asks}, folder / "seen.safetensors")
    if not (train.rows or streamed):
        hint = "see data.eval.holdout and the weights of the sources"
        raise UserError(
            "no row is left to train on: there would be nothing to learn", hint, NUMERIC
        )
    trained = of_train[np.searchsorted(of_train, held) :]
    return {
        "sources": records,
        "rows": totals | {
            "rejected": reasons.total(), "rejected_by_reason": dict(sorted(reasons.items())),
            "duplicates": int((of_train[1:] == of_train[:-1]).sum()), "unseen": unseen,
            "overlap": int(np.isin(of_eval, trained).sum()), "train": train.rows, "eval": held_out.rows,
        },
        "tokens": {
            "train": train.tokens, "train_supervised": train.supervised,
            "eval": held_out.tokens, "eval_supervised": held_out.supervised, "eval_bytes": size_held,
        },
        "sequences": {"train": train.sequences, "eval": held_out.sequences},
        "lengths": {"p50": train.quantile(0.5), "p95": train.quantile(0.95), "max": train.quantile(1.0)},
        "tokenizer": digest([choice.tokenizer.raw, choice.tokenizer.special]),  # what decides token ids
        "template": choice.template and hashlib.sha256(choice.template.encode()).hexdigest(),
        "template_name": choice.name, "added_tokens": choice.added, "stop_tokens": choice.stops,
        "eos_token": choice.tokenizer.special["eos_token"], "pad_token": choice.tokenizer.special["pad_token"],
        "vocab_size": max(choice.tokenizer.backend.get_vocab().values()) + 1,
        "content_digest": train.digest.hexdigest(),
        "processes": processes,
    }  # fmt: skip


def _refuse(data: Data, folder: Path, totals: dict, reasons: Counter, errors: list[str]) -> None:
    """Stop when too many rows were rejected, or none is left; rejected.jsonl stays in the cache."""
    kept = folder.parent / "rejected.jsonl"
    shutil.copyfile(folder / "rejected.jsonl", kept)
    near, count = os.path.relpath(kept), reasons.total()
    allowed = f"({count / totals['read']:.1%}; data.max_rejected allows {data.max_rejected:.1%})"
    by_reason = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    lines = [f"{count:,} of {totals['read']:,} rows cannot be used {allowed}: {by_reason}", *errors]
    raise UserError(
        "\n".join(lines + ["..."] * (count > len(errors))),
        f"all are listed in {kept if near.startswith('..') else near}; mend them, or raise data.max_rejected",
        NUMERIC if not totals["kept"] and set(reasons) <= NOTHING_LEARNED else DATA,
    )


def _open(origin: sources.Origin, kind: str, say: Say, has_template: bool) -> dict[str, Any]:
    """Open a source; what the manifest says of it, with counts of zero. Raises UserError for rows that do not fit."""
    origin.open()
    shown, format = origin.source.path, origin.format
    fits = {"pairs": format == "preference", "prompts": format not in ("text", "choice")}
    purpose = {
        "preference": "reward and dpo",
        "prompt": "ppo",
        "choice": "eval",
        "text": "pretrain and sft",
    }
    if not fits.get(kind, format not in ("preference", "prompt", "choice")) and kind != "pairs":
        raise UserError(f"{shown}: format {format} is for {purpose[format]}, not for this stage")
    if kind == "pairs" and format != "preference":
        problem = f"{shown}: format {format} has no chosen and rejected answers"
        raise UserError(
            problem, "map yours with columns, such as {better: chosen, worse: rejected}"
        )
    turns = any(
        isinstance(row.get(name), list | dict) for row in origin.sample for name in origin.columns
    )
    turns = turns or bool(
        {"system", "tools"} & set(origin.columns.values())
    )  # then every row is a conversation
    text = kind == "pairs" or (
        kind == "prompts" and format in ("prompt", "prompt-completion", "preference")
    )
    if text and has_template and not turns:
        say(f"data: {shown}: prompts and answers are plain text, which no chat template touches")
    if not has_template and (
        format in ("alpaca", "sharegpt", "messages")
        or (format in ("prompt-completion", "preference", "prompt") and turns)
    ):
        problem = (
            f"{shown}: the rows are conversations, and the model's tokenizer has no chat template"
        )
        raise UserError(problem, "set data.template: chatml")
    names = ", ".join(
        yours if yours == name else f"{yours} as {name}" for yours, name in origin.columns.items()
    )
    unused = f"; not used: {', '.join(origin.unused)}" if origin.unused else ""
    say(f"data: {shown}: format {format} ({names}){unused}")
    return {
        "path": origin.name, "format": format, "columns": origin.columns, "unused_columns": origin.unused,
        "files": [{"name": file.name, "sha256": file.sha256, "rows": 0} for file in origin.files],
        "revision": origin.revision,
        "weight": getattr(origin.source, "weight", 1.0),  # rows to evaluate on have none
        "rejected": {}, **dict.fromkeys(COUNTS, 0),
    }  # fmt: skip


def _count(
    record: dict, origin: sources.Origin, chunk: sources.Chunk, batch: Batch
) -> Iterator[tuple[str, str]]:
    """Add a batch to its source's record; a line of rejected.jsonl and one for people of each rejected row."""
    for name, count in batch.counts.items():
        record[name] += count
    if record["files"]:
        record["files"][chunk.file]["rows"] += batch.counts["read"]
    name = origin.files[chunk.file].name if origin.files else origin.name
    for row, reason, detail in batch.rejected:
        record["rejected"][reason] = record["rejected"].get(reason, 0) + 1
        line = {"file": name, "row": row, "reason": reason, "detail": detail}
        yield json.dumps(line), f"{origin.shown[chunk.file]}:{row}: {Rejected(reason, detail)}"


def encoded(
    origins: list[sources.Origin], spec: tuple, processes: int, first: int = 0
) -> Iterator[tuple[int, sources.Chunk, Batch]]:
    """Every chunk of the sources, from chunk `first` on, with its tokens, in order; a few are under way at once."""
    tasks = (
        (index, chunk, origin) for index, origin in enumerate(origins) for chunk in origin.chunks
    )
    tasks = islice(tasks, first, None)
    if processes == 1:
        encoder = Encoder(*spec)
        for index, chunk, origin in tasks:
            yield index, chunk, encoder.batch(chunk.rows, origin.format, origin.columns)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # Never fork: torch, Arrow and tokenizers may hold threads by now.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), start_worker, spec)
    under_way: deque = deque()
    try:
        for index, chunk, origin in tasks:
            future = pool.submit(work, chunk.rows, origin.format, origin.columns)
            under_way.append((index, chunk._replace(rows=[]), future))
            if len(under_way) > 3 * processes:
                index, chunk, future = under_way.popleft()
                yield index, chunk, future.result()
        while under_way:
            index, chunk, future = under_way.popleft()
            yield index, chunk, future.result()
    except BrokenProcessPool:
        reason = "a process that tokenizes died, most likely for lack of memory"
        raise UserError(reason, "set data.processes to a smaller number", RESOURCES) from None
    finally:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=not under_way, cancel_futures=True)
        if under_way:  # stopped early: by Ctrl-C, or by an error in the data
            for worker in workers:
                worker.kill()


def _held(hashes: np.ndarray, share: float) -> np.uint64:
    """The number below which a row's hash means that it is held out. `hashes`: uint64 (rows,), sorted.

    Equal rows stay together: the cut falls between two different hashes, at or before the wanted number of rows.
    """
    if not share or not len(hashes) or hashes[0] == hashes[-1]:
        return np.uint64(0)
    cut = hashes[min(max(1, round(share * len(hashes))), len(hashes) - 1)]
    return cut if cut > hashes[0] else hashes[np.searchsorted(hashes, cut, "right")]


def _replay(
    spool: Path,
    spooled: list[int],
    names: list[str],
    train: Output,
    held_out: Output,
    held: np.uint64,
    weights: list[float],
    seed: int,
) -> tuple[int, np.ndarray, int]:
    """Every spooled piece, its columns in `names`, to where it belongs. Returns how many rows go nowhere (weight < 1),
    what those in `train` ask, uint64 (questions,), sorted, and the size in bytes of what is held out."""
    unseen = held_bytes = 0
    asks = array("Q")
    with pa.OSFile(str(spool)) as file, pa.ipc.open_stream(file) as reader:
        for index, batch in zip(spooled, reader, strict=True):
            parts = [
                (batch[name].flatten().to_numpy(), batch[name].offsets.to_numpy()) for name in names
            ]
            hashes, first = batch["hash"].to_numpy(), batch["first"].to_numpy(zero_copy_only=False)
            to_train = index < len(weights)
            out, weight = (
                (hashes < held, weights[index]) if to_train else (np.full(len(hashes), True), 0)
            )
            # the hash chose the held-out rows already, so it is mixed anew for the weight
            luck = (hashes ^ np.uint64(seed * 2654435761 + index)) * np.uint64(0x9E3779B97F4A7C15)
            luck = (luck ^ (luck >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
            copies = int(weight) + ((luck >> np.uint64(11)) / 2.0**53 < weight - int(weight))
            unseen += int((first & ~out & (copies == 0)).sum())
            held_bytes += int(batch["bytes"].to_numpy()[first & out].sum())
            asks.frombytes(batch["asks"].to_numpy()[first & ~out & (copies > 0)].tobytes())
            for i in range(len(hashes)):
                for _ in range(1 if out[i] else copies[i]):
                    (held_out if out[i] else train).add(
                        *(values[at[i] : at[i + 1]] for values, at in parts)
                    )
    train.close()
    held_out.close()
    return unseen, np.unique(np.asarray(asks)), held_bytes
