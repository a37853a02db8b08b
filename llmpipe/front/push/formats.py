"""The formats of an export as a repository of the Hub has them: GGUF files together, each called by
the model and its kind of numbers, anything else as the folder that loaders take.

    tiny-Q8_0.gguf  tiny-F16.gguf        `llama-cli -hf me/tiny-GGUF:Q8_0` finds it by its name
    Modelfile  template  system  params  for Ollama, see `ollama`
"""

from __future__ import annotations

import re
from pathlib import Path

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import read_json
from llmpipe.files.tables import FileEntry
from llmpipe.front.push.adapter import on_hub
from llmpipe.front.push.ancestry import Ancestry, Outside
from llmpipe.front.push.contents import RepoFile
from llmpipe.front.push.facts import GGUF, ExportFacts, FormatFacts, OnHub, TemplateFacts
from llmpipe.front.push.named import Named
from llmpipe.front.push.ollama import NAME, Modelfile
from llmpipe.front.push.template import template_in, template_of
from llmpipe.run.exported import Exported
from llmpipe.run.gguf import check_gguf
from llmpipe.run.manifest import Base, ModelKind

PACKAGES = ("torchao", "bitsandbytes", "compressed-tensors")
"""What transformers needs: called as `quant_method` in config.json."""


def files_of(named: Named, repo: str) -> tuple[list[RepoFile], list[FormatFacts]]:
    """The files of the formats, by their names in the repository. Raises UserError (3)."""
    first = named.formats[0]
    if first.kind != GGUF:
        files = [RepoFile(name, first.folder / name, it) for name, it in first.export.files.items()]
        return files, [FormatFacts(first.export, "")]
    facts = [FormatFacts(one.export, _called(one, repo)) for one in named.formats]
    files = [_weights(one, of_it.file) for one, of_it in zip(named.formats, facts, strict=True)]
    return files, facts


def export_facts(
    named: Named, formats: list[FormatFacts], lineage: Ancestry, base: str | None
) -> ExportFacts:
    """`base`: where the Hub has what was exported, as `--base` says. Raises UserError (2, 3)."""
    kind = named.formats[0].kind
    return ExportFacts(
        kind=kind,
        formats=formats,
        packages=_packages(named.formats[0].folder),
        modelfile=_modelfile(named.formats) if kind == GGUF else None,
        source=_sources(kind, lineage, base),
    )


def template_for(named: Named, lineage: Ancestry, question: str) -> TemplateFacts | None:
    """The chat template of what is pushed. Raises UserError."""
    one = named.formats[0]
    kwargs = one.export.template_kwargs
    if one.kind != GGUF:
        return template_of(one.folder, kwargs, question)
    probe = named.manifest.probe or lineage.model.manifest.probe
    if not check_gguf(_gguf(one)[0]).has_template:
        return None
    if probe is None:
        problem = f"{named.artifact.path}: its manifest does not say what the template writes"
        raise UserError(problem, "an older llmpipe made it: export again with --fresh", INTEGRITY)
    return template_in(probe, kwargs)


def _called(one: Exported, repo: str) -> str:
    """NAME-Q8_0.gguf, of the repository NAME-GGUF."""
    name = re.sub(r"[-_.]gguf$", "", repo.partition("/")[2], flags=re.I)
    return f"{name}-{FormatFacts(one.export, '').tag}.gguf"


def _weights(one: Exported, called: str) -> RepoFile:
    path, entry = _gguf(one)
    return RepoFile(called, path, entry)


def _gguf(one: Exported) -> tuple[Path, FileEntry]:
    """The one GGUF file of a format."""
    [(name, entry)] = [it for it in one.export.files.items() if it[0].endswith(".gguf")]
    return one.folder / name, entry


def _modelfile(formats: list[Exported]) -> Modelfile:
    """What every one of them says but for the name of its file. Raises UserError (3)."""
    first, *others = [Modelfile.of(one.folder / NAME) for one in formats]
    for one, other in zip(formats[1:], others, strict=True):
        if not other.says_the_same(first):
            problem = f"{one.folder / NAME}: says something else than that of {formats[0].folder}"
            raise UserError(problem, "export again with --fresh", INTEGRITY)
    return first


def _packages(folder: Path) -> list[str]:
    """What transformers needs beside itself to load a folder."""
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return [method] if method in PACKAGES else []


# --- what it was made of, on the Hub --------------------------------------------------------------


def _sources(kind: str, lineage: Ancestry, named: str | None) -> list[OnHub]:
    """Where the Hub has what was exported; of a merged adapter also what that was trained on.

    Nothing where nobody said so. Raises UserError (2, 3) where it has something else there.
    """
    outside = next((it for it in lineage.outside if it.used_by == lineage.itself), None)
    if outside and outside.hub_name and outside.revision:
        if named:
            raise UserError(f"--base: it is {outside.hub_name} of the Hub", "leave it out")
        return [OnHub(outside.hub_name, outside.revision)]
    if named is None:
        return []
    source = on_hub(lineage.itself, _exported(lineage, outside), named)
    under = lineage.base
    is_merged = kind == "merged" and lineage.model.manifest.kind == "adapter"
    if is_merged and under and under.hub_name and under.revision:
        return [OnHub(under.hub_name, under.revision), source]
    return [source]


def _exported(lineage: Ancestry, outside: Outside | None) -> Base:
    """What was exported, as a manifest has what something else was made of."""
    if outside is None:
        model = lineage.itself.manifest.models["model"]
        return Base(kind="artifact", reference=model["reference"], identity=model)
    kind: ModelKind = "gguf" if "gguf" in outside.identity else "folder"
    return Base(kind=kind, reference=outside.reference, identity=outside.identity)
