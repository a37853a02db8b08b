"""Sources -> a folder of tokens, made once, kept by content, mapped into memory by every process that trains.

    cache/<key>/train.arrow, eval.arrow   int32 lists, see `pack`
                rejected.jsonl            {"file", "row", "reason", "detail"}, every rejected row
                tokenizer/                the tokenizer that made them and that is published with the model
                prepared.json             counts, lengths, digests; written last

Two passes over the rows, one row at a time in memory: the first tokenizes (in parallel) into a spool on disk and notes
8 bytes of hash per row; then the held-out rows are known, and the second writes the files. The result does not depend
on how many processes there were.

What is counted: `read = kept + rejected`. A kept row becomes one example, or several pieces if it is a text longer than
max_length (`split` rows, `pieces` extra examples); held-out rows and rows of eval sources go to eval once; every other
row goes to train as often as its source's weight says, which may be never (`unseen`).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmpipe.data import encode, sources, templates, tokenizer
from llmpipe.data.formats import detect
from llmpipe.data.pack import Output
from llmpipe.errors import DATA, NUMERIC, RESOURCES, UserError
from llmpipe.recipe import Data, Source, digest, is_local, science

VERSION = 1
SMALL = 4 << 20  # bytes of data below which one process is faster
NOTHING_LEARNED = {"nothing to learn", "end of turn not supervised"}

# --- the key ---------------------------------------------------------------------------------------------------------


def _origin(source: Source) -> dict[str, Any]:
    """Which bytes a source means: its files with their hashes, or a Hub commit."""
    if is_local(source.path):
        files = sources.files_of(source)
        return {"path": _relative(source.path), "files": files, "revision": None}
    return {"path": source.path, "files": [], "revision": sources.hub_revision(source)}


def _relative(path: str) -> str:
    """Records hold no absolute path."""
    return Path(path).name if os.path.isabs(Path(path).expanduser()) else path


def plan_key(data: Data, model: Path, seed: int, purpose: str = "sft") -> dict[str, Any]:
    """What identifies prepared data: `{"key", "sources": [{"path", "files", "revision"}], "tokenizer", "template"}`.

    Cheap: files are hashed, nothing is tokenized. The key changes with the content of every file, the tokenizer, the
    template and the recipe's fields, not with where things lie. Raises UserError for a missing or unreadable file.
    """
    plan, _ = _plan(data, model, seed, purpose)
    return plan


def _plan(data: Data, model: Path, seed: int, purpose: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    origins = [_origin(source) for source in (*data.train, *data.eval.sources)]
    source = templates.template_source(model, data.template)
    named = [
        {**origin, "files": [{"name": f.name, "sha256": f.sha256, "bytes": f.bytes} for f in origin["files"]]}
        for origin in origins
    ]
    fields = science(data)
    for section in (*fields["train"], *fields["eval"]["sources"]):
        del section["path"]
    fields["template"] = None  # its text counts, not its name
    plan = {"tokenizer": tokenizer.identity(model), "template": None if source is None else digest(source)}
    contents = [{"files": [(f["name"], f["sha256"]) for f in o["files"]], "revision": o["revision"]} for o in named]
    key = digest(
        {
            "version": VERSION,
            "purpose": purpose,
            "seed": seed,
            "data": fields,
            "sources": contents,
            "own": data.template == "auto",
            **plan,
        }
    )
    return {"key": key, "sources": named, **plan}, origins


# --- the whole -------------------------------------------------------------------------------------------------------


def prepare(
    data: Data, model: Path, cache: Path, *, seed: int, say: Callable[[str], None], progress: bool = True
) -> Path:
    """Rows -> tokens for training on text and conversations; the folder with `prepared.json`.

    Raises UserError: code 2 for data that cannot be read or too many rejected rows, 3 for a broken tokenizer, 4 when
    nothing would be learned, 5 when a worker process dies.
    """
    started = time.monotonic()
    plan, origins = _plan(data, model, seed, "sft")
    final = cache / plan["key"]
    if final.joinpath("prepared.json").is_file():
        rows = json.loads(final.joinpath("prepared.json").read_text(encoding="utf-8"))["rows"]
        say(f"data: {rows['train']:,} rows ready (cached)")
        return final
    temporary = cache / f".{plan['key']}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        record = _make(data, model, cache, temporary, seed, say, progress, plan, origins)
        record["seconds"] = round(time.monotonic() - started, 3)
        _write(temporary / "prepared.json", json.dumps(record, indent=2, ensure_ascii=False))
        for folder in (temporary / "tokenizer", temporary):
            for path in folder.iterdir():
                _sync(path)
        try:
            temporary.rename(final)
        except OSError:  # another process was faster, or an unfinished folder is in the way
            if not final.joinpath("prepared.json").is_file():
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
        _sync(cache)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"the disk of {_near(cache)} is full", "make room, and start again", RESOURCES) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    rows, tokens = record["rows"], record["tokens"]
    learned = tokens["train_supervised"] / max(1, tokens["train"])
    say(
        f"data: {rows['train']:,} rows to train on"
        + (f", {rows['eval']:,} held out" if rows["eval"] else "")
        + f"; {tokens['train']:,} tokens, {learned:.0%} of them learned; {record['sequences']['train']:,} sequences"
        + (f"; {rows['rejected']:,} rejected" if rows["rejected"] else "")
        + (f"; {rows['truncated']:,} truncated" if rows["truncated"] else "")
        + (f"; {rows['split']:,} split" if rows["split"] else "")
    )
    return final


def _make(
    data: Data,
    model: Path,
    cache: Path,
    folder: Path,
    seed: int,
    say: Callable[[str], None],
    progress: bool,
    plan: dict,
    origins: list[dict],
) -> dict[str, Any]:
    choice = templates.Choice(model, data.template, data.chat_template_kwargs)
    for note in choice.notes:
        say(f"data: {note}")
    choice.save(folder / "tokenizer")
    how = {"text_eos": choice.text_eos, "max_length": data.max_length, "loss": data.loss, "seed": seed}
    encoder = encode.Encoder(choice.tokenizer, choice.template, **how)
    spec = {
        "folder": str(folder / "tokenizer"),
        "ends": list(choice.template.ends if choice.template else ()),
        "kwargs": data.chat_template_kwargs,
        **how,
    }
    all_sources = [*data.train, *data.eval.sources]
    streams = [
        _stream(source, origin, say, choice.template is not None)
        for source, origin in zip(all_sources, origins, strict=True)
    ]
    size = sum(file.bytes for origin in origins for file in origin["files"])
    small = size < SMALL and all(origin["files"] for origin in origins)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = (1 if small else cores) if data.processes == "auto" else max(1, data.processes)

    with _Spool(folder) as spool:
        bar = _Bar(progress, size)
        with contextlib.closing(_encoded(streams, encoder, spec, processes)) as batches:
            for index, chunk, batch in batches:
                spool.add(index, index >= len(data.train), origins[index], streams[index]["record"], chunk, batch)
                bar.show(spool.read, index, chunk, origins)
        bar.done()
        records = [stream["record"] for stream in streams]
        _refuse(data, cache, folder, records, spool)
        held = spool.finish(data.eval.holdout, say)
        train = Output(folder / "train.arrow", data.max_length, data.packing)
        held_out = Output(folder / "eval.arrow", data.max_length, data.packing)
        unseen = spool.replay(train, held_out, held, [source.weight for source in data.train], seed)
        overlap = spool.overlap(held)
    wrote = train.close()
    held_out.close()
    if not wrote or not train.supervised:
        raise UserError(
            "no row is left to train on: there would be nothing to learn",
            "see data.eval.holdout and the weights of the sources",
            NUMERIC,
        )
    total = {name: sum(record[name] for record in records) for name in ("read", "kept", "truncated", "split", "pieces")}
    reasons = sum((Counter(record["rejected"]) for record in records), Counter())
    special = choice.tokenizer.special
    return {
        "version": VERSION,
        "key": plan["key"],
        "sources": records,
        "rows": {
            **total,
            "rejected": sum(reasons.values()),
            "rejected_by_reason": dict(sorted(reasons.items())),
            "duplicates": spool.duplicates,
            "unseen": unseen,
            "overlap": overlap,
            "train": train.rows,
            "eval": held_out.rows,
        },
        "tokens": {
            "train": train.tokens,
            "train_supervised": train.supervised,
            "eval": held_out.tokens,
            "eval_supervised": held_out.supervised,
        },
        "sequences": {"train": train.sequences, "eval": held_out.sequences},
        "lengths": {"p50": train.quantile(0.5), "p95": train.quantile(0.95), "max": train.quantile(1.0)},
        "tokenizer": choice.tokenizer.sha256,
        "template": choice.template_sha,
        "template_name": choice.name,
        "added_tokens": choice.added,
        "stop_tokens": choice.stops,
        "eos_token": special["eos_token"],
        "pad_token": special["pad_token"],
        "vocab_size": choice.tokenizer.vocab_size,
        "content_digest": train.digest.hexdigest(),
        "processes": processes,
    }


# --- reading and tokenizing ------------------------------------------------------------------------------------------


def _stream(source: Source, origin: dict, say: Callable[[str], None], has_template: bool) -> dict[str, Any]:
    """Open a source and find its format from its first rows. Raises UserError."""
    files: list[sources.File] = origin["files"]
    shown = source.path
    if files:
        chunks = sources.chunks(files, source.limit)
    else:
        chunks = sources.hub_chunks(source, origin["revision"])
    first = next(chunks, None)
    if first is None:
        raise UserError(f"{shown}: has no rows")
    rows = [sources.parse(row) if isinstance(row, bytes) else row for _, row in first.rows[:20]]
    sample = [row for row in rows if isinstance(row, dict)]
    if not sample:
        number, bad = first.rows[0][0], rows[0]
        name = files[first.file].shown if files else shown
        raise UserError(f"{name}:{number}: {bad.reason}: {bad.detail}", "none of the first rows can be read")
    columns = list(dict.fromkeys(name for row in sample for name in row))
    format, used, unused = detect(columns, source.format, source.columns, shown)
    if format in ("preference", "prompt"):
        purpose = "reward and dpo" if format == "preference" else "ppo and grpo"
        raise UserError(f"{shown}: format {format} is for {purpose}, not for sft")
    chat = format in ("alpaca", "sharegpt", "messages") or any(
        isinstance(row.get(yours), list | dict) for row in sample for yours in used if format == "prompt-completion"
    )
    if chat and not has_template:
        raise UserError(
            f"{shown}: the rows are conversations, and the model's tokenizer has no chat template",
            "set data.template: chatml",
        )
    names = ", ".join(yours if yours == name else f"{yours} as {name}" for yours, name in used.items())
    say(f"data: {shown}: format {format} ({names})" + (f"; not used: {', '.join(unused)}" if unused else ""))
    record = {
        "path": origin["path"],
        "format": format,
        "columns": used,
        "unused_columns": unused,
        "files": [{"name": file.name, "sha256": file.sha256, "rows": 0} for file in files],
        "revision": origin["revision"],
        "weight": source.weight,
        "read": 0,
        "kept": 0,
        "rejected": {},
        "truncated": 0,
        "split": 0,
        "pieces": 0,
    }
    return {"chunks": itertools.chain([first], chunks), "format": format, "columns": used, "record": record}


def _encoded(
    streams: list[dict], encoder: encode.Encoder, spec: dict, processes: int
) -> Iterator[tuple[int, sources.Chunk, encode.Batch]]:
    """Every chunk of every stream with its tokens, in order; at most a few chunks per process are under way."""
    tasks = ((index, chunk) for index, stream in enumerate(streams) for chunk in stream["chunks"])
    if processes == 1:
        for index, chunk in tasks:
            yield index, chunk, encoder.batch(chunk.rows, streams[index]["format"], streams[index]["columns"])
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # Never fork: torch, Arrow and tokenizers may hold threads by now.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), encode.start_worker, (spec,))
    under_way: deque = deque()
    try:
        for index, chunk in tasks:
            stream = streams[index]
            future = pool.submit(encode.work, chunk.rows, stream["format"], stream["columns"])
            under_way.append((index, chunk._replace(rows=[]), future))
            if len(under_way) > 3 * processes:
                index, chunk, future = under_way.popleft()
                yield index, chunk, future.result()
        while under_way:
            index, chunk, future = under_way.popleft()
            yield index, chunk, future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process that tokenizes died, most likely for lack of memory",
            "set data.processes to a smaller number",
            RESOURCES,
        ) from None
    finally:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=not under_way, cancel_futures=True)
        if under_way:  # stopped early: by Ctrl-C, or by an error in the data
            for worker in workers:
                worker.kill()


class _Spool:
    """Tokens of the first pass on disk, and 8 bytes of hash per row; both go when the second pass is over."""

    SCHEMA = pa.schema(
        [
            ("ids", pa.list_(pa.int32())),
            ("labels", pa.list_(pa.int32())),
            ("hash", pa.uint64()),
            ("source", pa.int32()),
            ("first", pa.bool_()),
        ]
    )

    def __init__(self, folder: Path):
        self.read = self.rejected_count = self.duplicates = 0
        self.paths = {name: folder / f"spool.{name}" for name in ("arrow", "train", "eval")}
        self.files = {name: path.open("wb") for name, path in self.paths.items()}
        self.writer = pa.ipc.new_stream(self.files["arrow"], self.SCHEMA)
        self.rejected = folder.joinpath("rejected.jsonl").open("w", encoding="utf-8")
        self.first_rejected: list[str] = []
        self.eval_sources: set[int] = set()

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self.files.values():
            file.close()
        self.rejected.close()
        for path in self.paths.values():
            path.unlink()

    def add(
        self, index: int, is_eval: bool, origin: dict, record: dict, chunk: sources.Chunk, batch: encode.Batch
    ) -> None:
        file = origin["files"][chunk.file] if origin["files"] else None
        name, shown = (file.name, file.shown) if file else (origin["path"], origin["path"])
        self.read += batch.read
        record["read"] += batch.read
        record["kept"] += len(batch.hashes)
        record["truncated"] += batch.truncated
        record["split"] += batch.split
        record["pieces"] += int(batch.pieces.sum()) - len(batch.pieces)
        if file:
            record["files"][chunk.file]["rows"] += batch.read
        for row, reason, detail in batch.rejected:
            record["rejected"][reason] = record["rejected"].get(reason, 0) + 1
            self.rejected_count += 1
            line = {"file": name, "row": row, "reason": reason, "detail": detail}
            self.rejected.write(json.dumps(line, ensure_ascii=True) + "\n")
            if len(self.first_rejected) < 5:
                self.first_rejected.append(f"{shown}:{row}: {reason}" + (f": {detail}" if detail else ""))
        if is_eval:
            self.eval_sources.add(index)
        if not len(batch.hashes):
            return
        offsets = pa.array(np.concatenate([[0], np.cumsum(batch.lengths)]), pa.int32())
        count = len(batch.lengths)
        first = np.zeros(count, bool)
        first[np.cumsum(batch.pieces) - batch.pieces] = True
        lists = (pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (batch.ids, batch.labels))
        plain = (np.repeat(batch.hashes, batch.pieces), np.full(count, index, np.int32), first)
        self.writer.write_batch(pa.record_batch([*lists, *map(pa.array, plain)], schema=self.SCHEMA))
        batch.hashes.tofile(self.files["eval" if is_eval else "train"])

    def finish(self, share: float, say: Callable[[str], None]) -> int:
        """Sort the hashes; every train row with a hash below the returned number is held out."""
        self.writer.close()
        for file in self.files.values():
            file.close()
        hashes = self._sorted("train", sort=True)
        rows = len(hashes)
        for start in range(0, rows, 1 << 20):
            part = hashes[start : start + (1 << 20) + 1]
            self.duplicates += int((part[1:] == part[:-1]).sum())
        if not share or not rows:
            return 0
        if hashes[0] == hashes[-1]:
            say("data: all rows are equal, so none is held out")
            return 0
        # Equal rows stay together: the cut falls between two different hashes, next to the wanted number.
        wanted = min(max(1, round(share * rows)), rows - 1)
        at = hashes[wanted - 1]
        low, high = np.searchsorted(hashes, at, "left"), np.searchsorted(hashes, at, "right")
        if low and (high == rows or wanted - low < high - wanted):
            return int(at)
        return int(hashes[high]) if high < rows else int(at)

    def _sorted(self, side: str, sort: bool = False) -> np.ndarray:
        path = self.paths[side]
        if not path.stat().st_size:
            return np.empty(0, np.uint64)
        hashes = np.memmap(path, np.uint64, "r+" if sort else "r")
        if sort:
            hashes.sort()
        return hashes

    def overlap(self, held: int) -> int:
        """How many rows of eval sources are also trained on."""
        train = self._sorted("train")
        train = train[np.searchsorted(train, np.uint64(held), "left") :]
        count = 0
        for part in np.array_split(own := self._sorted("eval"), len(own) // (1 << 16) + 1):
            at = np.searchsorted(train, part)
            count += int((train[np.minimum(at, len(train) - 1)] == part).sum()) if len(train) else 0
        return count

    def replay(self, train: Output, held_out: Output, held: int, weights: list[float], seed: int) -> int:
        """The second pass: every spooled piece to where it belongs. Returns how many rows go nowhere (weight < 1)."""
        unseen = 0
        with pa.OSFile(str(self.paths["arrow"])) as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                columns = [batch.column(i) for i in range(5)]
                ids, labels = (column.values.to_numpy() for column in columns[:2])
                offsets = columns[0].offsets.to_numpy()
                hashes, first = columns[2].to_numpy(), columns[4].to_numpy(zero_copy_only=False)
                index = int(columns[3][0].as_py())
                is_eval = index in self.eval_sources
                if is_eval:
                    copies = np.zeros(len(hashes), np.int64)
                else:
                    weight = weights[index]
                    # the hash chose the held-out rows already, so it is mixed anew for the weight
                    luck = (hashes ^ np.uint64(seed * 2654435761 + index)) * np.uint64(0x9E3779B97F4A7C15)
                    luck = (luck ^ (luck >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
                    copies = int(weight) + ((luck >> np.uint64(11)) / 2.0**53 < weight - int(weight))
                out = np.full(len(hashes), is_eval) | (hashes < np.uint64(held))
                unseen += int((first & ~out & (copies == 0)).sum())
                for i in range(len(hashes)):
                    piece = slice(offsets[i], offsets[i + 1])
                    if out[i]:
                        held_out.add(ids[piece], labels[piece])
                    else:
                        for _ in range(copies[i]):
                            train.add(ids[piece], labels[piece])
        return unseen


def _refuse(data: Data, cache: Path, folder: Path, records: list[dict], spool: _Spool) -> None:
    """Stop when too many rows were rejected, or none is left."""
    spool.rejected.close()
    read, rejected = spool.read, spool.rejected_count
    kept = sum(record["kept"] for record in records[: len(data.train)])
    if kept and (not rejected or rejected / read <= data.max_rejected):
        return
    reasons = sum((Counter(record["rejected"]) for record in records), Counter())
    cache.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "rejected.jsonl", cache / "rejected.jsonl")
    lines = [
        f"{rejected:,} of {read:,} rows cannot be used ({rejected / max(1, read):.1%}; data.max_rejected allows "
        f"{data.max_rejected:.1%}): " + ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common()),
        *spool.first_rejected,
    ]
    if rejected > len(spool.first_rejected):
        lines.append("...")
    hint = f"all of them are listed in {_near(cache / 'rejected.jsonl')}; mend them, or raise data.max_rejected"
    raise UserError("\n".join(lines), hint, NUMERIC if not kept and set(reasons) <= NOTHING_LEARNED else DATA)


def _near(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


# --- small things ----------------------------------------------------------------------------------------------------


class _Bar:
    """Rows, rows per second and time left, on a terminal only."""

    def __init__(self, wanted: bool, size: int):
        self.on = wanted and sys.stderr.isatty()
        self.size, self.start, self.last = size, time.monotonic(), 0.0

    def show(self, rows: int, index: int, chunk: sources.Chunk, origins: list[dict]) -> None:
        now = time.monotonic()
        if not self.on or now - self.last < 0.2:
            return
        self.last = now
        done = sum(f.bytes for o in origins[:index] for f in o["files"])
        done += sum(f.bytes for f in origins[index]["files"][: chunk.file]) + chunk.position
        spent = now - self.start
        left = f", {spent * (self.size - done) / done:,.0f} s left" if 0 < done <= self.size else ""
        print(
            f"\r\x1b[Kdata: {rows:,} rows, {rows / max(spent, 1e-3):,.0f} rows/s{left}",
            end="",
            file=sys.stderr,
            flush=True,
        )

    def done(self) -> None:
        if self.on:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
