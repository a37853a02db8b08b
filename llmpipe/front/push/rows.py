"""The rows that went into a lineage, as its manifests have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.front.push.ancestry import Ancestor, Ancestry
from llmpipe.recipe.names import ARTIFACT
from llmpipe.recipe.sections import is_local
from llmpipe.run.artifact import MANIFEST
from llmpipe.run.datasets import DATASET
from llmpipe.typed import record


@dataclass(frozen=True)
class RowsFile:
    name: str
    sha256: str
    rows: int


@dataclass(frozen=True)
class Source:
    """One source of rows, see `data.prepared.SourceRows`."""

    path: str
    format: str
    files: list[RowsFile]
    read: int
    kept: int
    truncated: int
    rejected: dict[str, int] = field(default_factory=dict)
    revision: str | None = None


@dataclass(frozen=True)
class Rows:
    """A source, and which artifact was made with it."""

    used_by: str
    source: Source
    made_by: str
    """The artifact of the lineage that has made the rows; empty of rows from elsewhere."""

    @property
    def path(self) -> str:
        return f"{ARTIFACT}{self.made_by}" if self.made_by else self.source.path

    @property
    def revision(self) -> str | None:
        """Commit of a Hub data set."""
        return self.source.revision

    @property
    def is_of_hub(self) -> bool:
        return not self.made_by and not is_local(self.path)

    @property
    def rejected(self) -> int:
        return sum(self.source.rejected.values())


def rows_of(ancestry: Ancestry) -> list[Rows]:
    """Every source, in the order in which it was used.

    Raises UserError (3) where a manifest has it in no form that is known.
    """
    makers = {
        entry.sha256: one.name
        for one in ancestry.made
        if one.manifest.kind == DATASET
        for entry in one.manifest.files.values()
    }
    return [
        Rows(one.name, source, _maker(source, makers))
        for one in ancestry.made
        for source in _sources(one)
    ]


def _maker(source: Source, makers: dict[str, str]) -> str:
    """By whom rows were made, by their sums; a manifest has the name of their file alone."""
    made_by = {makers.get(file.sha256, "") for file in source.files}
    return made_by.pop() if len(made_by) == 1 else ""


def _sources(one: Ancestor) -> Iterator[Source]:
    if one.manifest.data is None:
        return
    documents: list[Any] = list(one.manifest.data.sources)
    documents += (one.manifest.data.mixture or {}).get("sources", [])
    for i, document in enumerate(documents):
        try:
            yield record(Source, document)
        except ValueError as error:
            problem = f"{one.artifact.path / MANIFEST}: data.sources[{i}].{error}"
            raise UserError(problem, "make the artifact again", INTEGRITY) from None
