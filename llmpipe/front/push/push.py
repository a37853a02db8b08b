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
from pathlib import Path

from llmpipe import screen
from llmpipe.errors import INTEGRITY, Say, UserError
from llmpipe.files.tables import in_bytes
from llmpipe.front.push import hub
from llmpipe.front.push.adapter import adapted
from llmpipe.front.push.ancestry import Ancestry, ancestry
from llmpipe.front.push.card import card, question
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
from llmpipe.front.push.facts import AdapterFacts, ExportFacts, Facts, TemplateFacts
from llmpipe.front.push.formats import export_facts, files_of, template_for
from llmpipe.front.push.licence_ids import LICENCES
from llmpipe.front.push.licences import OTHER, Said, licences
from llmpipe.front.push.measured import Measured, measured
from llmpipe.front.push.named import Named, check_repo, verified
from llmpipe.front.push.refusals import asking
from llmpipe.front.push.rows import rows_of
from llmpipe.front.push.template import template_of
from llmpipe.report.text import counted
from llmpipe.run.artifact import Artifact
from llmpipe.run.exports import EXPORTS
from llmpipe.run.manifest import Manifest

ADAPTER = "adapter"
"""The format of an export that is one."""


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    names: list[str]
    """An artifact, or formats of an export."""
    repo: str
    """NAMESPACE/NAME."""
    public: bool
    said: Said
    base: str | None
    """NAMESPACE/NAME of what it was made of, where no manifest says where the Hub has it."""
    dry_run: Path | None


def push(asked: Asked, say: Say) -> None:
    """Push an artifact, or write what would be pushed. Raises UserError."""
    check_repo("push", asked.repo)
    named = verified(asked.names, say)
    if asked.dry_run:
        check_target(asked.dry_run, named.artifact.path)
    files = contents(asked, named, say)
    if asked.dry_run:
        write(files, asked.dry_run)
        size = in_bytes(size_of(files))
        say(f"{asked.dry_run}: {len(files):,} files, {size}, as {asked.repo} would have them")
        return
    token = hub.token_of(asked.repo)
    message = f"Push {named.title} with llmpipe"
    with asking(asked.repo, token), hub.in_our_words():
        send(Push(asked.repo, asked.public, files, message, named.refuse_changed), token, say)


# --- what is pushed -------------------------------------------------------------------------------


def contents(asked: Asked, named: Named, say: Say) -> list[RepoFile]:
    """The files of the repository, the card among them. Raises UserError (2, 3)."""
    lineage = ancestry(named.artifact, named.manifest)
    evaluations = _evaluations(lineage, say)
    shown = _shown(asked, named, lineage, say)
    rows = rows_of(lineage)
    with screen.doing("looking for licences"):
        allowed = licences(lineage, rows, asked.said)
    facts = Facts(
        repo=asked.repo,
        ancestry=lineage,
        rows=rows,
        measured=evaluations,
        licences=allowed,
        files=table_of(shown.files),
        adapter=shown.adapter,
        template=shown.template,
        export=shown.export,
    )
    _say_licences(facts, say)
    for one in shown.export.formats if shown.export else ():
        if one.export.warning:
            say(f"warning: {one.export.warning}, which the card says")
    text = RepoFile.of_text(CARD, card(facts))
    return [*shown.files, text, *_records(lineage, evaluations)]


@dataclass(frozen=True)
class Shown:
    """The files of a model, and what a card says of them."""

    files: list[RepoFile]
    adapter: AdapterFacts | None
    template: TemplateFacts | None
    export: ExportFacts | None = None


def _shown(asked: Asked, named: Named, lineage: Ancestry, say: Say) -> Shown:
    """Of an artifact or of formats of an export. Raises UserError (2, 3)."""
    if not named.formats:
        model = model_files(named.artifact, named.manifest)
        adapter = adapted(lineage.itself, model, asked.base, say)
        kwargs = named.manifest.asked.chat_template_kwargs
        template = template_of(named.artifact.model, kwargs, question(lineage))
        files = adapter.files if adapter else model
        return Shown(files, adapter.facts if adapter else None, template)
    files, formats = files_of(named, asked.repo)
    template = template_for(named, lineage, question(lineage))
    if named.formats[0].kind == ADAPTER:
        adapter = adapted(lineage.model, files, asked.base, say)
        assert adapter
        export = export_facts(named, formats, lineage, None)
        return Shown(adapter.files, adapter.facts, template, export)
    export = export_facts(named, formats, lineage, asked.base)
    if export.modelfile:
        files += export.modelfile.files(export.chosen.file)
    return Shown(files, None, template, export)


def _evaluations(lineage: Ancestry, say: Say) -> list[Measured]:
    """Of the model, as it is; a checkpoint that was exported is another one."""
    of_export = lineage.links[lineage.itself.manifest.fingerprint]
    if lineage.model is not lineage.itself and any("@" in link.name for link in of_export):
        return []
    artifact, manifest = lineage.model.artifact, lineage.model.manifest
    return measured(artifact, manifest, _merged_fingerprint(artifact, manifest), say)


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
        files[name] = records(ancestor.artifact, ancestor.manifest, name, [RECIPE, EXPORTS])
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
