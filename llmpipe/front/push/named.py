"""What the command line names: a finished artifact or formats of an export, verified; and a
repository of the Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from llmpipe import screen
from llmpipe.errors import INTEGRITY, Say, UserError, first_line
from llmpipe.files.paths import expanded
from llmpipe.files.tables import stamp
from llmpipe.front.push.facts import GGUF
from llmpipe.recipe.names import ARTIFACT
from llmpipe.run.artifact import MANIFEST, Artifact, artifacts, is_artifact
from llmpipe.run.exported import KIND, Exported, exported, is_export
from llmpipe.run.exports import read_exports
from llmpipe.run.manifest import Manifest

KINDS = ("model", "adapter", "reward-model", KIND)
"""What is pushed."""

MEASURED = "push what it measured: its numbers are on that card"


@dataclass(frozen=True)
class Named:
    """What is pushed, every file of it as it was written."""

    artifact: Artifact
    manifest: Manifest
    formats: list[Exported] = field(default_factory=list)
    """Of an export; any other artifact has none."""
    stamps: dict[Path, str] = field(default_factory=dict)
    """Of every folder, before it was hashed."""

    def refuse_changed(self) -> None:
        """Raises UserError (3) where something was written to since it was verified."""
        for folder, before in self.stamps.items():
            if stamp(folder) != before:
                problem = f"{folder}: was changed since it was verified; nothing was committed"
                raise UserError(problem, "run the same command again", INTEGRITY)

    @property
    def title(self) -> str:
        """For the message of a commit."""
        formats = [one.export.format for one in self.formats]
        of_it = f": {', '.join(formats)}" if formats else ""
        return f"{self.manifest.name}{of_it} ({self.manifest.fingerprint[:12]})"


def check_repo(option: str, repo: str) -> None:
    """Raises UserError (2) for what is no name of a repository, as huggingface_hub has it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    hint = "your name on the Hub or an organization's, a /, and the name of the model"
    if repo.count("/") != 1:
        raise UserError(f"{option}: {repo}: is no NAMESPACE/NAME", hint)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        why = first_line(error)
        raise UserError(f"{option}: {repo}: is no NAMESPACE/NAME: {why}", hint) from None


def verified(names: list[str], say: Say) -> Named:
    """What is named, once its files were hashed.

    Raises UserError (2) for what is not pushed, or not in one repository, and (3) for what is not
    finished or is damaged.
    """
    folders = [_format_named(name) for name in names]
    if len(names) == 1 and folders[0] is None:
        artifact = artifact_named(names[0])
        if artifact.document().get("kind") != KIND:
            return _verified_artifact(artifact, say)
        formats = [artifact.path / export.format for export in read_exports(artifact.path)]
    else:
        formats = [folder for folder in dict.fromkeys(folders) if folder is not None]
        if other := [name for name, folder in zip(names, folders, strict=True) if folder is None]:
            problem = f"push: {other[0]}: is no format of an export, which alone go together"
            raise UserError(problem, "push one artifact at a time")
    _refuse_several(formats)
    return _verified_formats(formats, say)


def artifact_named(name: str) -> Artifact:
    """A finished artifact of a kind that is pushed. Raises UserError (2), and (3) for one that is
    not finished or is damaged."""
    if name.startswith(ARTIFACT):
        hint = f"give its path, such as runs/NAME/{name.removeprefix(ARTIFACT)}"
        raise UserError(f"push: {name}: is of a run, and push knows of none", hint)
    path = expanded(name)
    if path.name in ("", ".."):
        path = Path(os.path.abspath(path))  # whose name is to be said
    if not path.is_dir():
        raise UserError(f"push: {name}: no such artifact", "give its folder, such as runs/NAME/sft")
    if not os.path.lexists(path / MANIFEST):
        raise _without_manifest(path)
    artifact = Artifact(path)
    kind = artifact.document().get("kind")
    if kind not in KINDS:
        problem = f"push: {name}: is of kind '{kind}'; pushed is what is of kind {', '.join(KINDS)}"
        is_evaluation = kind == "evaluation"
        raise UserError(problem, MEASURED if is_evaluation else None)
    return artifact


def _verified_artifact(artifact: Artifact, say: Say) -> Named:
    before = stamp(artifact.path)
    with screen.doing("hashing the artifact"):
        manifest = artifact.verify()
    say(f"{artifact.path}: verified, {len(manifest.files):,} files as in the manifest")
    return Named(artifact, manifest, stamps={artifact.path: before})


# --- formats of an export -------------------------------------------------------------------------


def _format_named(name: str) -> Path | None:
    """The folder of a format, where a name is one of an export, finished or not, or its file."""
    path = expanded(name)
    folder = path.parent if path.is_file() else path
    home = Artifact(Path(os.path.abspath(folder)).parent)
    return folder if folder.is_dir() and is_export(home) else None


def _refuse_several(folders: list[Path]) -> None:
    """Raises UserError (2) for formats that make no one repository: what loads a model would take
    one of them for another."""
    of_gguf = [folder for folder in folders if folder.name.partition("-")[0] == GGUF]
    homes = {folder.absolute().parent for folder in folders}
    if len(homes) > 1:
        raise UserError("push: formats of several exports", "push one export at a time")
    if len(folders) > 1 and len(of_gguf) < len(folders):
        alone = [str(folder) for folder in folders if folder not in of_gguf]
        ways = [" ".join(map(str, of_gguf)), *alone] if of_gguf else alone
        names = ", ".join(folder.name for folder in folders)
        problem = f"push: {names}: are no one repository: GGUF files go together, all else alone"
        raise UserError(problem, f"push one of: {'; '.join(ways)}")


def _verified_formats(folders: list[Path], say: Say) -> Named:
    formats = []
    for folder in folders:
        with screen.doing(f"hashing {folder.name}"):
            one = exported(str(folder), "push")
        assert one is not None, folder
        formats.append(one)
        say(f"{folder}: verified, {len(one.export.files):,} files as in exports.jsonl")
    stamps = {one.folder: one.stamp for one in formats}
    return Named(formats[0].artifact, formats[0].manifest, formats, stamps)


def _without_manifest(path: Path) -> UserError:
    """What to say of a folder that is no finished artifact."""
    if os.path.lexists(path / "recipe.yaml"):
        hint = "the command that began it goes on with it"
        return UserError(f"push: {path}: is not finished", hint, INTEGRITY)
    if is_artifact(path.parent):
        return UserError(f"push: {path}: is a part of an artifact", f"push {path.parent} instead")
    finished = [str(one.path) for one in artifacts(path) if one.finished]
    if finished:
        problem = f"push: {path}: is a run, and one artifact of it is pushed"
        return UserError(problem, f"there are: {', '.join(finished)}")
    hint = "pushed is what llmpipe has made, such as runs/NAME/sft"
    return UserError(f"push: {path}: is no artifact: it has no {MANIFEST}", hint)
