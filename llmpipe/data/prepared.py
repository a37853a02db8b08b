"""What is known of prepared rows: `prepared.json` of a folder of tokens, and of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from llmpipe.data.counts import Lengths, RowCounts, SequenceCounts, TokenCounts
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.tables import SMALL
from llmpipe.record import Record
from llmpipe.sums import Kept, glance

RECORD = "prepared.json"
"""In a folder of `.prepared`, and in the artifact that is made of it."""

ANEW = "run the same command again: it is written anew"
"""What to do about the one in an artifact."""


OF_ARTIFACT = ("data", "sums", "artifact")
"""What only the record in an artifact says."""


class PreparedFolder(Record):
    """What `prepare` leaves in a folder of `.prepared`; an artifact keeps it with the folder's name
    and the fingerprint of its table.
    """

    data: str = ""
    """Name of the folder in the run's `.prepared/`."""
    sums: str = ""
    """Fingerprint of the folder's table."""
    artifact: str = ""
    """Of what is made of it, the name; the folder's own record has none."""

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """The record of a folder that lies there whole, by a glance at it.

        Raises UserError (3) where it does not.
        """
        fingerprint = glance(folder, SMALL)
        record = cls.whole(folder / RECORD)
        return record.model_copy(update={"data": folder.name, "sums": fingerprint})

    @classmethod
    def whole(cls, path: Path) -> Self:
        """The record in a file. Raises UserError (3) where it holds none."""
        record = cls.from_file(path)
        if record is None:
            raise UserError(f"{path}: missing or damaged", ANEW, INTEGRITY)
        return record

    @classmethod
    def of_artifact(cls, artifact: Path) -> Self:
        """The record that an artifact keeps. Raises UserError (3) where it is another one's."""
        path = artifact / RECORD
        record = cls.whole(path)
        if record.artifact != artifact.name:
            problem = f"{path}: is that of {record.artifact or 'a folder in .prepared'}"
            raise UserError(problem, ANEW, INTEGRITY)
        return record

    def of(self, artifact: Path) -> Self:
        """The record as it is kept in an artifact."""
        return self.model_copy(update={"artifact": artifact.name})

    def folder(self, cache: Path) -> Path:
        return cache / self.data

    def kept(self, cache: Path) -> list[Kept]:
        """The folders that are to be verified before they are used."""
        return [Kept(self.folder(cache), self.sums)]

    def refuse_another(self, cache: Path) -> None:
        """Raises UserError (3) where the folder, once it is verified, says something else."""
        elsewhere = {*OF_ARTIFACT, "mixture"}
        path = self.folder(cache) / RECORD
        made = self.whole(path).model_dump(exclude=elsewhere)
        if made != self.model_dump(exclude=elsewhere):
            raise UserError(f"{RECORD}: is not what {path} says", ANEW, INTEGRITY)


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


class PreparedRows(PreparedFolder):
    """Rows as tokens, and the tokenizer that made them."""

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

    def kept(self, cache: Path) -> list[Kept]:
        return super().kept(cache) + (self.mixture.kept(cache) if self.mixture else [])

    def refuse_another(self, cache: Path) -> None:
        super().refuse_another(cache)
        if self.mixture:
            self.mixture.refuse_another(cache)

    def facts(self) -> dict[str, Any]:
        """What a manifest says of them: tokenizer, template, vocabulary and the rows."""
        named = ("template", "template_name", "eos_token", "pad_token", "stop_tokens")
        elsewhere = {
            "version",
            "key",
            *OF_ARTIFACT,
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
