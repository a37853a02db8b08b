"""Which split a file is of, and which splits of a folder a source reads.

A name says it as the Hub's names do: `train-00000-of-00001.parquet`, `test.jsonl`,
`data/validation/rows.csv`, a keyword that stands between others than letters. What a folder says
beside its files (see `cards`) goes before its names. Where one part of a path says train and
another one does not, the file is not of train.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from llmpipe.errors import UserError
from llmpipe.recipe.sections import Rows, Source

Kind = Literal["train", "validation", "test"]

WORDS: dict[str, Kind] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "holdout": "test",
    "heldout": "test",
    "held-out": "test",
    "held_out": "test",
}
SHOWN = 5  # names in a message

_WORD = re.compile(
    rf"(?<![^\W\d_])({'|'.join(sorted(WORDS, key=len, reverse=True))})"
    r"(?:sets?|data|splits?|s)?(?![^\W\d_])"
)
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\b")


@dataclass(frozen=True)
class Split:
    """What is known of a file's split."""

    name: str | None = None
    """As the folder calls it; None where nothing says it."""
    kind: Kind | None = None
    """What it is for; None where its name tells nothing."""

    @property
    def shown(self) -> str:
        return self.name or "no split"


def named(name: str) -> Split:
    """The split that is called so."""
    word = _telling(_words(name))
    return Split(name, WORDS[word] if word else None)


def split_of(path: str) -> Split:
    """What a file's name says, relative to its source, with slashes."""
    *folders, file = path.split("/")
    shard = _SHARD.match(file)
    stem = shard[1] if shard else file.split(".")[0]
    word = _telling([word for part in (*folders, stem) for word in _words(part)])
    kind = WORDS[word] if word else None
    if shard and named(stem).kind == kind:
        return Split(stem, kind)
    return Split(word, kind)


def _words(name: str) -> list[str]:
    return _WORD.findall(_HUMP.sub("-", name).lower())


def _telling(words: list[str]) -> str | None:
    """The last of the keywords, those for train behind all others."""
    others = [word for word in words if WORDS[word] != "train"]
    return (others or words)[-1] if words else None


# --- which are read ---


@dataclass(frozen=True)
class Division:
    """The files of a source by their splits."""

    source: Rows
    of: dict[str, Split]
    """The split of each file, by its name within the source."""
    certain: bool = False
    """Whether the folder itself says so, not only the names of its files."""

    @property
    def splits(self) -> list[Split]:
        kinds = (*typing.get_args(Kind), None)
        return sorted(dict.fromkeys(self.of.values()), key=lambda split: kinds.index(split.kind))

    def chosen(self) -> set[Split]:
        """The splits to read. Raises UserError where the recipe has to say which."""
        if self.source.split is not None:
            return self._asked(self.source.split)
        if isinstance(self.source, Source):
            return self._to_train_on()
        return self._to_evaluate_on()

    def note(self, chosen: set[Split]) -> str | None:
        """What is to be said of the rest."""
        left = [name for name, split in self.of.items() if split not in chosen]
        if not left or self.source.split is not None:
            return None
        read = [name for name, split in self.of.items() if split in chosen]
        others = {split.name for split in self.splits if split not in chosen and split.name}
        note = f"trains on {listed(read)}; not read, as of other splits: {listed(left)}"
        if others:
            example = f"{{path: {self.source.path}, split: {min(others)}}}"
            note += f" (data.eval.sources takes them, as {example})"
        return note

    def _asked(self, name: str) -> set[Split]:
        same = {split for split in self.splits if _equal(split.name, name)}
        if not same:
            same = self._alike(name)
        if not same:
            raise UserError(f"{self.source.path}: has no split '{name}'; {self._in_words()}")
        return same

    def _alike(self, name: str) -> set[Split]:
        """The splits of the kind that a bare keyword is of."""
        if name.lower() not in WORDS:
            return set()
        kind = WORDS[name.lower()]
        alike = {split for split in self.splits if split.kind == kind}
        if not alike and kind == "train" and not self.certain:
            return {split for split in self.splits if split.kind is None}
        self._refuse_several(alike)
        return alike

    def _to_train_on(self) -> set[Split]:
        exact = {split for split in self.splits if _equal(split.name, "train")}
        train = {split for split in self.splits if split.kind == "train"}
        rest = {split for split in self.splits if split.kind is None}
        if not train and not rest:
            problem = f"no file to train on: {self._in_words()}"
            hint = "name the files themselves, or set split, if they are to be trained on"
            raise UserError(f"{self.source.path}: {problem}", hint)
        if len(train) + len(rest) == len(self.splits) and not self.certain:
            self._refuse_several(exact or train)
            return train | rest
        if train and Split() in rest:
            hint = "split: train reads what is named so; or name the files themselves"
            raise UserError(
                f"{self.source.path}: not all files name a split: {self._in_words()}", hint
            )
        if self.certain and not train:
            self._refuse_several(rest)
        else:
            self._refuse_several(exact or train)
        return exact or train or rest

    def _to_evaluate_on(self) -> set[Split]:
        kinds = {split.kind or "train" for split in self.splits}
        if len(kinds) > 1 or (self.certain and len(self.splits) > 1):
            raise self._which()
        self._refuse_several(set(self.splits))
        return set(self.splits)

    def _refuse_several(self, splits: set[Split]) -> None:
        """Names that are no bare keywords, such as train_sft and train_gen, are several sets."""
        names = {split.name for split in splits if split.name and (split.kind or self.certain)}
        if len(names) > 1 and not names <= WORDS.keys():
            raise self._which()

    def _which(self) -> UserError:
        names = [split.name for split in self.splits if split.name]
        example = next((name for name in names if named(name).kind == "test"), names[0])
        hint = f"say which one it is, such as split: {example}"
        return UserError(f"{self.source.path}: holds several splits: {self._in_words()}", hint)

    def _in_words(self) -> str:
        """Every split with its files."""
        parts = []
        for split in self.splits:
            files = [name for name, of in self.of.items() if of == split]
            parts.append(f"{split.shown} ({listed(files)})")
        return ", ".join(parts)


def listed(names: Iterable[Any]) -> str:
    """The first names, and how many more there are."""
    every = [str(name) for name in names]
    more = f" and {len(every) - SHOWN:,} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


def _equal(name: str | None, other: str) -> bool:
    return name is not None and name.lower() == other.lower()
