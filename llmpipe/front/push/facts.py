"""What a card says, as records: gathered by the others of this room, written by `card`."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

from llmpipe.files.tables import Table
from llmpipe.front.push.ancestry import Ancestry
from llmpipe.front.push.licences import Licences
from llmpipe.front.push.measured import Measured
from llmpipe.front.push.ollama import Modelfile
from llmpipe.front.push.rows import Rows
from llmpipe.run.exports import Export
from llmpipe.run.manifest import Manifest
from llmpipe.scores.thinking import opening_of

RANKS_OF_VLLM = (16, 32, 64, 128, 256, 320, 512)
"""Highest ranks of adapters that vLLM can be told; the first one it takes unless it is told."""

GGUF = "gguf"
"""The kind of formats of which a repository holds several."""


@dataclass(frozen=True)
class OnHub:
    """A base where others find it."""

    name: str
    revision: str


@dataclass(frozen=True)
class AdapterFacts:
    """What is to be known of an adapter by who loads it."""

    base: OnHub
    rank: int
    not_in_vllm: str
    """Why vLLM does not take it; empty where nothing is known against that."""
    rewritten: str
    """What adapter_config.json was published with in the place of the base's name; or nothing."""


@dataclass(frozen=True)
class TemplateFacts:
    """A chat template."""

    example: str | None
    """How it writes a question; None where it refuses one that stands alone."""
    kwargs: dict[str, Any]
    """Variables that it was given in training."""

    @property
    def thinks(self) -> bool:
        """Whether it opens a block of thought, in which an answer begins."""
        return bool(self.example and opening_of(self.example))

    @property
    def arguments(self) -> str:
        """Its variables as Python writes arguments, behind others."""
        if all(name.isidentifier() and not iskeyword(name) for name in self.kwargs):
            return "".join(f", {name}={value!r}" for name, value in self.kwargs.items())
        return f", **{self.kwargs!r}"

    def option(self, name: str) -> str:
        """Its variables as an option of a command, behind others."""
        given = json.dumps(self.kwargs, ensure_ascii=False)
        return f" {name} {shlex.quote(given)}" if self.kwargs else ""


@dataclass(frozen=True)
class FormatFacts:
    """A format of an export."""

    export: Export
    file: str
    """Name of a GGUF file in the repository; nothing of other formats."""

    @property
    def tag(self) -> str:
        """Its kind of numbers, by which llama.cpp and Ollama find the file: `Q8_0`."""
        return self.export.format.partition("-")[2].upper()


@dataclass(frozen=True)
class ExportFacts:
    """An export, or the one format of it that is pushed."""

    kind: str
    """`gguf`, `merged`, `adapter`, `torchao`, `bitsandbytes`, `compressed`."""
    formats: list[FormatFacts]
    packages: list[str]
    """That transformers needs to load it."""
    modelfile: Modelfile | None
    """Of GGUF files."""
    source: list[OnHub]
    """Where the Hub has what it was made of: the model, or an adapter's base and the adapter."""

    @property
    def chosen(self) -> FormatFacts:
        """The one that examples name: of those without a warning the smallest."""
        good = [one for one in self.formats if not one.export.warning]
        return min(good or self.formats, key=lambda one: one.export.size)


@dataclass(frozen=True)
class Facts:
    """All that a card says."""

    repo: str
    ancestry: Ancestry
    rows: list[Rows]
    measured: list[Measured]
    licences: Licences
    files: Table
    """Of the model, by their names in the repository."""
    adapter: AdapterFacts | None = None
    template: TemplateFacts | None = None
    export: ExportFacts | None = None

    @property
    def manifest(self) -> Manifest:
        return self.ancestry.itself.manifest

    @property
    def model(self) -> Manifest:
        """Of the artifact whose model it is: of an export the one that was exported."""
        return self.ancestry.model.manifest

    @property
    def name(self) -> str:
        """Of the repository, without the namespace."""
        return self.repo.partition("/")[2]

    @property
    def stops(self) -> list[str]:
        """Tokens that end an answer."""
        if self.model.tokenizer:
            return self.model.tokenizer.stop_tokens
        return self.export.modelfile.stops if self.export and self.export.modelfile else []

    @property
    def scores(self) -> bool:
        """Whether it scores answers, and gives none."""
        return self.manifest.kind == "reward-model"

    @property
    def base_on_hub(self) -> OnHub | None:
        """The model that all of it began with, where it is the Hub's."""
        base = self.ancestry.base
        if self.adapter:
            return self.adapter.base
        if base and base.hub_name and base.revision:
            return OnHub(base.hub_name, base.revision)
        return None
