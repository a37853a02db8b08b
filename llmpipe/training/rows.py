"""Prepared rows as a trainer takes them: memory-mapped or streamed, and in which order.

Accelerate evens out the last batch of several processes with rows from the start of the epoch,
which are then seen twice. Here it is evened out with fillers: sequences of which nothing is
learned, behind the real rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

from llmpipe.data.pack import IGNORED
from llmpipe.data.stream import Stream
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.faults import reading
from llmpipe.models.hardware import Hardware
from llmpipe.models.load import Setup
from llmpipe.recipe import sections
from llmpipe.run.machine import rank


def dataset(path: Path) -> Dataset:
    """Prepared rows, memory-mapped. Raises UserError (3) when the file is gone."""
    if not path.exists():
        hint = f"remove {path.parent} and run the same command again"
        raise UserError(f"{path}: missing", hint, INTEGRITY)
    with reading(path, "Arrow"):
        return Dataset.from_file(str(path))


def streamed(setup: Setup[sections.Training]) -> Stream:
    """The rows of a recipe with `data.stream` as blocks, tokenized while they are trained on."""
    job, recipe = setup.job, setup.recipe
    assert recipe.steps is not None  # or the recipe would have been refused
    stream = Stream(
        recipe.data,
        setup.prepared.folder(job.prepared),
        recipe.steps * recipe.batch_size,
        recipe.batch_size,
        seed=recipe.seed,
        pinned=job.plan.content,
        processes=_tokenizing_processes(recipe.data.processes, setup.hardware),
    )
    stream.rejected = job.artifact.path / "rejected.jsonl" if rank() == 0 else None
    return stream


def _tokenizing_processes(asked: int | str, hardware: Hardware) -> int:
    """Processes that tokenize beside each process that trains: the cores that a GPU leaves idle."""
    if isinstance(asked, int):
        return asked
    if hardware.device == "cpu":
        return 1
    cores = (os.cpu_count() or 1) // hardware.processes
    return max(1, cores - 1)


def stand_in(packed: bool) -> Dataset:
    """What TRL looks at while a trainer is made whose rows are streamed: it takes nothing else."""
    row: dict[str, Any] = {"input_ids": [0, 0], "labels": [0, 0]}
    if packed:
        row["seq_lengths"] = [2]
    return Dataset.from_list([row])


def longest(rows: Dataset, count: int) -> list[dict[str, Any]]:
    """The rows of the longest sequences, again where there are fewer. A prompt is in one sequence
    with each of its responses, and a batch as wide as the longest one; mismatched responses of kto
    take no memory of a backward pass.
    """
    names = [name for name in rows.column_names if name.endswith("ids") and name[:3] != "KL_"]
    lengths = {name: pc.list_value_length(rows.data.column(name)).to_numpy() for name in names}
    widths = lengths.pop("prompt_ids", 0) + np.max([*lengths.values()], axis=0)
    places = np.argsort(-widths, kind="stable")[:count].tolist()
    return [rows[places[i % len(places)]] for i in range(count)]


def with_fillers(rows: Dataset, count: int, filler: dict[str, Any]) -> Dataset:
    """`rows` and `count` times a row of which nothing is learned."""
    if not count:
        return rows
    filler = filler | {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}  # where TRL adds them
    columns = {name: [filler[name]] * count for name in rows.column_names}
    return concatenate_datasets([rows, Dataset.from_dict(columns, features=rows.features)])


def counted_tokens(batch: dict[str, Any]) -> int:
    """Tokens of a batch that TRL collated, without padding and without fillers."""
    if batch.get("examples") == 0:  # of preferences, all of which are fillers
        return 0
    ids = batch["input_ids"]
    if "attention_mask" in batch:
        mask = batch["attention_mask"]
        return int((mask * ~_filled(batch, mask.sum(1) == 2)[:, None]).sum())
    return int(ids.numel()) - _laid_fillers(batch)


def _filled(batch: dict[str, Any], short: torch.Tensor) -> torch.Tensor:
    """Which rows of a padded batch are fillers, bool [rows]; `short` has those of two tokens."""
    if "labels" not in batch:
        return torch.zeros_like(short)
    return short & (batch["labels"] == IGNORED).all(1)


def _laid_fillers(batch: dict[str, Any]) -> int:
    """Tokens of fillers in a batch whose sequences lie end to end."""
    if "position_ids" not in batch or "labels" not in batch:
        return 0
    starts = (batch["position_ids"].flatten() == 0).nonzero().flatten()
    ids, learned = batch["input_ids"].flatten(), batch["labels"].flatten() != IGNORED
    ends = torch.cat([starts[1:], starts.new_tensor([len(ids)])])
    pairs = starts[ends - starts == 2]
    fillers = (ids[pairs] == ids[pairs + 1]) & ~learned[pairs] & ~learned[pairs + 1]
    return 2 * int(fillers.sum())


class Order(Sampler):
    """The order of an epoch: `rows` shuffled by seed + epoch as Accelerate does, then fillers."""

    def __init__(self, rows: int, fillers: int, seed: int, *, shuffled: bool):
        self.rows = rows
        self.fillers = fillers
        self.seed = seed
        self.shuffled = shuffled
        self.epoch = 0

    def __len__(self) -> int:
        return self.rows + self.fillers

    def __iter__(self) -> Iterator[int]:
        if self.shuffled:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            yield from torch.randperm(self.rows, generator=generator).tolist()
        else:
            yield from range(self.rows)
        yield from range(self.rows, self.rows + self.fillers)
