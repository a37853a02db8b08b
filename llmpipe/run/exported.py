"""One format of a finished export, named by its folder: `chat`, `serve` and `push` take one so."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import digest
from llmpipe.files.paths import expanded
from llmpipe.files.tables import differences, stamp
from llmpipe.recipe.yaml import parse
from llmpipe.run.artifact import Artifact
from llmpipe.run.exports import EXPORTS, Export, read_exports
from llmpipe.run.manifest import Manifest
from llmpipe.run.reference import Model, Use, base_of

KIND = "export"
"""Of the artifact, and the name of the stage."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A format, every file of it as it was written."""

    artifact: Artifact
    """The export."""
    manifest: Manifest
    """Of the export; its probe is what the model that was exported says."""
    export: Export
    """Its line in exports.jsonl."""
    asker: str
    """The command that takes it, for messages."""
    stamp: str
    """Of its folder before it was hashed, see `files.stamp`."""

    @cached_property
    def model(self) -> Model:
        """What there is to load: a folder, a GGUF file, or an adapter with its base.

        Raises UserError (3) where an adapter's base lies not here, or is another one.
        """
        return _model(self.artifact, self.manifest, self.export, self.stamp, self.asker)

    @property
    def kind(self) -> str:
        """`merged`, `adapter`, `gguf`, `torchao`, `bitsandbytes`, `compressed`."""
        return self.export.format.partition("-")[0]

    @property
    def folder(self) -> Path:
        return self.artifact.path / self.export.format


def exported(name: str, asker: str) -> Exported | None:
    """The format whose folder, or whose file of weights, is named; None for what is no part of an
    export.

    `asker`: the command, for messages. Raises UserError (2) for a whole export and for what is none
    of its formats, and (3) for one that is not finished, or not as it was written.
    """
    path = Path(os.path.abspath(expanded(name)))
    # not pathlib's, which raise for a name that is too long
    folder = path.parent if os.path.isfile(path) else path
    if not os.path.isdir(folder):
        return None
    if is_export(Artifact(folder)):
        raise _whole(Artifact(folder), f"{asker}: {name}")
    artifact = Artifact(folder.parent)
    if not is_export(artifact):
        return None
    if not artifact.finished:
        problem = f"{asker}: {name}: the export {artifact.path} is not finished"
        raise UserError(problem, "the command that began it goes on with it", INTEGRITY)
    artifact.published(EXPORTS)
    lines = {export.format: export for export in read_exports(artifact.path)}
    export = lines.get(folder.name)
    if export is None:
        hint = f"there are: {', '.join(lines)}"
        raise UserError(f"{asker}: {name}: is no format of {artifact.path}", hint)
    before = stamp(folder)
    if problems := differences(folder, export.files):
        problem = "\n".join(f"{folder}/{problem}" for problem in problems)
        hint = "it is not what was exported: restore it, or export again with --fresh"
        raise UserError(problem, hint, INTEGRITY)
    return Exported(
        artifact=artifact,
        manifest=artifact.manifest(),
        export=export,
        asker=asker,
        stamp=before,
    )


def is_export(artifact: Artifact) -> bool:
    """Whether it is an export, finished or begun."""
    if artifact.finished:
        return bool(artifact.document().get("kind") == KIND)
    recipe = artifact.path / "recipe.yaml"
    if not recipe.is_file():
        return False
    values: Any = parse(recipe.read_text(), str(recipe))[0]
    return isinstance(values, dict) and values.get("stage") == KIND


def _whole(artifact: Artifact, named: str) -> UserError:
    """What to say where an export is named, and none of its formats."""
    if not artifact.finished:
        hint = "the command that began it goes on with it"
        return UserError(f"{named}: is an export, and not finished", hint, INTEGRITY)
    formats = [str(artifact.path / export.format) for export in read_exports(artifact.path)]
    problem = f"{named}: is an export, and one format of it is taken"
    return UserError(problem, f"there are: {', '.join(formats)}")


def _model(
    artifact: Artifact, manifest: Manifest, export: Export, before: str, asker: str
) -> Model:
    """What lies in the folder of a format, `before` being the stamp of it when it was hashed."""
    folder = artifact.path / export.format
    reference = str(folder)
    files = [name for name in export.files if name.endswith(".gguf")]
    if files:
        file = folder / files[0]
        sha256 = export.files[files[0]].sha256
        return Model("gguf", str(file), {"gguf": sha256}, file, stamp=stamp(file))
    if not (folder / "adapter_config.json").exists():
        return Model("folder", reference, {"files": digest(export.files)}, folder, stamp=before)
    if manifest.base is None:
        problem = f"{artifact.path}: base: is missing, and {export.format}/ holds an adapter"
        raise UserError(problem, "export again with --fresh", INTEGRITY)
    identity = {"artifact": artifact.name, "fingerprint": manifest.fingerprint}
    base = base_of(artifact, manifest.base, Use(asker, (KIND,)))
    return Model("artifact", reference, identity, folder, manifest.parents, base, before)
