"""What the command line names: a finished artifact, and a repository of the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from llmpipe.errors import INTEGRITY, UserError, first_line
from llmpipe.recipe.names import ARTIFACT
from llmpipe.run.artifact import MANIFEST, Artifact, artifacts, is_artifact

KINDS = ("model", "adapter", "reward-model")
"""What is pushed."""

MEASURED = "push what it measured: its numbers are on that card"


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


def artifact_named(name: str) -> Artifact:
    """A finished artifact of a kind that is pushed. Raises UserError (2), and (3) for one that is
    not finished or is damaged."""
    if name.startswith(ARTIFACT):
        hint = f"give its path, such as runs/NAME/{name.removeprefix(ARTIFACT)}"
        raise UserError(f"push: {name}: is of a run, and push knows of none", hint)
    path = Path(os.path.expanduser(name))
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
