"""Sources -> a folder of tokens, made once, kept by content, mapped into memory to train on.

    cache/<key>/train.arrow, eval.arrow   sequences, see `kinds`
                rejected.jsonl            {"file", "row", "reason", "detail"}, every rejected row
                seen.safetensors          "asks": uint64, sorted: what the rows to train on ask, for
                                          `eval` to compare
                tokenizer/                the tokenizer that made them and that is published with
                                          the model
                prepared.json             counts, lengths, digests
                sums.json                 what each of these files held, see `sums`; written last

The key stands for everything that decides the content, so a folder that is there is used, once it
is verified.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path

from llmpipe.data import sources, template, tokenizer
from llmpipe.data.kinds import Kind
from llmpipe.data.make import VERSION, make
from llmpipe.data.prepared import RECORD, PreparedRows
from llmpipe.errors import Say
from llmpipe.faults import writing
from llmpipe.files.json import digest
from llmpipe.files.paths import files_below
from llmpipe.files.writing import fsync, settle
from llmpipe.recipe.sections import Prepared, science
from llmpipe.sums import is_sealed, seal


def key_of(
    data: Prepared, kind: Kind, model: Path, seed: int, pinned: dict[str, str] | None = None
) -> tuple[str, list[sources.Origin]]:
    """What names the prepared data, and where it comes from. Nothing is tokenized.

    `pinned`: commits of Hub data sets that are known already, by `sources.hub_key`. The key changes
    with the content of every file, the tokenizer, the template and the recipe's fields, not with
    where things lie or what they are called. Raises UserError for a missing or unreadable file.
    """
    pinned = pinned or {}
    preparation = data.preparation
    trained = [sources.Origin(source, pinned, preparation.stream) for source in data.train]
    evaluated = [sources.Origin(source, pinned) for source in data.eval.sources]
    fields = science(data)
    fields["train"] = [origin.identity() for origin in trained]
    fields["eval"]["sources"] = [origin.identity() for origin in evaluated]
    text = template.template_source(model, preparation.template)
    fields["template"] = [preparation.template == "auto", text]
    made = [kind.name, *kind.settings]
    key = digest([VERSION, seed, made, fields, tokenizer.identity(model)])
    return key, [*trained, *evaluated]


def prepare(
    data: Prepared,
    kind: Kind,
    model: Path,
    cache: Path,
    *,
    seed: int,
    say: Say,
    pinned: dict[str, str] | None = None,
) -> PreparedRows:
    """Rows -> tokens of a kind, in a folder of `cache`, and what is known of them.

    Raises UserError: code 2 for data that cannot be read or too many rejected rows, 3 for a broken
    tokenizer or a folder that is not as it was made, 4 when nothing would be learned, 5 when a
    worker process dies or the disk is full.
    """
    started = time.monotonic()
    key, origins = key_of(data, kind, model, seed, pinned)
    final = cache / key
    if os.path.lexists(final):
        ready = PreparedRows.of_folder(final)
        say(f"data: {ready.rows.train:,} rows ready (cached)")
        return ready
    _say_if_unsealed(cache, say)
    _remove_remains(cache, key)
    temporary = cache / f".{key}.{os.getpid()}"
    try:
        with writing(cache, temporary):
            temporary.mkdir(parents=True)
            record = make(data, kind, model, temporary, origins, seed, say)
            seconds = round(time.monotonic() - started, 3)
            ready = record.model_copy(update={"key": key, "seconds": seconds})
            _publish(ready, temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    ready = PreparedRows.of_folder(final)
    say(f"data: {_in_words(ready, data, kind)}")
    return ready


def _say_if_unsealed(cache: Path, say: Say) -> None:
    """Say why rows are prepared anew that an older llmpipe has prepared."""
    if any(not is_sealed(record.parent) for record in cache.glob(f"*/{RECORD}")):
        say(
            f"data: in {cache} lie rows that an older llmpipe prepared, without sums of its files: "
            "they are not used, and may be removed"
        )


def _remove_remains(cache: Path, key: str) -> None:
    """Remove what a process that was killed has left."""
    for remains in cache.glob(f".{key}.*"):
        pid = remains.suffix[1:]
        if pid.isdecimal() and not _other_runs(int(pid)):
            shutil.rmtree(remains, ignore_errors=True)


def _other_runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return process != os.getpid()


def _publish(ready: PreparedRows, temporary: Path, final: Path) -> None:
    """Flush the folder, with its table written last, and give it its name."""
    settle(files_below(temporary))
    fsync(temporary / "tokenizer")
    ready.to_file(temporary / RECORD)
    seal(temporary, final.name)
    try:
        temporary.rename(final)
    except OSError:
        if not os.path.lexists(final):
            raise
        # another process was faster: what it made is as good
    fsync(final.parent)


def _in_words(ready: PreparedRows, data: Prepared, kind: Kind) -> str:
    rows = ready.rows
    if data.preparation.stream:
        words = "to be tokenized in training"
    else:
        words = f"{rows.train:,} rows to train on; {_tokens_in_words(ready, kind)}"
    notes = {
        "held out": rows.eval,
        "rejected": rows.rejected,
        "truncated": rows.truncated,
        "split": rows.split,
    }
    return words + "".join(f"; {count:,} {name}" for name, count in notes.items() if count)


def _tokens_in_words(ready: PreparedRows, kind: Kind) -> str:
    tokens = ready.tokens
    if not kind.learned:
        return f"{kind.name} of {tokens.train:,} tokens"
    share = f"{tokens.train_supervised / max(tokens.train, 1):.0%}"
    return f"{tokens.train:,} tokens, {share} of them learned; {ready.sequences.train:,} sequences"
