"""What an artifact was made from: the manifests of its parents and theirs, up to models from
elsewhere.

A parent is known by its fingerprint, wherever it lies: one that was moved aside by `--fresh` is
found, and one that was made anew under the same name is not taken for it. The manifests have to be
there, since a card says what went in; the weights of parents need not be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import digest
from llmpipe.files.paths import expanded
from llmpipe.files.tables import sha256_file, table
from llmpipe.recipe.names import ARTIFACT, is_name
from llmpipe.run import checkpoints
from llmpipe.run.artifact import MANIFEST, Artifact
from llmpipe.run.exported import KIND as EXPORT
from llmpipe.run.manifest import Base, Document, Identity, Manifest
from llmpipe.run.reference import ways_to
from llmpipe.typed import record


@dataclass(frozen=True)
class Ancestor:
    """An artifact of the lineage, the one that is pushed among them."""

    artifact: Artifact
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.name


@dataclass(frozen=True)
class Link:
    """What an artifact was made with."""

    field: str
    """Of its recipe: `model`, `reward.0.model`."""
    name: str
    """Of an artifact, with @STEP where it was a checkpoint; else the reference."""
    fingerprint: str = ""
    """Of the parent's manifest; empty for a model from elsewhere."""

    @property
    def role(self) -> str:
        """`model`, `reward`, `reference`, `tokenizer`."""
        return self.field.partition(".")[0]


@dataclass(frozen=True)
class Outside:
    """A model that no artifact is."""

    reference: str
    identity: Identity
    used_by: Ancestor
    field: str
    base: Base | None
    """As the manifest has it that began with it."""

    @property
    def revision(self) -> str | None:
        """Its commit on the Hub."""
        revision: str | None = self.identity.get("revision")
        return revision

    @property
    def hub_name(self) -> str | None:
        """What the Hub calls it, without a revision."""
        name: str | None = self.identity.get("hub")
        return name.partition("@")[0] if name else None

    @property
    def sum(self) -> str:
        """What tells it from others: a commit or a sha256."""
        values = (self.identity.get(key) for key in ("revision", "gguf", "files"))
        return next((str(value) for value in values if value), "")


@dataclass
class Ancestry:
    """All of what an artifact was made from."""

    made: list[Ancestor] = field(default_factory=list)
    """Parents before children; the artifact itself is the last."""
    links: dict[str, list[Link]] = field(default_factory=dict)
    """What each was made with, by its fingerprint."""
    outside: list[Outside] = field(default_factory=list)

    @property
    def itself(self) -> Ancestor:
        return self.made[-1]

    @property
    def model(self) -> Ancestor:
        """The artifact whose model it is: of an export the one that was exported, or the export
        where that was a model from elsewhere."""
        if self.itself.manifest.kind != EXPORT:
            return self.itself
        links = self.links[self.itself.manifest.fingerprint]
        parent = next(link.fingerprint for link in links if link.field == "model")
        return next((one for one in self.made if one.manifest.fingerprint == parent), self.itself)

    @property
    def base(self) -> Outside | None:
        """The model at the root of the line of `model:`; None where weights were drawn."""
        by_fingerprint = {one.manifest.fingerprint: one for one in self.made}
        one = self.itself
        while True:
            links = self.links[one.manifest.fingerprint]
            link = next((link for link in links if link.field == "model"), None)
            if link and link.fingerprint:
                one = by_fingerprint[link.fingerprint]
                continue
            begun = (it for it in self.outside if it.used_by == one and it.field == "model")
            return next(begun, None)


def ancestry(artifact: Artifact, manifest: Manifest) -> Ancestry:
    """What a verified artifact was made from.

    Raises UserError (3) where the manifest of a parent does not lie beside it any more.
    """
    gathered = Ancestry()
    _gather(Ancestor(artifact, manifest), gathered)
    return gathered


def _gather(one: Ancestor, gathered: Ancestry) -> None:
    fingerprint = one.manifest.fingerprint
    links = gathered.links[fingerprint] = []
    for at, model in one.manifest.models.items():
        if "artifact" not in model:
            links.append(Link(at, model["reference"]))
            base = one.manifest.base if at == "model" else None
            identity = {name: value for name, value in model.items() if name != "reference"}
            gathered.outside.append(Outside(model["reference"], identity, one, at, base))
            continue
        parent = parent_of(one, model)
        step = f"@{model['checkpoint']}" if "checkpoint" in model else ""
        links.append(Link(at, f"{parent.name}{step}", parent.manifest.fingerprint))
        if parent.manifest.fingerprint not in gathered.links:
            _gather(parent, gathered)
        elif all(parent.manifest != known.manifest for known in gathered.made):
            problem = f"{parent.artifact.path / MANIFEST}: was made from itself"
            raise UserError(problem, "make the artifact again", INTEGRITY)
    gathered.made.append(one)


@dataclass(frozen=True)
class _Named:
    """How a manifest names an artifact that something was made with."""

    reference: str
    artifact: str
    fingerprint: str
    checkpoint: int | None = None


def parent_of(child: Ancestor, model: Document) -> Ancestor:
    """The artifact that a manifest names as what it was made with.

    `model`: reference and identity. Raises UserError (3) where it does not lie there.
    """
    try:
        named = record(_Named, model)
    except ValueError as error:
        problem = f"{child.artifact.path / MANIFEST}: models: {error}"
        raise UserError(problem, "make the artifact again", INTEGRITY) from None
    for folder in _places(child, named):
        artifact = Artifact(folder)
        if not artifact.finished:
            continue
        manifest = artifact.manifest()
        if _is_it(artifact, manifest, named):
            return Ancestor(artifact, manifest)
    problem = (
        f"{child.artifact.path}: was made from {named.artifact} ({named.fingerprint[:12]}), and no "
        f"{MANIFEST} of it is in {child.artifact.run}"
    )
    hint = "a card says what went in: put its folder back, without the weights if you like"
    raise UserError(problem, hint, INTEGRITY)


def place_of(one: Ancestor, base: Base) -> Path | None:
    """Where a base lies that is a file or a folder here; None where the very one does not."""
    if base.kind not in ("gguf", "folder"):
        return None
    for way in reversed(ways_to(one.artifact, base)):
        path = expanded(way)
        if path.is_file() and sha256_file(path) == base.identity.get("gguf"):
            return path
        if path.is_dir() and digest(table(path)) == base.identity.get("files"):
            return path
    return None


def _is_it(artifact: Artifact, manifest: Manifest, named: _Named) -> bool:
    if named.checkpoint is None:
        return manifest.fingerprint == named.fingerprint
    sums = checkpoints.Sums.read(checkpoints.folder(artifact.checkpoints, named.checkpoint))
    return sums is not None and digest(sums.files) == named.fingerprint


def _places(child: Ancestor, named: _Named) -> Iterator[Path]:
    """Where a parent may lie: in the run, moved aside there, where it was named."""
    run = child.artifact.run
    if is_name(named.artifact):
        yield run / named.artifact
        yield from sorted(run.glob(f"{named.artifact}.old-*"))
    if not named.reference.startswith(ARTIFACT):
        yield expanded(named.reference)
    base = child.manifest.base
    if base and base.folder:
        yield (child.artifact.path / base.folder).resolve().parent
