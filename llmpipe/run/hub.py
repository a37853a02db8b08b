"""Models of the Hub: which commit a name means, and the files of that commit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmpipe.data.readers.hub import is_reachable, kept_offline
from llmpipe.errors import UserError
from llmpipe.recipe.places import nearest_here

HTTP_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests")
"""What `huggingface_hub` may speak with; each has connection errors of its own."""


@dataclass(frozen=True)
class Snapshot:
    """A commit of a model, and where it lies in the local cache if that is known."""

    commit: str
    folder: Path | None = None


def snapshot_of(reference: str, field: str) -> Snapshot:
    """The commit that NAME or NAME@REVISION means, from the cache where the Hub cannot be reached.

    `field` of the recipe is for the message. Raises UserError (2) when neither has it.
    """
    name, _, revision = reference.partition("@")
    commit = _commit_online(name, revision, field)
    return Snapshot(commit) if commit else _in_cache(name, revision, field)


def download(reference: str, commit: str, *, weights: bool) -> Path:
    """The folder of a model at a commit, fetched unless the cache has it."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.txt", "*.model"]
    if weights:
        patterns.append("*.safetensors")
    name = reference.partition("@")[0]
    return Path(snapshot_download(name, revision=commit, allow_patterns=patterns))


def _commit_online(name: str, revision: str, field: str) -> str | None:
    """The commit as the Hub knows it, or None where the Hub cannot be reached."""
    if kept_offline() or not is_reachable():
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        commit: str = HfApi().model_info(name, revision=revision or None, timeout=10).sha
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403, 404):
            problem = f"{field}: {name}: not found on the Hub, or closed to you (HTTP {status})"
            hint = "check the name; a gated model needs `hf auth login`; " + _local_hint(name)
            raise UserError(problem, hint) from None
        return None
    except (OSError, OfflineModeIsEnabled, RuntimeError):
        return None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in HTTP_CLIENTS:
            raise
        return None
    return commit


def _in_cache(name: str, revision: str, field: str) -> Snapshot:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        problem = (
            f"{field}: {name}: the Hub cannot be reached and the model is not in the local cache"
        )
        hint = f"go online once, or give a local folder or file; {_local_hint(name)}"
        raise UserError(problem, hint) from None
    return Snapshot(folder.name, folder)


def _local_hint(name: str) -> str:
    """What to write where a path was meant."""
    near = nearest_here(name)
    return f"did you mean {near}?" if near else "a path starts with ./"
