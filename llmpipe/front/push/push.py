"""`llmpipe push ARTIFACT NAMESPACE/NAME`, from top to bottom.

1. The artifact is verified, every file by its sha256; nothing was asked of anybody so far.
2. What it was made from is gathered, and which evaluations scored it.
3. Licences: what is recorded, and what is asked for.
4. The card is made, and the files of the repository are known.
5. A dry run writes them into a folder. Else what the Hub lacks is sent, in one commit; and it is
   looked at whether the Hub then has what the manifest says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llmpipe import screen
from llmpipe.errors import INTEGRITY, Say, UserError
from llmpipe.files import in_bytes, stamp
from llmpipe.front.push import hub
from llmpipe.front.push.adapter import adapted
from llmpipe.front.push.ancestry import Ancestry, ancestry
from llmpipe.front.push.card import Facts, card, question
from llmpipe.front.push.contents import (
    CARD,
    RECIPE,
    RESULTS,
    RepoFile,
    check_target,
    model_files,
    records,
    size_of,
    table_of,
    write,
)
from llmpipe.front.push.licence_ids import LICENCES
from llmpipe.front.push.licences import OTHER, Said, licences
from llmpipe.front.push.measured import Measured, measured
from llmpipe.front.push.named import artifact_named, check_repo
from llmpipe.front.push.refusals import asking
from llmpipe.front.push.rows import rows_of
from llmpipe.front.push.template import template_of
from llmpipe.report.text import counted
from llmpipe.run.artifact import Artifact
from llmpipe.run.manifest import Manifest


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    artifact: str
    repo: str
    """NAMESPACE/NAME."""
    public: bool
    said: Said
    base: str | None
    """NAMESPACE/NAME of an adapter's base, where its manifest names none on the Hub."""
    dry_run: Path | None


def push(asked: Asked, say: Say) -> None:
    """Push an artifact, or write what would be pushed. Raises UserError."""
    check_repo("push", asked.repo)
    artifact = artifact_named(asked.artifact)
    if asked.dry_run:
        check_target(asked.dry_run, artifact.path)
    before = stamp(artifact.path)
    with screen.doing("hashing the artifact"):
        manifest = artifact.verify()
    say(f"{artifact.path}: verified, {len(manifest.files):,} files as in the manifest")
    files = contents(asked, artifact, manifest, say)
    if asked.dry_run:
        write(files, asked.dry_run)
        size = in_bytes(size_of(files))
        say(f"{asked.dry_run}: {len(files):,} files, {size}, as {asked.repo} would have them")
        return
    token = hub.token_of(asked.repo)
    message = f"Push {manifest.name} ({manifest.fingerprint[:12]}) with llmpipe"
    unchanged = partial(refuse_changed, artifact, before)
    with asking(asked.repo, token), hub.in_our_words():
        send(Push(asked.repo, asked.public, files, message, unchanged), token, say)


# --- what is pushed -------------------------------------------------------------------------------


def contents(asked: Asked, artifact: Artifact, manifest: Manifest, say: Say) -> list[RepoFile]:
    """The files of the repository, the card among them. Raises UserError (2, 3)."""
    lineage = ancestry(artifact, manifest)
    evaluations = measured(artifact, manifest, _merged_fingerprint(artifact, manifest), say)
    model = model_files(artifact, manifest)
    adapter = adapted(lineage.itself, model, asked.base, say)
    rows = rows_of(lineage)
    with screen.doing("looking for licences"):
        allowed = licences(lineage, rows, asked.said)
    facts = Facts(
        repo=asked.repo,
        ancestry=lineage,
        rows=rows,
        measured=evaluations,
        licences=allowed,
        files=table_of(adapter.files if adapter else model),
        adapter=adapter.facts if adapter else None,
        template=template_of(artifact.model, manifest, question(lineage)),
    )
    _say_licences(facts, say)
    text = RepoFile.of_text(CARD, card(facts))
    return [*(adapter.files if adapter else model), text, *_records(lineage, evaluations)]


def _say_licences(facts: Facts, say: Say) -> None:
    licence, base = facts.licences.model, facts.licences.base
    say(f"licence: {licence.title} ({licence.by})")
    if licence.id not in LICENCES:
        say(f"licence: {licence.id} is not on the Hub's list: there it is {OTHER}, with that name")
    if base and base.id != licence.id:
        say(f"warning: the base is under {base.title} ({base.by}), which may not allow another one")


def _merged_fingerprint(artifact: Artifact, manifest: Manifest) -> str:
    """Of the adapter that was merged in an artifact; empty where there is none any more."""
    if manifest.merged_from is None:
        return ""
    adapter = Artifact(artifact.run / manifest.merged_from)
    if not adapter.finished:
        return ""
    of_adapter = adapter.manifest()
    is_it = (of_adapter.identity, of_adapter.finished) == (manifest.identity, manifest.finished)
    return of_adapter.fingerprint if is_it else ""


def _records(lineage: Ancestry, evaluations: list[Measured]) -> list[RepoFile]:
    """What the card was made of; of two parents of one name the second has a longer one."""
    files: dict[str, list[RepoFile]] = {}
    for one in evaluations:
        files[one.name] = records(one.artifact, one.manifest, one.name, [RECIPE, RESULTS])
    for ancestor in reversed(lineage.made):
        name = ancestor.name
        if name in files:
            name = f"{name}-{ancestor.manifest.fingerprint[:12]}"
        files[name] = records(ancestor.artifact, ancestor.manifest, name, [RECIPE])
    return [file for of_one in files.values() for file in of_one]


# --- to the Hub -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Push:
    """What is sent where."""

    repo: str
    public: bool
    files: list[RepoFile]
    message: str
    refuse_changed: Callable[[], None]
    """Raises UserError (3) where the artifact was written to since it was verified."""

    @property
    def card(self) -> str:
        return next(file.read().decode() for file in self.files if file.path == CARD)


def send(push: Push, token: str, say: Say) -> None:
    """Send what the Hub lacks, and look at what it has then."""
    api, repo, files = hub.api_of(token), push.repo, push.files
    hub.check_card(repo, push.card)
    remote = hub.make(api, repo, push.public)
    lacking, removed = hub.changed(files, remote), hub.stale(files, remote)
    if lacking or removed:
        hub.refuse_mixture(files, remote)
        there = len(files) - len(lacking)
        known = f"; {there:,} are there already" if there else ""
        size = in_bytes(size_of(lacking))
        say(f"{repo}: {counted(len(lacking), 'file')} to send, {size}{known}")
        additions = hub.upload(api, repo, lacking)
        push.refuse_changed()
        commit = hub.commit(api, repo, additions, removed, remote, push.message)
        refuse_other(repo, hub.changed(files, hub.look(api, repo, commit)))
        say(f"{repo}: pushed: the Hub has all {len(files):,} files by their sums")
    else:
        say(f"{repo}: nothing to do: the Hub has all {len(files):,} files by their sums")
    private = remote.private and not push.public
    if remote.private and push.public:
        api.update_repo_settings(repo, private=False)
    seen_by = "you and whom you let" if private else "everybody"
    say(f"{api.endpoint}/{repo} (seen by {seen_by})")


def refuse_other(repo: str, lacking: list[RepoFile]) -> None:
    """Raises UserError (3) where the Hub has not what was sent."""
    if lacking:
        names = ", ".join(file.path for file in lacking)
        problem = f"push: {repo}: the Hub has not what was sent: {names}"
        raise UserError(problem, "see whether a .gitignore is there; else run it again", INTEGRITY)


def refuse_changed(artifact: Artifact, before: str) -> None:
    """Raises UserError (3) where an artifact was written to since it was verified."""
    if stamp(artifact.path) != before:
        problem = f"{artifact.path}: was changed since it was verified; nothing was committed"
        raise UserError(problem, "run the same command again", INTEGRITY)
