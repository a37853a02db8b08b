"""What is known of prepared rows: `prepared.json` of a folder of tokens, and of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmpipe.data.counts import Lengths, RowCounts, SequenceCounts, TokenCounts
from llmpipe.record import Record


class FileRows(Record):
    name: str
    sha256: str
    rows: int


class SourceRows(Record):
    """One source of rows, with how many of them were kept."""

    path: str
    format: str
    columns: dict[str, str]
    """Your column names, and what the format calls them."""
    unused_columns: list[str]
    files: list[FileRows]
    revision: str | None
    """Commit of a Hub data set."""
    weight: float
    rejected: dict[str, int]
    """Rows by the reason they were rejected for."""
    kept_columns: list[str] = []
    """Columns that rewards are given, as the recipe calls them."""
    unread: dict[str, int] = {}
    """Kept rows by what nobody reads in them, beside `unused_columns`."""
    noted: dict[str, int] = {}
    """Kept rows by a sentence on what was done with them."""
    read: int
    kept: int
    truncated: int
    split: int
    """Rows that became several pieces."""
    pieces: int
    """Examples beyond one a row."""


class PreparedRows(Record):
    """Rows as tokens, and the tokenizer that made them."""

    data: str = ""
    """Name of the folder in the run's `.prepared/`."""
    version: int
    key: str
    sources: list[SourceRows]
    rows: RowCounts
    tokens: TokenCounts
    sequences: SequenceCounts
    lengths: Lengths
    tokenizer: str
    """sha256 of what decides token ids."""
    template: str | None
    """sha256 of the chat template."""
    template_name: str | None
    added_tokens: list[str]
    """Tokens that the template needs and the tokenizer did not have."""
    stop_tokens: list[str]
    eos_token: str | None
    pad_token: str | None
    vocab_size: int
    content_digest: str
    """sha256 of every token to train on."""
    processes: int
    seconds: float
    mixture: PreparedRows | None = None
    """Rows whose loss PPO mixes in."""

    def folder(self, cache: Path) -> Path:
        return cache / self.data

    def facts(self) -> dict[str, Any]:
        """What a manifest says of them: tokenizer, template, vocabulary and the rows."""
        named = ("template", "template_name", "eos_token", "pad_token", "stop_tokens")
        elsewhere = {
            "version",
            "key",
            "data",
            "seconds",
            "tokenizer",
            "vocab_size",
            "mixture",
            *named,
        }
        data = self.model_dump(exclude=elsewhere)
        if self.mixture:
            data["mixture"] = {"data": self.mixture.data, **self.mixture.facts()["data"]}
        return {
            "tokenizer": {"sha256": self.tokenizer} | {name: getattr(self, name) for name in named},
            "vocab_size": self.vocab_size,
            "data": data,
        }
