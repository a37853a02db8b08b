"""Which format a row of a source has.

The first rows decide the format of a source, and whether the stage takes it. From then on every
row is read by its own columns, wherever in the source they first appear: a column that its format
reads is read, and a row of another format is read as that one where both give the same shape. A
column that holds null is one that is not there, since a table has a null wherever a row of a JSON
file has no such key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from llmpipe.data.examples import Example, Prompt
from llmpipe.data.fields import Rejected, Values
from llmpipe.data.format import Format
from llmpipe.data.formats import FORMATS
from llmpipe.errors import UserError, near

SHOWN = 40  # columns in a message

Names = tuple[str, ...]  # columns of a row
Renaming = dict[str, str]  # {your column: the format's}


class Reading(NamedTuple):
    """How rows with the same columns are read."""

    format: Format
    columns: Renaming
    """Of each column that is read."""
    others: Renaming
    """Of the rest, as the recipe calls them; stages may read these."""


class Converted(NamedTuple):
    """What a row became."""

    example: Example
    others: dict[str, Any]
    """The columns that its format does not read, as the recipe calls them."""
    values: Values
    """What its format read, and what of that nobody reads."""
    names: Names
    """The row's columns, less those that hold null."""
    format: str


@dataclass(frozen=True)
class Layout:
    """How the rows of a source are read; it is sent to worker processes."""

    format: str
    """Of the first row that has one."""
    columns: Renaming
    """Each column of the first rows that is read."""
    unused: list[str]
    """The other columns of the first rows."""
    rule: Rule
    of_chats: bool = False
    """Whether one of the first rows has a system prompt or tools: then texts are turns of a chat,
    in rows without one as well."""

    @property
    def shape(self) -> type:
        """The shape of the examples that rows become; see `Format.shape`."""
        return FORMATS[self.format].shape

    def reading(self, names: Names) -> Reading | None:
        """How rows with these columns are read, if they can be."""
        return _reading(self.rule, self.format, names)

    def convert(self, row: dict[str, Any]) -> Converted:
        """A row as it was read -> an example. Raises Rejected."""
        names = tuple([name for name, value in row.items() if value is not None])
        reading = self.reading(names)
        if reading is None:
            raise self._misfit(row, names)
        columns = reading.columns
        values = Values({name: row[yours] for yours, name in columns.items()})
        if self.of_chats and "system" in reading.format.optional:
            values.setdefault("system", None)
        example = reading.format.example_of(values)
        mapping = self.rule.renaming
        others = {mapping.get(it, it): value for it, value in row.items() if it not in columns}
        return Converted(example, others, values, names, reading.format.name)

    def _misfit(self, row: dict[str, Any], names: Names) -> Rejected:
        """Why a row cannot be read: which column it lacks, or that it is of another format."""
        another = _best(FORMATS.values(), self.rule, names)
        unlike = ""
        if another and another.format.name != self.format:
            unlike = f": a row of format {another.format.name} among rows of {self.format}"
        yours = {name: your for your, name in self.columns.items()}
        for name in FORMATS[self.format].required:
            column = yours.get(name, name)
            if row.get(column) is None:
                if column in row:
                    return Rejected("null", f"{column} holds nothing{unlike}")
                return Rejected("missing column", column + unlike)
        return Rejected("two columns are one", f"after columns, among {listed_columns(names)}")


@dataclass(frozen=True)
class Rule:
    """What of a recipe decides how rows are read."""

    format: str
    """The recipe's `format`."""
    mapping: tuple[tuple[str, str], ...]
    """The recipe's `columns`."""
    shapes: tuple[type, ...]
    """What the stage takes."""

    @property
    def renaming(self) -> Renaming:
        return dict(self.mapping)


def layout_of(sample: Sequence[dict[str, Any]], rule: Rule, where: str) -> Layout:
    """How rows are read that begin with these. Raises UserError.

    `where` begins its message.
    """
    present = [tuple([it for it in row if row[it] is not None]) for row in sample]
    every = tuple(dict.fromkeys(name for row in sample for name in row))
    format = _format_of(present, every, rule, where)
    read: Renaming = {}
    for names in present:
        reading = _reading(rule, format, names)
        read |= reading.columns if reading else {}
    of_chats = bool({"system", "tools"} & set(read.values()))
    together = _best([FORMATS[format]], rule, every)  # of columns that hold null, too
    if together and read.keys() <= together.columns.keys():
        read = together.columns
    unused = [name for name in every if name not in read]
    return Layout(format, read, unused, rule, of_chats)


def formats_of(shapes: Iterable[type]) -> list[str]:
    """The names of the formats whose rows become one of these shapes."""
    every = FORMATS.values()
    return [format.name for shape in shapes for format in every if format.shape is shape]


def awaited(layout: Layout) -> set[str]:
    """Columns that the recipe maps, and that none of the first rows has."""
    return set(layout.rule.renaming) - {*layout.columns, *layout.unused}


def never_came(where: str, names: Iterable[str]) -> UserError:
    """The mistake of a recipe that maps columns which no row has."""
    shown = ", ".join(f"'{name}'" for name in sorted(names))
    return UserError(
        f"{where}: columns: no usable row has a column {shown}", "see data.train.columns"
    )


def _format_of(present: list[Names], every: Names, rule: Rule, where: str) -> str:
    """The format of the first row that has one, or of all the first rows together."""
    candidates = _candidates(rule)
    _check_mapping(every, rule, where)
    for names in (*present, every):
        if reading := _best(candidates, rule, names):
            return reading.format.name
    _check_mapping(every, rule, where, all_of_it=True)
    fits = "no format fits" if rule.format == "auto" else f"format {rule.format} does not fit"
    needed = "; ".join(f"{it.name}: {', '.join(it.required)}" for it in candidates)
    problem = f"{where}: {fits} the columns {listed_columns(every)}"
    raise UserError(problem, f"needed are {needed}. {_example(every, candidates)}")


def _example(columns: Names, candidates: list[Format]) -> str:
    """How these columns might be mapped to a format that has no more."""
    named = [name for name in columns if name.isidentifier()]
    fitting = [it for it in candidates if len(it.required) <= len(named)]
    usual = [it for it in fitting if it.name == "alpaca"] or fitting
    if not usual:
        return "Map yours with columns"
    pairs = zip(named, usual[0].required, strict=False)
    mapping = ", ".join(f"{yours[:40]}: {theirs}" for yours, theirs in pairs)
    return f"Map yours with columns, such as {{{mapping}}}"


def _check_mapping(columns: Names, rule: Rule, where: str, all_of_it: bool = False) -> None:
    """A mapped column that none of the first rows has may come later, unless it looks misspelt."""
    hint = f"found: {listed_columns(columns)}"
    mapping = rule.renaming
    for name in mapping:
        guess = near(name, columns)
        if name not in columns and (guess or all_of_it):
            raise UserError(f"{where}: columns: there is no column '{name}'{guess}", hint)
    renamed = Counter(mapping.get(name, name) for name in columns)
    name, count = next(iter(renamed.most_common(1)), ("", 0))
    if count > 1:
        raise UserError(f"{where}: two columns are called '{name[:100]}' after mapping", hint)


def listed_columns(columns: Iterable[str]) -> str:
    """The first columns, and how many more there are."""
    names = [name[:100] for name in columns]
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "none") + more


def _candidates(rule: Rule) -> list[Format]:
    return list(FORMATS.values()) if rule.format == "auto" else [FORMATS[rule.format]]


@lru_cache(maxsize=4096)
def _reading(rule: Rule, format: str, names: Names) -> Reading | None:
    """How rows with these columns are read in a source whose first rows have this format.

    Its own format comes first, then any that gives the same shape. Only rows that ask may become
    more than the first ones are, since there an answer beside the prompt is a reference.
    """
    first = FORMATS[format]
    candidates = _candidates(rule)
    if first.shape is Prompt:
        return _best([it for it in candidates if it.shape in rule.shapes], rule, names)
    same = [it for it in candidates if it.shape is first.shape and it is not first]
    return _best([first, *same], rule, names)


def _best(candidates: Iterable[Format], rule: Rule, names: Names) -> Reading | None:
    """The first format that fits."""
    mapping = rule.renaming
    renamings = [mapping] if mapping else [{}, *_synonyms(names)]
    for format in candidates:
        columns = _columns_read(format, names, renamings)
        if columns:
            others = {it: mapping.get(it, it) for it in names if it not in columns}
            return Reading(format, columns, others)
    return None


def _synonyms(columns: Names) -> Iterable[Renaming]:
    """Every format's synonyms that rows with these columns may mean.

    A name means the same whatever the format: pairs with a `question` serve as prompts, too.
    """
    for format in FORMATS.values():
        for names in format.synonyms:
            if names.keys() <= set(columns):
                yield names


def _columns_read(format: Format, columns: Names, renamings: list[Renaming]) -> Renaming | None:
    """{your column: the format's} under the renaming that reads most columns, or None."""
    readings = []
    for names in renamings:
        yours = {names.get(column, column): column for column in columns}
        collide = len(yours) < len(columns)
        if not collide and yours.keys() >= set(format.required):
            known = (*format.required, *format.optional)
            readings.append({yours[name]: name for name in known if name in yours})
    return max(readings, key=len, default=None)
