"""A local source -> the files that it means, and what is to be said of the others.

A folder or a glob may hold files of several splits, of other kinds, links, and data sets that
`datasets` has saved. What lies there and is not read is named, but for documents, code and images
that lie beside data. Hidden folders are not looked into.
"""

from __future__ import annotations

import codecs
import errno
import glob
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from llmpipe.data import cards
from llmpipe.data.readers import KNOWN, READERS, File
from llmpipe.data.readers.compressed import DAMAGED, is_compressed, open_bytes, suffix_of
from llmpipe.data.readers.row import state_of
from llmpipe.data.splits import Division, Split, listed, named, split_of
from llmpipe.errors import DATA, UserError, near
from llmpipe.faults import misread
from llmpipe.files.paths import expanded
from llmpipe.files.tables import sha256_file
from llmpipe.recipe.sections import Rows, Source

# What lies beside data and is none: by suffix, and by the beginning of a name.
BESIDE = frozenset(
    ".md .rst .html .css .svg .py .ipynb .sh .toml .cfg .ini .yaml .yml .lock .bib .sha256 .md5"
    " .crc .png .jpg .jpeg .gif .webp .ico .log".split()
)
ARTIFACT = ("manifest.json", "recipe.yaml")  # what every finished one has
DOCUMENTS = ("readme", "license", "licence", "notice", "changelog", "citation", "copying")
PLAIN = (*DOCUMENTS, "makefile", "dockerfile", "_success")
OTHERS = {"config.json", "requirements.txt", "robots.txt"}
# of a model and its tokenizer
OF_MODELS = {
    *("generation_config.json", "adapter_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "model.safetensors.index.json"),
}
ARCHIVES = {".zip", ".tar", ".tgz", ".7z", ".rar"}
LFS = b"version https://git-lfs"
HUB_CACHE = {"blobs", "refs", "snapshots"}


class Named(NamedTuple):
    """A file of a source, not read yet."""

    path: Path
    name: str
    """Within the source."""
    shown: str
    """What a user calls it."""


class Selection(NamedTuple):
    """The files of a source, in order."""

    files: list[Named]
    notes: list[str]
    """What is to be said of files that are not read."""


def files_of(source: Rows) -> list[File]:
    """The files of a local source in a fixed order, with their hashes.

    Raises UserError naming what is missing.
    """
    return [hashed(file) for file in named_files(source)]


def named_files(source: Rows) -> list[Named]:
    """The files of a local source in a fixed order, none of them read but for its beginning.

    Raises UserError naming what is missing, empty or of no known kind.
    """
    return select(source).files


def select(source: Rows) -> Selection:
    """The files that a local source means. Raises UserError, as `named_files` does."""
    path = expanded(source.path)
    if os.path.isfile(path):
        notes = _of_no_use(source, path.name) + _named_to_train_on(source, split_of(path.name))
        selection = Selection([Named(path, path.name, source.path)], notes)
    else:
        _refuse_artifact(source.path, path)
        selection = _selected(source, _tree(source.path, path))
    for file in selection.files:
        _check(file)
    return selection


def _refuse_artifact(given: str, path: Path) -> None:
    """Raises UserError for what a stage has made: its files are no rows of one kind."""
    if all(os.path.isfile(path / name) for name in ARTIFACT):
        rows = path / "rows.jsonl"
        hint = "name a file in it; one that `sample` has made has rows.jsonl"
        if rows.is_file():
            hint = f"its rows are {given.rstrip('/')}/rows.jsonl; in its run, artifact:{path.name}"
        raise UserError(f"{given}: is an artifact, not a folder of rows", hint)


def hashed(file: Named) -> File:
    path, name, shown = file
    try:
        state = state_of(path)
        return File(name, shown, path, path.stat().st_size, sha256_file(path), state)
    except OSError as error:
        raise misread(error, shown, code=DATA) from None


def unread(file: Named) -> File:
    """A file without its hash, for who only looks at its first rows."""
    return File(file.name, file.shown, file.path, file.path.stat().st_size, "")


# --- what lies there ---


@dataclass
class Tree:
    """Files below a folder that may hold rows, by their names within it."""

    root: Path
    shown: str
    """What a user calls the source."""
    is_glob: bool = False
    files: dict[str, Path] = field(default_factory=dict)
    aside: list[str] = field(default_factory=list)
    """Others, with the reason where it is not their suffix."""
    splits: dict[str, Split] = field(default_factory=dict)
    """Of the files of which a record says it."""
    _folders: dict[tuple[int, int], str] = field(default_factory=dict)

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def walk(self, folder: Path, split: Split | None = None) -> None:
        """Add what lies in a folder and below. Raises UserError where that cannot be known."""
        self._folders[_id(folder)] = self.name(folder)
        entries, hidden = _entries(folder)
        self.aside += [f"{self.name(path)} (hidden)" for path in hidden]
        _refuse_hub_cache(folder, entries)
        saved = cards.saved_of(folder)
        for entry in entries:
            if entry.is_dir():
                self._enter(entry, saved.splits.get(entry.name, split))
            elif saved.files and entry.suffix == ".arrow":
                self._add_table(entry, saved, split)
            elif not saved.files or entry.name != cards.SAVED:
                self.add(entry)

    def _enter(self, folder: Path, split: Split | None) -> None:
        name = self.name(folder)
        known = self._folders.get(_id(folder))
        if known is not None:
            self.aside.append(f"{name}/ (the same folder as {known}/)")
        elif folder.is_symlink() and self.root.resolve().is_relative_to(folder.resolve()):
            self.aside.append(f"{name}/ (a link to a folder that holds this one)")
        else:
            self.walk(folder, split)

    def _add_table(self, path: Path, saved: cards.Saved, split: Split | None) -> None:
        """A file in the folder of a data set that was saved."""
        name = self.name(path)
        if path.name not in saved.files:
            self.aside.append(f"{name} (not of the data set that was saved)")
            return
        self.files[name] = path
        if known := split or saved.split:
            self.splits[name] = known

    def add(self, path: Path) -> None:
        """A file that may hold rows, or lies beside them."""
        name = self.name(path)
        suffix = suffix_of(path.name)
        if not path.exists():
            if suffix in READERS:
                problem = f"{path}: is a link to {os.readlink(path)}, which is not there"
                raise UserError(problem, "bring the file back, or remove the link")
            self.aside.append(f"{name} (a link to what is not there)")
        elif not path.is_file():
            self.aside.append(f"{name} (no file)")
        elif suffix in READERS and path.name.startswith("cache-") and suffix == ".arrow":
            self.aside.append(f"{name} (what datasets computed from others)")
        elif suffix in READERS and not _is_document(path.name):
            self.files[name] = path
        elif path.name not in cards.RECORDS and not _is_beside(path.name, suffix):
            self.aside.append(name)

    def settle(self) -> None:
        """Put the files in order, and each of them once."""
        links_last = sorted(self.files.items(), key=lambda item: (item[1].is_symlink(), item[1]))
        once: dict[tuple[int, int], str] = {}
        for name, path in links_last:
            first = once.setdefault(_id(path), name)
            if first != name:
                self.aside.append(f"{name} (the same file as {first})")
        self.files = {name: self.files[name] for name in once.values()}
        for name, path in list(self.files.items()):
            plain = name.removesuffix(path.suffix)
            if is_compressed(path) and plain in self.files and _equal(path, self.files[plain]):
                self.aside.append(f"{name} (the same rows as {plain})")
                del self.files[name]
        self.files = dict(sorted(self.files.items(), key=lambda item: item[1]))


def _id(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """What a folder holds, links behind what lies there itself; and hidden files that hold rows."""
    try:
        paths = [folder / name for name in sorted(os.listdir(folder))]
    except OSError as error:
        raise misread(error, folder, code=DATA) from None
    entries = [path for path in paths if not path.name.startswith(".")]
    hidden = [
        path
        for path in paths
        # what begins with ._ is a note of macOS on another file
        if path.name.startswith(".") and not path.name.startswith("._")
        if suffix_of(path.name) in READERS
    ]
    return sorted(entries, key=Path.is_symlink), hidden


def _is_document(name: str) -> bool:
    """Whether a file of a known suffix is none of rows."""
    name = name.lower()
    return name in cards.RECORDS | OTHERS | OF_MODELS or name.split(".")[0] in DOCUMENTS


def _is_beside(name: str, suffix: str) -> bool:
    name = name.lower()
    return suffix in BESIDE or (not suffix and name.startswith(PLAIN))


def _refuse_hub_cache(folder: Path, entries: list[Path]) -> None:
    if {entry.name for entry in entries} >= HUB_CACHE:
        versions = sorted((folder / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
        problem = f"{folder}: is a folder of the Hub's cache, which may hold several versions"
        hint = f"name one of them: {versions[-1]}" if versions else "it holds none"
        raise UserError(problem, hint)


def _equal(compressed: Path, plain: Path) -> bool:
    """Whether a compressed file holds the bytes of another one."""
    try:
        digest = hashlib.sha256()
        with open_bytes(compressed) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest() == sha256_file(plain)
    except DAMAGED:  # reading says so
        return False


def _tree(given: str, path: Path) -> Tree:
    """What lies below a folder, or matches a glob."""
    try:
        if not os.path.isdir(path):
            return _matched(given, path)
        tree = Tree(path, given)
        tree.walk(path)
    except (RecursionError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise
        problem = f"{given}: folders lie too deep in one another"
        raise UserError(problem, "name the one that the files are in", DATA) from None
    return tree


def _matched(given: str, path: Path) -> Tree:
    """What a glob matches. Raises UserError where that is nothing."""
    matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
    files = [match for match in matches if not match.is_dir()]
    if not files:
        raise _missing(given, path)
    tree = Tree(Path(os.path.commonpath([file.parent for file in files])), given, is_glob=True)
    for file in files:
        tree.add(file)
    if "**" not in given:
        tree.aside += [f"{match}/ (a folder)" for match in matches if match.is_dir()]
    return tree


def _missing(given: str, path: Path) -> UserError:
    guess = f"; there is no folder {path.parent}"
    if os.path.isdir(path.parent):
        guess = near(path.name, os.listdir(path.parent))
    return UserError(f"{given}: no such file{guess}", "paths are looked up from the current folder")


# --- what is read of it ---


def _selected(source: Rows, tree: Tree) -> Selection:
    """The files of a tree that are of the splits which the source means."""
    tree.settle()
    config = cards.config_of(tree.root, source.subset, tree.shown, tree.is_glob)
    above = _of_card_above(tree)
    splits = {
        name: tree.splits.get(name) or above.get(name) or split_of(name) for name in tree.files
    }
    if config:
        said = config.splits(tree.files)
        tree.aside += [f"{name} (not in {cards.CARD})" for name in splits if name not in said]
        splits = said
    if not splits and config:
        _refuse_absent(tree, config, set())
    if not splits:
        lies = f"; there is {listed(tree.aside)}" if tree.aside else ""
        problem = f"{tree.shown}: no data files {'match' if tree.is_glob else 'in this folder'}"
        raise UserError(f"{problem}{lies}", f"looked for {KNOWN}")
    certain = set(tree.splits) >= set(splits) or (config is not None and bool(config.patterns))
    division = Division(source, splits, certain)
    whole = tree.is_glob and source.split is None and len(division.splits) == 1
    chosen = set(division.splits) if whole else division.chosen()
    if config:
        _refuse_absent(tree, config, chosen)
    files = [
        Named(path, name, str(path))
        for name, path in tree.files.items()
        if splits.get(name) in chosen
    ]
    notes = _notes(division.note(chosen), tree.aside)
    if whole:
        notes += _named_to_train_on(source, division.splits[0])
    return Selection(files, notes)


def _of_card_above(tree: Tree) -> dict[str, Split]:
    """What the card of the folder above says, where its `data` is the source."""
    folder = tree.root.resolve()
    config = cards.config_of(folder.parent, None, tree.shown, is_glob=True)
    if not config:
        return {}
    prefix = f"{folder.name}/"
    said = config.splits([prefix + name for name in tree.files])
    return {name.removeprefix(prefix): split for name, split in said.items()}


def _refuse_absent(tree: Tree, config: cards.Config, splits: set[Split]) -> None:
    if pattern := config.absent(splits, tree.files):
        problem = f"{tree.shown}: {cards.CARD} names '{pattern}', and no such file is there"
        raise UserError(problem, "complete the folder, or the card")


def _notes(of_splits: str | None, aside: list[str]) -> list[str]:
    notes = [of_splits] if of_splits else []
    return [*notes, f"not read: {listed(aside)}"] if aside else notes


def _named_to_train_on(source: Rows, split: Split) -> list[str]:
    """What is to be said where a recipe names files of a test split by themselves."""
    if not isinstance(source, Source) or source.split or split.kind in (None, "train"):
        return []
    return [f"is of split {split.name} by its name, and trained on since the recipe names it"]


def _of_no_use(source: Rows, name: str) -> list[str]:
    """What is to be said of fields that mean nothing where one file is named.

    Raises UserError where its name says that it is of another split.
    """
    fields = [field for field in ("split", "subset") if getattr(source, field) is not None]
    if source.split is not None:
        asked, says = named(source.split), split_of(name)
        if asked.kind != "train" and says.kind and asked.kind != says.kind:
            problem = f"{source.path}: is of split {says.name} by its name, not {source.split}"
            raise UserError(problem, "leave split out to read the file as it is")
        if says.kind or asked.kind == "train":
            fields.remove("split")
    return [f"{field} is of no use: a file is read whole" for field in fields]


def _check(file: Named) -> None:
    """Raises UserError for a file that cannot be read as rows, by its suffix or its beginning."""
    path, _, shown = file
    try:
        shown.encode()
    except UnicodeEncodeError:  # no record could name it
        raise UserError(f"{shown!r}: its name is not UTF-8 text", "rename the file") from None
    suffix = suffix_of(path.name)
    if suffix not in READERS:
        hint = f"known are {KNOWN}"
        if set(path.suffixes) & ARCHIVES:
            hint = "unpack it, and name the folder"
        raise UserError(f"{shown}: {suffix or 'no suffix'} is not a known kind of file", hint)
    try:
        with open_bytes(path) as stream:
            beginning = stream.read(len(LFS))
    except DAMAGED as error:
        raise misread(error, shown, code=DATA) from None
    if not beginning:
        raise UserError(f"{shown}: the file is empty")
    if beginning == LFS:
        raise UserError(f"{shown}: is a pointer of Git LFS, not the data", "git lfs pull")
    if beginning[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{shown}: is UTF-16", "save it as UTF-8")
