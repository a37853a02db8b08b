"""exports.jsonl: what an export wrote, and what its readers made of it; a line for each format.

A line is written once the folder of its format has its name, so that what a kill leaves without a
line is made again.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import json_object
from llmpipe.files.tables import Table, in_bytes
from llmpipe.files.writing import write_whole
from llmpipe.run.probe import Agreement
from llmpipe.typed import record

EXPORTS = "exports.jsonl"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How far a reader's predictions are from the source's, on the same tokens."""

    rows: int
    tokens: int
    """Whose next token's whole distribution was compared."""
    mean_kl: float
    """Of the source's distribution from the reader's: nats per token."""
    perplexity: float
    perplexity_of_source: float

    @property
    def perplexity_ratio(self) -> float:
        """How many times as high it is."""
        least = self.perplexity_of_source  # at least 1, unless a file says otherwise
        return self.perplexity / least if least else math.inf


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What somebody made of a format."""

    reader: str
    """Who read it back, with the version."""
    agreement: Agreement
    """On the questions of the probe."""
    measured: Measured
    """On held-out rows, or on the probe's continuations where the recipe names no rows."""
    tokens_per_second: float
    """At which the rows were read."""

    @property
    def told(self) -> str:
        """In a line."""
        far, same = self.measured, self.agreement
        away = f"KL {far.mean_kl:.2g}, perplexity x {far.perplexity_ratio:.4f}"
        answers = f"{same.equal_answers} of {same.answers} answers equal"
        return f"{self.reader}: {away}, {answers}, {self.tokens_per_second:,.0f} tok/s"


@dataclass(frozen=True, kw_only=True)
class Export:
    """One format of a model."""

    format: str
    """And the name of its folder: `gguf-q8_0`."""
    lossless: bool
    """Whether no weight was rounded to less than half precision."""
    size: int
    """Bytes of its weights."""
    tensors: int
    """Written; of an adapter as many as its reader applied."""
    reader: str
    """Who read it back, with the version."""
    agreement: Agreement
    """On the questions of the probe."""
    measured: Measured
    """On held-out rows, or on the probe's continuations where the recipe names no rows."""
    tokens_per_second: float
    """At which the reader read the rows."""
    also: list[Reading] = field(default_factory=list)
    """By what else is installed that takes it: vLLM."""
    notes: list[str] = field(default_factory=list)
    """What its user has to know."""
    warning: str = ""
    """How it is further from the model than its recipe accepts, where that was no reason to refuse
    it."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template in training, which whoever serves it has to give as well."""
    files: Table = field(default_factory=dict)

    @property
    def told(self) -> str:
        """In a line."""
        return f"{in_bytes(self.size)}, {self.tensors:,} tensors; {self.reading.told}"

    @property
    def reading(self) -> Reading:
        """That of the one reader that every format has."""
        return Reading(
            reader=self.reader,
            agreement=self.agreement,
            measured=self.measured,
            tokens_per_second=self.tokens_per_second,
        )

    @property
    def remarks(self) -> list[str]:
        """What is to be known of it, the warning first."""
        return [f"warning: {self.warning}", *self.notes] if self.warning else self.notes

    def numbers(self) -> dict[str, float]:
        """What a manifest says of it."""
        return {
            "mean_kl": self.measured.mean_kl,
            "perplexity_ratio": self.measured.perplexity_ratio,
            "greedy": self.agreement.greedy,
            "bytes": self.size,
        }

    def document(self) -> dict[str, Any]:
        return asdict(self)


def read_exports(folder: Path) -> list[Export]:
    """The lines of a folder's exports.jsonl. Raises UserError (3) where one cannot be read."""
    path = folder / EXPORTS
    if not path.exists():
        return []
    exports = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        document = json_object(line)
        try:
            exports.append(record(Export, document))
        except ValueError as error:
            problem = f"{path}: line {number} cannot be read: {error}"
            raise UserError(problem, "export again with --fresh", INTEGRITY) from None
    return exports


def write_exports(folder: Path, exports: list[Export]) -> None:
    """Atomically, so that no line is ever half there."""
    text = "".join(json.dumps(export.document()) + "\n" for export in exports)
    write_whole(folder / EXPORTS, text.encode())
