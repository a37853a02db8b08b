"""Under which licence a base and rows are: as their owners recorded it, or as is said on the
command line; never guessed.

A base of the Hub says it on its card, a GGUF file in its header (`general.license`), a folder on
the card in it; rows of the Hub on theirs. What is recorded of a file counts where the file is the
very one that was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmpipe.data.cards import CARD
from llmpipe.data.readers.hub import is_reachable, kept_offline
from llmpipe.errors import UserError, near
from llmpipe.files.json import read_text
from llmpipe.front.push.ancestry import Ancestry, Outside, place_of
from llmpipe.front.push.licence_ids import AS_OF, LICENCES
from llmpipe.front.push.rows import Rows
from llmpipe.run.gguf import check_gguf
from llmpipe.run.hub import HTTP_CLIENTS

ID = re.compile(r"[a-z0-9][a-z0-9.+-]{1,60}")
"""How the Hub writes a licence: apache-2.0, cc-by-4.0, llama3.2, other, unknown."""

OTHER = "other"

SAID = "said by whoever pushed it"


@dataclass(frozen=True)
class Licence:
    """A licence, and who says so."""

    id: str
    """As it was recorded or said: the Hub's identifier, or another one."""
    by: str
    name: str | None = None
    """Beside the identifier `other`."""
    link: str | None = None

    @property
    def title(self) -> str:
        return self.name or self.id

    @property
    def metadata(self) -> dict[str, str | None]:
        """As a card has it, where what is none of the Hub's is `other` with a name."""
        if self.id in LICENCES and self.id != OTHER:
            return {"license": self.id}
        name = self.name if self.id == OTHER else self.id
        return {"license": OTHER, "license_name": name, "license_link": self.link}


@dataclass(frozen=True)
class Said:
    """What the command line says."""

    model: str | None = None
    rows: str | None = None
    """Of all rows of which nothing is recorded."""
    of_source: tuple[tuple[str, str], ...] = ()
    """(source, licence)."""


@dataclass(frozen=True)
class Licences:
    """Of everything that is named on a card."""

    model: Licence
    base: Licence | None
    """As recorded; None where nothing is, or there is no base."""
    rows: dict[str, Licence]
    """By source."""


def read_said(model: str | None, of_rows: Iterable[str]) -> Said:
    """What `--license` and `--data-license` say. Raises UserError (2) for what is no licence."""
    if model is not None:
        _check("--license", model)
    plain: list[str] = []
    by_source: list[tuple[str, str]] = []
    for text in of_rows:
        source, equals, licence = text.rpartition("=")
        _check("--data-license", licence)
        if equals:
            by_source.append((source, licence))
        else:
            plain.append(licence)
    if len(set(plain)) > 1:
        problem = f"--data-license: {' and '.join(plain)}: of which rows?"
        raise UserError(problem, f"--data-license SOURCE={plain[0]} says it of one source")
    return Said(model, plain[0] if plain else None, tuple(by_source))


def _check(option: str, text: str) -> None:
    if text in LICENCES:
        return
    plain = text.strip().lower().replace(" ", "-")
    problem = f"{option}: {text!r} is no licence of the Hub's{near(plain, sorted(LICENCES))}"
    hint = f"`other` is one that is not on its list ({AS_OF}), `unknown` one that nobody knows"
    raise UserError(problem, hint)


def licences(ancestry: Ancestry, rows: list[Rows], said: Said) -> Licences:
    """The licence of the model, its base and its rows.

    Raises UserError (2) asking for every one that is neither recorded nor said.
    """
    rows = [one for one in rows if not one.made_by]  # what a model of the lineage wrote has none
    sources = list(dict.fromkeys(one.path for one in rows))
    _check_sources(said, sources)
    base = ancestry.base
    place = place_of(base.used_by, base.base) if base and base.base else None
    of_base = _of_base(base, place) if base else None
    each = {one.path: one for one in rows}.values()
    of_rows = {one.path: licence for one in each if (licence := _of_rows(one, said))}
    lacking = [source for source in sources if source not in of_rows]
    of_model = of_base and replace(of_base, by=f"its base: {of_base.by}")
    if said.model:
        of_model = Licence(said.model, SAID)
    problems = []
    if of_model is None:
        problems.append(_ask_for_model(base))
    if lacking:
        problems.append(_ask_for_rows(lacking))
    if problems or of_model is None:
        hint = "push says what is known, and guesses no licence"
        of_hub = [one for one in rows if one.is_of_hub] or (base and base.hub_name)
        if of_hub and kept_offline():
            hint += "; HF_HUB_OFFLINE is set, so that no card on the Hub was read"
        if base and not base.hub_name and place is None:
            hint += f"; {base.reference} lies not where it was, so that nothing was read of it"
        raise UserError("\n".join(problems), hint)
    return Licences(of_model, of_base, of_rows)


def _check_sources(said: Said, sources: list[str]) -> None:
    for source, licence in said.of_source:
        if source not in sources:
            problem = f"--data-license: {source}={licence}: no rows of that name"
            known = f"there are: {', '.join(sources) or 'none'}"
            raise UserError(f"{problem}{near(source, sources)}", known)


def _ask_for_model(base: Outside | None) -> str:
    whose = f"{base.reference}, the base" if base else "a model whose weights were drawn"
    return f"push: no licence is recorded of {whose}, so say it: --license ID, such as apache-2.0"


def _ask_for_rows(sources: list[str]) -> str:
    named = ", ".join(sources)
    option = "--data-license ID" if len(sources) == 1 else f"--data-license {sources[0]}=ID"
    more = "" if len(sources) == 1 else ", or --data-license ID for all"
    return f"push: no licence is recorded of the rows {named}, so say it: {option}{more}"


# --- recorded -------------------------------------------------------------------------------------


def _of_rows(rows: Rows, said: Said) -> Licence | None:
    recorded = _on_hub("dataset", rows.path, rows.revision) if rows.is_of_hub else None
    named = dict(said.of_source).get(rows.path)
    if named and recorded:
        return Licence(named, f"{SAID}; {recorded.by} says {recorded.title}")
    if recorded:
        return recorded
    stated = named or said.rows
    return Licence(stated, SAID) if stated else None


def _of_base(base: Outside, place: Path | None) -> Licence | None:
    """`place`: where it lies, if it lies here."""
    if base.hub_name:
        return _on_hub("model", base.hub_name, base.revision)
    if place is None:
        return None
    if place.is_file():
        header = check_gguf(place).metadata
        names = {"license": "", "license_name": ".name", "license_link": ".link"}
        card = {name: header.get(f"general.license{end}") for name, end in names.items()}
        return _licence(card, "the header of its GGUF file")
    return _licence(_card_in(place), "the card in its folder")


def _card_in(folder: Path) -> dict[str, Any]:
    """What the card in a folder records; nothing where there is none that can be read."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        text = read_text(folder / CARD)
        has_record = text.startswith("---")
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict() if has_record else {}
    except (OSError, ValueError, TypeError, YAMLError):
        return {}


def _on_hub(kind: str, name: str, revision: str | None) -> Licence | None:
    """What a card on the Hub says; None where it says nothing, or cannot be asked."""
    if kept_offline() or not is_reachable():
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=10)
    except (HfHubHTTPError, OSError):
        return None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in HTTP_CLIENTS:
            raise
        return None
    return _licence(info.card_data.to_dict() if info.card_data else {}, "its card on the Hub")


def _licence(card: dict[str, Any], by: str) -> Licence | None:
    """What a card records; of several licences the first, as the Hub lists them."""
    recorded = card.get("license")
    if isinstance(recorded, list) and recorded:
        recorded = recorded[0]
    if not isinstance(recorded, str) or not ID.fullmatch(recorded.lower()):
        return None
    name, link = card.get("license_name"), card.get("license_link")
    return Licence(recorded.lower(), by, _text(name), _text(link))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None
