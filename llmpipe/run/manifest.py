"""manifest.json: what an artifact is, of what it was made, by what and on what.

Without pydantic: `llmpipe show` reads manifests, and opens fast. A fingerprint tells damage and
no forgery: an artifact may come from anywhere, and so each field is held against its type, and what
names something against what may be named.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from llmpipe.data.counts import Lengths, RowCounts, SequenceCounts, TokenCounts
from llmpipe.files.tables import Table, check_names
from llmpipe.recipe.names import is_name, is_reference
from llmpipe.run.probe import Probe
from llmpipe.typed import record

Identity = dict[str, Any]
"""What decides which model it is: the sha256 of its files, a fingerprint or a commit."""

Document = dict[str, Any]
"""A record as JSON holds it."""

ModelKind = Literal["hub", "folder", "gguf", "artifact", "merged"]
"""What a reference to a model means."""

ArtifactKind = Literal["model", "adapter", "reward-model", "dataset", "evaluation", "export"]

SHAPES: dict[str, re.Pattern[str]] = {
    "revision": re.compile(r"[0-9a-f]{40}"),
    "gguf": re.compile(r"[0-9a-f]{64}"),
    "files": re.compile(r"[0-9a-f]{64}"),
    "fingerprint": re.compile(r"[0-9a-f]{64}"),
}
"""Of what an identity holds that folders are named after, or that is fetched."""


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

    def check(self) -> None:
        """Raises ValueError where what is read of it is not what it may be."""
        stage = self.recipe.get("stage", "")
        _check("asked.recipe.stage", isinstance(stage, str), stage)
        data = self.recipe.get("data", {})
        kwargs = data.get("chat_template_kwargs", {}) if isinstance(data, dict) else None
        _check("asked.recipe.data", isinstance(kwargs, dict), data)
        for at, model in self.models.items():
            check_identity(f"asked.models.{at}", model)


@dataclass(frozen=True)
class Parent:
    """An artifact that another one was made of."""

    name: str
    """With @STEP where it was a checkpoint."""
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that was trained, or that an adapter was trained on."""

    kind: ModelKind
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


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What manifest.json holds; `None`: an artifact of this kind does not have it."""

    version: int
    kind: ArtifactKind
    stage: str
    name: str
    identity: str
    """Of what was asked, see `identity.identity`."""
    asked: Asked
    parents: list[Parent]
    models: dict[str, Identity]
    """Reference and identity of every model that the recipe names, and of every artifact that it
    has rows of, by the path of the field."""
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
    probe: Probe | None = None
    """What the model in memory said, by which it is known again; older ones have none."""
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
        """The manifest that a document holds; fields of later versions are passed over.

        Raises ValueError naming the field that is missing, or is not what it may be.
        """
        manifest = record(cls, document)
        manifest.asked.check()
        check_names(manifest.files, "files")
        _check("name", is_name(manifest.name), manifest.name)
        for i, parent in enumerate(manifest.parents):
            name = parent.name.partition("@")[0]
            _check(f"parents[{i}].name", is_name(name), parent.name)
        if manifest.merged_from is not None:
            _check("merged_from", is_name(manifest.merged_from), manifest.merged_from)
        for at, model in manifest.models.items():
            check_reference(f"models.{at}.reference", model.get("reference"))
        if base := manifest.base:
            check_reference("base.reference", base.reference)
            check_identity("base.identity", base.identity)
        return manifest

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


def check_reference(at: str, reference: object) -> None:
    """Raises ValueError where a recipe could not name a model so."""
    good = isinstance(reference, str) and bool(reference.strip()) and is_reference(reference)
    _check(at, good and "\0" not in str(reference), reference)


def check_identity(at: str, identity: Identity) -> None:
    """Raises ValueError for hashes and commits that are none: folders are named after them."""
    for name, shape in SHAPES.items():
        value = identity.get(name)
        good = value is None or (isinstance(value, str) and shape.fullmatch(value) is not None)
        _check(f"{at}.{name}", good, value)


def _check(at: str, good: bool, value: object) -> None:
    if not good:
        raise ValueError(f"{at}: {str(value)[:60]!r} is nothing that may stand there")
