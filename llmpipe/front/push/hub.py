"""A repository of the Hub: what is there, what of it is sent, and one commit at the end.

Large files go first, by Xet or by Git LFS, and are kept by the Hub by their sha256 before any
commit names them: a push that was killed finds them there and sends them no second time. What makes
them, the card and the small files a repository is one commit, so that nobody sees a half of it.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from llmpipe import __version__, screen
from llmpipe.data.readers.hub import is_reachable, kept_offline
from llmpipe.errors import LATER, UserError, first_line
from llmpipe.files.json import json_object
from llmpipe.front.push.contents import RepoFile, is_record
from llmpipe.front.push.ollama import FILES as OLLAMA
from llmpipe.front.push.refusals import GO_ON, TOKENS
from llmpipe.secrets import redacted

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub import RepoFile as RemoteFile

LOADED = (
    *("*.safetensors", "*.bin", "*.gguf", "*.index.json", "*config.json"),
    *("*token*.json", "*.model", "vocab.*", "merges.txt", "chat_template*"),
    *OLLAMA,
)
"""What loaders look for: such a file of another model would be taken for one of this."""


@dataclass(frozen=True)
class Remote:
    """The repository as it is."""

    head: str | None
    """Its last commit."""
    private: bool
    files: dict[str, RemoteFile]


def token_of(repo: str) -> str:
    """The token of the environment or of `hf auth login`. Raises UserError (2), (75) where there is
    none, or no network."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import OIDCError

    if kept_offline():
        problem = f"push: {repo}: HF_HUB_OFFLINE is set, so that the Hub is not asked"
        raise UserError(problem, "unset it, or look at all of it first: --dry-run DIR")
    try:
        token: str | None = get_token()
    except (OSError, OIDCError) as error:
        raise UserError(f"push: no token: {first_line(error)}") from None
    if not token:
        problem = "push: no token of the Hub, neither in HF_TOKEN nor from a login"
        raise UserError(problem, f"`hf auth login`, with one that may write, from {TOKENS}")
    if not is_reachable():
        raise UserError("push: the Hub cannot be reached", GO_ON, LATER)
    return token


def api_of(token: str) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="llmpipe", library_version=__version__)


def check_card(repo: str, text: str) -> None:
    """Have the Hub look at a card's metadata, which it does at a commit: before anything is made or
    sent there. Raises UserError (2) where it refuses them."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(text).validate()
    except ValueError as error:
        answer = json_object(str(error).encode()) or {}
        said = [str(one.get("message")) for one in answer.get("errors", [])]
        problem = f"push: {repo}: the Hub refuses the card: {'; '.join(said) or first_line(error)}"
        raise UserError(problem, "look at it: --dry-run DIR writes it") from None


def make(api: HfApi, repo: str, public: bool) -> Remote:
    """The repository, made where there is none.

    Raises UserError (2) for a public one, unless that is what is asked for.
    """
    api.create_repo(repo, private=not public, exist_ok=True)
    remote = look(api, repo)
    if not remote.private and not public:
        problem = f"push: {repo}: is there already, and public"
        raise UserError(problem, "--public says that this is meant; or take another name")
    return remote


def look(api: HfApi, repo: str, commit: str | None = None) -> Remote:
    """The repository as it is, or as it was at a commit."""
    from huggingface_hub import RepoFile as RemoteFile

    about = api.model_info(repo)
    listed = api.list_repo_tree(repo, recursive=True, revision=commit or about.sha)
    files = {one.path: one for one in listed if isinstance(one, RemoteFile)}
    return Remote(about.sha, bool(about.private), files)


def changed(files: list[RepoFile], remote: Remote) -> list[RepoFile]:
    """The files that are not there, or not as they are here."""
    return [file for file in files if not _is_same(file, remote.files.get(file.path))]


def _is_same(file: RepoFile, there: RemoteFile | None) -> bool:
    if there is None or there.size != file.entry.size:
        return False
    if there.lfs:
        return bool(there.lfs.sha256 == file.entry.sha256)
    from huggingface_hub.utils.sha import git_hash

    return bool(there.blob_id == git_hash(file.read()))


def stale(files: list[RepoFile], remote: Remote) -> list[str]:
    """Records of an earlier push that this one has not."""
    ours = {file.path for file in files}
    return [name for name in remote.files if name not in ours and is_record(name)]


def refuse_mixture(files: list[RepoFile], remote: Remote) -> None:
    """Raises UserError (2) where what else is there would be loaded in place of this model."""
    ours = {file.path for file in files}
    others = [name for name in remote.files if "/" not in name and name not in ours]
    loaded = [name for name in others if any(fnmatch(name, pattern) for pattern in LOADED)]
    if loaded:
        problem = f"push: the repository holds files of another model: {', '.join(loaded)}"
        hint = "remove them there, or push to a name of its own"
        if any(name.endswith(".gguf") for name in ours):
            hint += "; of one export name every GGUF format at once"
        raise UserError(problem, hint)


def upload(api: HfApi, repo: str, files: list[RepoFile]) -> list[Any]:
    """Send the large ones of some files, unless the Hub has them; what a commit takes of them all.

    They go by the sums that they were verified to have, so that they are not hashed again.
    """
    from huggingface_hub import CommitOperationAdd

    additions = []
    for file in files:
        source = file.source if isinstance(file.source, bytes) else str(file.source)
        addition = CommitOperationAdd(file.path, source)
        addition.upload_info.sha256 = bytes.fromhex(file.entry.sha256)
        additions.append(addition)
    api.preupload_lfs_files(repo, additions, free_memory=False)
    return additions


def commit(
    api: HfApi, repo: str, additions: list[Any], removed: list[str], remote: Remote, message: str
) -> str:
    """Make all of it the repository; the commit.

    It follows the one that was looked at: where somebody else has made one meanwhile it fails.
    """
    from huggingface_hub import CommitOperationDelete

    operations = [*additions, *(CommitOperationDelete(name) for name in removed)]
    made = api.create_commit(repo, operations, commit_message=message, parent_commit=remote.head)
    return str(made.oid)


@contextmanager
def in_our_words() -> Iterator[None]:
    """Have huggingface_hub show its bars on a terminal alone, and its warnings without addresses,
    which may be signed."""
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from huggingface_hub.utils import disable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    handlers, logger.handlers = logger.handlers, [_Aside()]
    if not screen.is_shown() and HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
    finally:
        logger.handlers = handlers
    for warning in warned:
        if issubclass(warning.category, UserWarning):  # others are for programmers
            _aside(f"the Hub: {' '.join(str(warning.message).split())}")


class _Aside(logging.Handler):
    """Says on standard error what huggingface_hub waits for."""

    def emit(self, record: logging.LogRecord) -> None:
        _aside(f"the Hub: {record.getMessage().partition(' thrown while ')[0]}")


def _aside(line: str) -> None:
    print(redacted(line), file=sys.stderr, flush=True)
