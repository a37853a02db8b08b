"""manifest.json: what an artifact is, of what it was made, by what and on what.

Without pydantic: `llmpipe show` reads manifests, and opens fast. What a manifest says is held by
its fingerprint, so it is not validated once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from llmpipe.data.counts import Lengths, RowCounts, SequenceCounts, TokenCounts
from llmpipe.files import Table, table_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Identity = dict[str, Any]
"""What decides which model it is: the sha256 of its files, a fingerprint or a commit."""

Document = dict[str, Any]
"""A record as JSON holds it."""

T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a recipe asks for, in a form to be read."""

    recipe: dict[str, Any] = field(default_factory=dict)
    """The fields that decide the result."""
    models: dict[str, Identity] = field(default_factory=dict)
    """Of every model that the recipe names, by the path of its field."""
    content: dict[str, str] = field(default_factory=dict)
    """sha256 of every file, by `FIELD:NAME`; commit of every Hub data set, by `sources.hub_key`."""

    def files(self, field: str) -> list[tuple[str, str]]:
        """(name, sha256) of the files that a field of the recipe names, in their order."""
        prefix = f"{field}:"
        return [
            (key.removeprefix(prefix), sha256)
            for key, sha256 in self.content.items()
            if key.startswith(prefix)
        ]

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """Variables of the chat template, where the stage has one."""
        kwargs: dict[str, Any] = self.recipe.get("data", {}).get("chat_template_kwargs", {})
        return kwargs


@dataclass(frozen=True)
class Parent:
    """An artifact that another one was made of."""

    name: str
    """With @STEP where it was a checkpoint."""
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that was trained, or that an adapter was trained on."""

    kind: str
    """One of `reference.Model`'s."""
    reference: str
    identity: Identity
    folder: str | None = None
    """The way to it from the artifact, where no other tool could follow the reference."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What text is made tokens with."""

    sha256: str
    """Of what decides token ids."""
    template: str | None
    """sha256 of the chat template."""
    template_name: str | None
    eos_token: str | None
    pad_token: str | None
    stop_tokens: list[str]


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """The rows that were trained on."""

    sources: list[Document]
    """See `data.prepared.SourceRows`."""
    rows: RowCounts
    tokens: TokenCounts
    sequences: SequenceCounts
    lengths: Lengths
    added_tokens: list[str]
    """Tokens that the template needs and the tokenizer did not have."""
    content_digest: str
    """sha256 of every token to train on."""
    processes: int
    """That tokenized them."""
    mixture: Document | None = None
    """The rows whose loss PPO mixes in."""

    @classmethod
    def of(cls, document: Document) -> DataFacts:
        counts = {
            "rows": known(RowCounts, document["rows"]),
            "tokens": known(TokenCounts, document["tokens"]),
            "sequences": known(SequenceCounts, document["sequences"]),
            "lengths": known(Lengths, document["lengths"]),
        }
        return known(cls, document | counts)


Platform = dict[str, str]
"""The name of the device, and the versions of what computes on it."""


@dataclass(frozen=True, kw_only=True)
class Leg:
    """Steps that were computed on one platform."""

    after: int
    """The step that they follow."""
    platform: Platform


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """How the training went."""

    steps: int
    published_step: int
    tokens: int
    seconds: float
    exact_resume: bool
    """Whether it was resumed bitwise, if at all."""
    legs: list[Leg] = field(default_factory=list)
    """On what it was computed, one leg for each device and set of libraries; none of old work."""

    @classmethod
    def of(cls, document: Document) -> TrainingFacts:
        legs = [known(Leg, leg) for leg in document.get("legs", [])]
        return known(cls, document | {"legs": legs})


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What manifest.json holds; `None`: an artifact of this kind does not have it."""

    version: int
    kind: str
    """model, adapter, reward-model or evaluation."""
    stage: str
    name: str
    identity: str
    """Of what was asked, see `identity.identity`."""
    asked: Asked
    parents: list[Parent]
    models: dict[str, Identity]
    """Reference and identity of every model that the recipe names, by the path of its field."""
    base: Base | None = None
    seed: int
    tokenizer: Tokenizer | None = None
    vocab_size: int | None = None
    data: DataFacts | None = None
    final: dict[str, Any]
    """The last metrics."""
    training: TrainingFacts | None = None
    hardware: dict[str, Any] | None = None
    verified: dict[str, Any] | None = None
    """What was compared after reloading."""
    llmpipe: str
    """Its version."""
    git: str | None
    """Commit of its checkout."""
    versions: dict[str, str | None]
    """Of Python and the libraries."""
    machine: dict[str, Any]
    environment: dict[str, str]
    seconds: float
    finished: str
    """When: 2026-11-26T13:50:39Z."""
    merged_from: str | None = None
    """The adapter that was merged into its base."""
    files: Table = field(default_factory=dict)
    fingerprint: str = ""
    """sha256 of everything else."""

    @classmethod
    def of(cls, document: Document) -> Manifest:
        """The manifest that a document holds; fields of later versions are passed over."""
        values = dict(document)
        values["asked"] = known(Asked, values["asked"])
        values["parents"] = [known(Parent, parent) for parent in values["parents"]]
        values["files"] = table_of(values.get("files", {}))
        for name, record in (("base", Base), ("tokenizer", Tokenizer)):
            if name in values:
                values[name] = known(record, values[name])
        if "training" in values:
            values["training"] = TrainingFacts.of(values["training"])
        if "data" in values:
            values["data"] = DataFacts.of(values["data"])
        return known(cls, values)

    def document(self) -> Document:
        """As manifest.json holds it."""
        document = asdict(self)
        optional = [entry.name for entry in fields(self) if entry.default is None]
        for name in optional:
            if document[name] is None:
                del document[name]
        if self.data and self.data.mixture is None:
            del document["data"]["mixture"]
        if self.base and self.base.folder is None:
            del document["base"]["folder"]
        return document


def known(record: type[T], document: Mapping[str, Any]) -> T:
    """A dataclass of the fields that it knows of a document."""
    names = {entry.name for entry in fields(record)}
    return record(**{name: value for name, value in document.items() if name in names})
