"""What a folder says of its files: a data set's card, and what `datasets.save_to_disk` notes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmpipe.data.splits import Split, named, split_of
from llmpipe.errors import DATA, UserError, first_line, near
from llmpipe.faults import misread

CARD = "README.md"
SAVED = "state.json"  # beside the files of a data set that was saved to disk
SAVED_SPLITS = "dataset_dict.json"  # beside the folders of several
RECORDS = {SAVED_SPLITS, "dataset_info.json", "dataset_infos.json"}
"""Files that say something of others, and hold no rows."""

NOTED = ("_split", "_indices_data_files", "_indices_files")

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


# --- cards ---


@dataclass(frozen=True)
class Config:
    """A configuration of a card."""

    name: str
    patterns: dict[str, list[str]] | None
    """Of paths, by the name of their split; None where names of files say it."""
    folder: str = ""
    """What the paths are below of."""
    first: bool = False
    """Whether it is the one that is meant where none is named."""

    def splits(self, files: Iterable[str]) -> dict[str, Split]:
        """The split of each file that belongs to it, by its name within the folder.

        A file that several splits name is not of train.
        """
        inside = [file for file in files if file.startswith(self.folder)]
        if self.patterns is None:
            return {file: split_of(file.removeprefix(self.folder)) for file in inside}
        of: dict[str, Split] = {}
        for name, patterns in self.patterns.items():
            split = named(name)
            for file in inside:
                if any(_matches(file, self.folder + pattern) for pattern in patterns):
                    of[file] = split if file not in of or of[file].kind == "train" else of[file]
        return of

    def absent(self, splits: set[Split], files: Iterable[str]) -> str | None:
        """A pattern of one of the splits, or of any where there is none, that names no file."""
        names = {split.name for split in splits}
        every = list(files)
        for name, patterns in (self.patterns or {}).items():
            for pattern in patterns if name in names or not names else ():
                if not any(_matches(file, self.folder + pattern) for file in every):
                    return pattern
        return None


def config_of(folder: Path, subset: str | None, shown: str, is_glob: bool) -> Config | None:
    """The configuration of a folder's card that is meant; None where the card says nothing.

    Raises UserError where `subset` is none of them, or has to be given: for a glob it has not.
    """
    configs = {config.name: config for config in _configs(folder / CARD, shown)}
    if subset is not None:
        if subset not in configs:
            known = f"known are {', '.join(configs)}" if configs else f"it has no {CARD} with any"
            raise UserError(f"{shown}: has no subset '{subset}'{near(subset, configs)}", known)
        return configs[subset]
    meant = next((config for config in configs.values() if config.first), configs.get("default"))
    if meant is None and len(configs) > 1:
        if is_glob:
            return None
        problem = f"{shown}: its {CARD} names the subsets {', '.join(configs)}"
        raise UserError(problem, f"say which one it is, such as subset: {next(iter(configs))}")
    return meant or next(iter(configs.values()), None)


def _configs(card: Path, shown: str) -> list[Config]:
    try:
        text = card.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    front = _FRONT.match(text)
    if not front or not re.search("data_files|data_dir", front[1]):
        return []
    import yaml

    try:
        entries = yaml.safe_load(front[1]).get("configs") or []
        return [_config(entry) for entry in entries if {"data_files", "data_dir"} & entry.keys()]
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, re.error) as error:
        problem = f"{shown}/{CARD}: which files are of which split cannot be read from it"
        raise UserError(f"{problem}: {first_line(error)}", "mend it, or name the files") from None


def _config(entry: dict[str, Any]) -> Config:
    name = str(entry.get("config_name", "default"))
    folder = str(entry.get("data_dir") or "").removeprefix("./").strip("/")
    files = entry.get("data_files")
    return Config(
        name,
        None if files is None else _patterns(files),
        f"{folder}/" if folder and folder != "." else "",
        first=bool(entry.get("default")),
    )


def _patterns(files: Any) -> dict[str, list[str]]:
    """`data_files` in any of its forms, by split."""
    if isinstance(files, dict):
        return {str(name): _list(paths) for name, paths in files.items()}
    if isinstance(files, list) and any(isinstance(item, dict) for item in files):
        return {str(item["split"]): _list(item["path"]) for item in files}
    return {"train": _list(files)}


def _list(paths: Any) -> list[str]:
    several = paths if isinstance(paths, list) else [paths]
    patterns = [str(path).removeprefix("./") for path in several]
    for pattern in patterns:
        _matches("", pattern)  # raises re.error for what is none
    return patterns


def _matches(file: str, pattern: str) -> bool:
    """Whether a file's path is one of a pattern's, in which ** stands for any folders."""
    regex = ""
    for part in re.findall(r"\*\*/|\*+|\?|\[[^]]*\]|[^*?[]+|\[", pattern):
        if part == "**/":
            regex += "(?:.*/)?"
        elif part[0] == "*":
            regex += ".*" if len(part) > 1 else "[^/]*"
        elif part == "?":
            regex += "[^/]"
        elif part[0] == "[" and len(part) > 1:
            regex += part.replace("[!", "[^")
        else:
            regex += re.escape(part)
    return re.fullmatch(regex, file) is not None or file.startswith(f"{pattern.rstrip('/')}/")


# --- data sets that were saved ---


@dataclass(frozen=True)
class Saved:
    """What `datasets.save_to_disk` noted in a folder; nothing in another folder."""

    files: tuple[str, ...] = ()
    """Of one data set."""
    split: Split | None = None
    """Of that, where it is noted."""
    splits: dict[str, Split] = field(default_factory=dict)
    """Of sub-folders, each a data set."""


def saved_of(folder: Path) -> Saved:
    """What was noted in a folder.

    Raises UserError where that cannot be read, names what is not there, or says that rows were
    chosen beside the files.
    """
    if (folder / SAVED_SPLITS).is_file():
        names = _noted(folder / SAVED_SPLITS, lambda record: record["splits"])
        return Saved(splits={name: named(name) for name in _present(folder, SAVED_SPLITS, names)})
    if not (folder / SAVED).is_file() or not (folder / "dataset_info.json").is_file():
        return Saved()
    names = _noted(folder / SAVED, lambda state: [one["filename"] for one in state["_data_files"]])
    split, *indices = _noted(folder / SAVED, lambda state: [state.get(key) for key in NOTED])
    if any(indices):
        problem = f"{folder}: rows of this data set were chosen by indices beside its files"
        hint = "load it with datasets, and save it again after flatten_indices()"
        raise UserError(problem, hint)
    files = tuple(_present(folder, SAVED, names))
    return Saved(files, named(split) if split else None)


def _noted(path: Path, field: Callable[[Any], list[Any]]) -> list[Any]:
    try:
        return list(field(json.loads(path.read_bytes())))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        hint = "it belongs to a data set that was saved to disk"
        raise misread(error, path, hint=hint, code=DATA) from None


def _present(folder: Path, record: str, names: list[str]) -> list[str]:
    for name in names:
        if not (folder / name).exists():
            problem = f"{folder / name}: is not there, though {record} names it"
            raise UserError(problem, "the data set that was saved here is not whole")
    return names
