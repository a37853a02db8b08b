"""An adapter that others are to load: its base has to be one that they can find.

adapter_config.json names the base as the recipe did. Of a model of the Hub that is its name, with
the commit beside it. A folder or an artifact of the run nobody else has; then `--base` says where
the Hub has it, and the weights there are held against those that the adapter was trained on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpipe.data.readers.hub import is_reachable, kept_offline
from llmpipe.errors import INTEGRITY, LATER, Say, UserError
from llmpipe.files.json import json_object
from llmpipe.files.tables import sha256_file
from llmpipe.front.push.ancestry import Ancestor, parent_of, place_of
from llmpipe.front.push.contents import MODEL, RepoFile
from llmpipe.front.push.facts import RANKS_OF_VLLM, AdapterFacts, OnHub
from llmpipe.front.push.hub import in_our_words
from llmpipe.front.push.named import check_repo
from llmpipe.front.push.refusals import GO_ON, asking
from llmpipe.recipe.places import is_hub_id
from llmpipe.run.artifact import MANIFEST
from llmpipe.run.manifest import Base
from llmpipe.typed import record

CONFIG = "adapter_config.json"

WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Adapted:
    """The files of an adapter as others load them, and what a card says of them."""

    files: list[RepoFile]
    facts: AdapterFacts


def adapted(one: Ancestor, files: list[RepoFile], base: str | None, say: Say) -> Adapted | None:
    """An adapter with a base that others find; None where an artifact is no adapter.

    `base`: where `--base` says that it is. Raises UserError (2) where nobody could find it, and (3)
    where it is another one there.
    """
    named = {file.path: file for file in files}
    if CONFIG not in named:
        if base:
            raise UserError("--base: is of an adapter, and this is none", "leave it out")
        return None
    document, config = _read(named[CONFIG])
    on_hub = _base_on_hub(one, base)
    rewritten = ""
    if (config.base_model_name_or_path, config.revision) != (on_hub.name, on_hub.revision):
        rewritten = config.base_model_name_or_path or "nothing"
        renamed = {"base_model_name_or_path": on_hub.name, "revision": on_hub.revision}
        text = json.dumps(document | renamed, indent=2, ensure_ascii=False) + "\n"
        named[CONFIG] = RepoFile.of_text(CONFIG, text)
        say(f"{CONFIG}: the base {rewritten} is called {on_hub.name} at {on_hub.revision[:12]}")
    facts = AdapterFacts(on_hub, config.r, _not_in_vllm(config), rewritten)
    return Adapted(list(named.values()), facts)


@dataclass(frozen=True)
class _Config:
    """What is read of adapter_config.json."""

    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int = 0
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: Any = None


def _read(file: RepoFile) -> tuple[dict[str, Any], _Config]:
    """adapter_config.json of an adapter, whole and in part. Raises UserError (3)."""
    document = json_object(file.read())
    try:
        return document or {}, record(_Config, document)
    except ValueError as error:
        problem = f"{file.path}: {error}"
        raise UserError(problem, "make the artifact again", INTEGRITY) from None


def _not_in_vllm(config: _Config) -> str:
    """What of an adapter vLLM refuses (`vllm.lora.peft_helper`)."""
    if config.use_dora:
        return "it is a DoRA adapter"
    if config.modules_to_save:
        return "it holds whole modules beside the adapter's"
    if config.trainable_token_indices:
        return "it holds rows of the embeddings beside the adapter's"
    if config.r > RANKS_OF_VLLM[-1]:
        return f"its rank is {config.r}, and vLLM takes {RANKS_OF_VLLM[-1]} at most"
    return ""


def _base_on_hub(one: Ancestor, named: str | None) -> OnHub:
    base = one.manifest.base
    if base is None:
        problem = f"{one.artifact.path}: its manifest names no base, and model/ holds an adapter"
        raise UserError(problem, "make the artifact again", INTEGRITY)
    revision = base.identity.get("revision")
    if base.kind == "hub" and revision:
        if named:
            raise UserError(f"--base: its base is {base.reference} of the Hub", "leave it out")
        return OnHub(_hub_name(one, base.reference), revision)
    if named is None:
        raise _not_to_be_found(one, base)
    return on_hub(one, base, named)


def _hub_name(one: Ancestor, reference: str) -> str:
    """A reference less its revision, once it is one that may stand in a command."""
    name = reference.partition("@")[0]
    if not is_hub_id(name):
        problem = f"{one.artifact.path / MANIFEST}: base: {reference} is none of the Hub's"
        raise UserError(problem, "make the artifact again", INTEGRITY)
    return name


def _not_to_be_found(one: Ancestor, base: Base) -> UserError:
    """What to say of a base that lies on this machine alone."""
    problem = f"push: {one.artifact.path}: its base {base.reference} is of this machine"
    ways = []
    if one.artifact.merged.finished:
        ways.append(f"push {one.artifact.merged.path}, which holds both")
    else:
        ways.append("train it with adapter: {merge: true}, and push the NAME-merged that it makes")
    if base.kind in ("artifact", "folder"):
        ways.append("say where the Hub has the base: --base NAMESPACE/NAME")
    return UserError(f"{problem}, where others find none", "; or ".join(ways))


def on_hub(one: Ancestor, base: Base, name: str) -> OnHub:
    """A repository that has the very weights of what an artifact was made of.

    Raises UserError (2), and (3) where it has others.
    """
    check_repo("--base", name)
    weights = _weights_of(one, base)
    if not weights:
        problem = f"--base: {base.reference}: is a {base.kind}, which no repository is held against"
        raise UserError(problem, "push it merged, or leave --base out")
    if kept_offline():
        problem = f"--base: {name}: HF_HUB_OFFLINE is set, so that it cannot be looked at"
        raise UserError(problem, "unset it")
    if not is_reachable():
        raise UserError("--base: the Hub cannot be reached", GO_ON, LATER)
    from huggingface_hub import HfApi, get_token
    from huggingface_hub import RepoFile as RemoteFile

    api = HfApi()
    with asking(name, get_token() or ""), in_our_words():
        commit = str(api.model_info(name).sha)
        listed = api.list_repo_tree(name, revision=commit)
        there = {
            file.path: file.lfs.sha256
            for file in listed
            if isinstance(file, RemoteFile) and file.lfs and file.path.endswith(WEIGHTS)
        }
    if there != weights:
        problem = f"--base: {name}: has other weights than {base.reference}, the base"
        hint = "push the base there first, or name the repository that has it"
        raise UserError(problem, hint, INTEGRITY)
    return OnHub(name, commit)


def _weights_of(one: Ancestor, base: Base) -> dict[str, str]:
    """The sums of a base's weights, by the name of the file; nothing where it has no such files."""
    if "checkpoint" in base.identity:
        return {}
    if base.kind == "artifact":
        parent = parent_of(one, {"reference": base.reference} | base.identity)
        files = {
            name.removeprefix(MODEL): entry.sha256
            for name, entry in parent.manifest.files.items()
            if name.startswith(MODEL)
        }
        return {name: sha256 for name, sha256 in files.items() if name.endswith(WEIGHTS)}
    place = place_of(one, base) if base.kind == "folder" else None
    return {path.name: sha256_file(path) for path in _weights_in(place)} if place else {}


def _weights_in(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{WEIGHTS}"))
