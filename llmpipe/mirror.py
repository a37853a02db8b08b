"""Machines that have a run directory each: rank 0's is the truth, and the others mirror it.

    runs/alpaca           on the machine of rank 0: the run, as it is with one machine
    runs/.alpaca.mirror   on every other one: what its processes read of that, and their own files
                          of a checkpoint; no artifact of this machine, and nobody lists it as one

One process of each of these machines keeps its mirror. What it is to have is told with a table of
sizes and sha256; what it lacks, or has otherwise, is sent, through the launch's store, which is
there before a group of processes and beside it, and has no timeout of a collective. A file is
written beside its place, hashed, flushed and renamed, and the file that vouches for a folder, its
own table, comes last: so what a kill leaves is found wanting by the next start, and sent.

What the other machines write of a checkpoint goes to rank 0 the same way, before that publishes it:
a checkpoint is whole in one place, and a machine that is lost takes nothing along.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import Store

from llmpipe import screen
from llmpipe.errors import INTEGRITY, RESOURCES, UserError
from llmpipe.faults import writing
from llmpipe.files.json import read_written
from llmpipe.files.paths import not_plain, paths_below
from llmpipe.files.tables import (
    FileEntry,
    Table,
    check_names,
    difference,
    in_bytes,
    sha256_file,
    table,
    table_of,
)
from llmpipe.files.writing import fsync, remove, to_write
from llmpipe.peers import PAUSE, Peers, missing_rank_0
from llmpipe.run.artifact import MANIFEST, Artifact
from llmpipe.run.machine import rank
from llmpipe.sums import SUMS, fingerprint

CHUNK = 4 << 20
"""Bytes that are sent at once; a store takes 8 MiB."""
WINDOW = 8
"""Chunks that are on their way at once: they lie in the store's memory."""
SHORTEST = 0.0005
"""Seconds between the first two looks at the store, which become more, up to PAUSE."""

MORE, END, FAILED = b"+", b".", b"!"
"""How a chunk begins: of which more follow, the end of a message, or why none comes."""


# --- one process sends, another one takes ---------------------------------------------------------


class Channel:
    """A way from one process to another through the launch's store: messages in order, in chunks,
    of which the sender is at most WINDOW ahead.
    """

    def __init__(self, peers: Peers, word: str, other: int, where: str = ""):
        """`word`: the way's, which both name alike; `other`: the rank at its other end, and `where`
        that is, as it is said of what is met there.
        """
        self.peers = peers
        self.store: Store = peers.store.clone()  # one that waits keeps no other waiting
        self.word = word
        self.other = other
        self.where = where
        self._chunks = 0
        self._taken = 0

    def send(self, message: Iterable[bytes]) -> None:
        """Send a message. Raises UserError as the other one met it, or (75) where that is gone."""
        for part in message:
            for begin in range(0, len(part), CHUNK):
                self._put(MORE + part[begin : begin + CHUNK])
        self._put(END)

    def finish(self) -> None:
        """Wait until all is taken. Raises as `send` does."""
        while self._taken < self._chunks:
            self._hear_of_oldest()

    def fail(self, error: UserError) -> None:
        """Say why nothing more comes."""
        self._put(FAILED + _told(error))

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Around what is to be sent: say what is met there, for which the other one waits."""
        try:
            yield
        except UserError as error:
            self.fail(error)
            raise

    def take(self) -> Iterator[bytes]:
        """The parts of the next message. Raises UserError as the sender met it, or (75) where that
        is gone.
        """
        while True:
            key = f"{self.word}/{self._chunks}"
            chunk = self._waited_for(key)
            self._chunks += 1
            with missing_rank_0():
                self.store.delete_key(key)
                self.store.set(f"{key}/taken", b"ok")
            kind, data = chunk[:1], chunk[1:]
            if kind == FAILED:
                raise self._as_told(data)
            if kind == END:
                return
            yield data

    def refuse(self, error: UserError) -> None:
        """Say to the sender why nothing more is taken."""
        with missing_rank_0():
            self.store.set(f"{self.word}/{self._chunks}/taken", FAILED + _told(error))

    def _put(self, chunk: bytes) -> None:
        if self._chunks - self._taken == WINDOW:
            self._hear_of_oldest()
        with missing_rank_0():
            self.store.set(f"{self.word}/{self._chunks}", chunk)
        self._chunks += 1

    def _hear_of_oldest(self) -> None:
        key = f"{self.word}/{self._taken}/taken"
        answer = self._waited_for(key)
        self._taken += 1
        with missing_rank_0():
            self.store.delete_key(key)
        if answer.startswith(FAILED):
            raise self._as_told(answer[len(FAILED) :])

    def _as_told(self, told: bytes) -> UserError:
        message, hint, code = json.loads(told)
        return UserError(f"{self.where}: {message}" if self.where else message, hint, code)

    def _waited_for(self, key: str) -> bytes:
        """What lies in the store under a key, as soon as something does."""
        pause = SHORTEST
        with missing_rank_0():
            while not self.store.check([key]):  # its `wait` prints a line wherever it took long
                if pause == PAUSE:
                    self.peers.refuse_gone(self.other, key)
                time.sleep(pause)
                pause = min(2 * pause, PAUSE)
            return bytes(self.store.get(key))


def _told(error: UserError) -> bytes:
    return json.dumps([error.message, error.hint, error.code]).encode()


# --- files that are to be the same in two places --------------------------------------------------


class Copy(NamedTuple):
    """A folder, as rank 0 has it."""

    folder: str
    """Its way from the run."""
    files: Table
    """The last one vouches for the others, where one does."""
    spares: Sequence[str] = ()
    """What else may lie in it, by the first name of the way there."""


def copy_of(folder: Path, run: Path) -> Copy:
    """What there is to say of a folder of rank 0's: by its table, where it has one, so that nothing
    is hashed; of a folder that is not there, that it has no files.
    """
    files = _by_its_table(folder)
    return Copy(_way(folder, run), table(folder) if files is None else files)


def _by_its_table(folder: Path) -> Table | None:
    for name in (MANIFEST, SUMS):
        document = read_written(folder / name)
        if isinstance(document, dict) and document.get("fingerprint") == fingerprint(document):
            return table_of(document["files"]) | {name: entry_of(folder / name)}
    return None


def entry_of(path: Path) -> FileEntry:
    return FileEntry(path.stat().st_size, sha256_file(path))


def _way(path: Path, run: Path) -> str:
    return os.path.relpath(path, run)


Name = tuple[int, str]
"""A file: of which copy, and its name there."""

Heed = Callable[[str], None]
"""What one that takes files does about what is told with them; it may raise UserError."""


def offer(
    way: Channel, back: Channel, run: Path, copies: Sequence[Copy], about: str = ""
) -> tuple[int, int]:
    """Tell what there is, and send what the other process asks for: (files, bytes). `about`: what
    else there is to say of it.
    """
    told = {"about": about, "copies": [each._asdict() for each in copies]}
    way.send([json.dumps(told, default=asdict).encode()])
    asked: list[Name] = [(at, name) for at, name in json.loads(b"".join(back.take()))]
    offered = {(at, name) for at, each in enumerate(copies) for name in each.files}
    for at, name in asked:
        if (at, name) not in offered:
            hint = "let all machines have the same version of llmpipe"
            fault = UserError(f"{name[:60]!r}: is asked for, and was not offered", hint, INTEGRITY)
            way.fail(fault)
            raise fault
    try:
        for at, name in asked:
            way.send(_content(run / copies[at].folder / name))
    except OSError as error:
        fault = UserError(f"{error.filename}: cannot be read: {error.strerror}", None, INTEGRITY)
        way.fail(fault)
        raise fault from error
    way.finish()
    return len(asked), sum(copies[at].files[name].size for at, name in asked)


def accept(
    way: Channel,
    back: Channel,
    run: Path,
    choose: Callable[[Path, Copy], list[str]],
    heed: Heed = lambda about: None,
) -> None:
    """Take what the other process offers, as far as `choose` asks for it.

    Raises UserError (5) where the disk takes no more, (3) where something else arrives than was
    told, and as `heed` does of what is told about it; the other process raises the same.
    """
    told = json.loads(b"".join(way.take()))
    copies = [_checked(each) for each in told["copies"]]
    try:
        with writing(run):
            heed(told["about"])
            asked = [(at, name) for at, each in enumerate(copies) for name in choose(run, each)]
            _refuse_no_room(run, sum(copies[at].files[name].size for at, name in asked))
            back.send([json.dumps(asked).encode()])
            for at, name in asked:
                copy = copies[at]
                _write(run / copy.folder / name, copy.files[name], way.take())
    except UserError as error:  # the other one waits for what is asked, or for room on the way
        back.fail(error)
        way.refuse(error)
        raise


def _checked(told: Mapping[str, Any]) -> Copy:
    """What another process says of a folder, which is to lie in the run."""
    copy = Copy(told["folder"], table_of(told["files"]), told["spares"])
    check_names({copy.folder: FileEntry(0, ""), **copy.files}, "what is sent")
    return copy


def _content(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            yield part


def lacking(run: Path, copy: Copy) -> list[str]:
    """What a mirror has not, or otherwise; what rank 0 has not is removed. Where a file is missing,
    so is the one that vouches for it, until all have come.
    """
    folder = run / copy.folder
    known = {name.partition("/")[0] for name in copy.files} | {*copy.spares}
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if path.name not in known:
            remove(path)  # a folder goes with its files: an empty one would count as a checkpoint
    for path in list(paths_below(folder, {*copy.spares})):
        name = path.relative_to(folder).as_posix()
        if name.partition("/")[0] not in copy.spares and (
            name not in copy.files or not_plain(path)
        ):
            remove(path)
    names = [name for name, entry in copy.files.items() if difference(folder / name, entry)]
    last = next(reversed(copy.files), None)
    if names and last is not None:
        remove(folder / last)
        names = [*(name for name in names if name != last), last]
    return names


def absent(run: Path, copy: Copy) -> list[str]:
    """What rank 0 has not of what another machine has written."""
    return [name for name in copy.files if not (run / copy.folder / name).exists()]


def _refuse_no_room(run: Path, size: int) -> None:
    disk = os.statvfs(next(path for path in (run, *run.absolute().parents) if path.is_dir()))
    free = disk.f_bavail * disk.f_frsize
    if free < size:
        problem = f"{run}: {in_bytes(free)} are free, and {in_bytes(size)} are to come"
        raise UserError(problem, "make room there", RESOURCES)


def _write(path: Path, entry: FileEntry, parts: Iterator[bytes]) -> None:
    """Write a file that arrives in parts: a reader sees none of it, or all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.arriving")
    size, seen = 0, sha256()
    remove(temporary)
    try:
        with to_write(temporary, "wb") as file:
            for part in parts:
                file.write(part)
                seen.update(part)
                size += len(part)
            file.flush()
            os.fsync(file.fileno())
        if FileEntry(size, seen.hexdigest()) != entry:
            problem = f"{path}: what arrived is not what was told of it"
            hint = "`llmpipe verify` says whether it lies whole on the machine of rank 0"
            raise UserError(problem, hint, INTEGRITY)
        if path.is_dir():
            remove(path)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


# --- the mirrors of a launch ----------------------------------------------------------------------


@dataclass
class Mirrors:
    """Those of the machines that do not see rank 0's run, while an artifact is made."""

    peers: Peers
    word: str
    """Of what the processes do, and of nothing else."""
    run: Path
    """The run as this process has it: rank 0's, or its mirror."""
    machines: Mapping[int, str]
    """The rank that keeps each mirror, and which machine it is on."""
    keeper: int | None = None
    """The one that keeps the mirror of this process; None where it sees rank 0's run."""
    _turns: int = 0

    @property
    def keeps(self) -> bool:
        """Whether this process keeps its machine's mirror."""
        return rank() == self.keeper

    def way(self, path: Path) -> str:
        """How a path of the run is told to other processes."""
        return _way(path, self.run)

    def bring(
        self,
        copies: Callable[[], Sequence[Copy]],
        about: str = "",
        heed: Heed = lambda about: None,
    ) -> tuple[int, int]:
        """Let every mirror have these folders as rank 0 has them, which alone is asked for them,
        and what there is to say about them: (files, bytes) that it sent. Every process calls it;
        only rank 0 and the keepers wait, and these `heed` what is said.

        Raises UserError as `accept` does, in both.
        """
        self._turns += 1
        sent: list[tuple[int, int]] = []
        if rank() == 0:
            once = cache(copies)

            def send(there: Channel, back: Channel) -> None:
                with there.failing():
                    told = once()
                sent.append(offer(there, back, self.run, told, about))

            self._serve("sending what the run holds to", send)
        elif self.keeps:
            accept(*self._ways(rank()), self.run, lacking, heed)
        return sum(files for files, _ in sent), sum(size for _, size in sent)

    def collect(self, folder: Path, hashed: Mapping[str, FileEntry]) -> None:
        """Let rank 0 have what other machines have written in a folder, where it has no such file.
        Every process calls it. `hashed`: what the writers have hashed.

        Raises UserError as `accept` does, in both.
        """
        self._turns += 1
        if rank() == 0:
            self._serve(
                "taking what was written by",
                lambda there, back: accept(back, there, self.run, absent),
            )
        elif self.keeps:
            there, back = self._ways(rank())
            here = {name: entry for name, entry in hashed.items() if (folder / name).exists()}
            with back.failing():
                written = Copy(self.way(folder), table(folder, known=here))
            offer(back, there, self.run, [written])

    def keep(self, folder: Path, target: Path) -> None:
        """Give what this machine has written its name, once rank 0 has published it, in the place
        of all that has one there."""
        if not self.keeps or not folder.is_dir():
            return
        with writing(target):
            for path in list(target.parent.iterdir()):
                if not folder.is_relative_to(path):
                    remove(path)
            folder.rename(target)

    def clear(self, folder: Path) -> None:
        """Let a folder of this machine's mirror be there, and empty."""
        if self.keeps:
            with writing(folder):
                remove(folder)
                folder.mkdir(parents=True)

    def forget(self, artifact: Artifact) -> None:
        """Remove what this machine mirrors of an artifact that is published."""
        if self.keeps:
            remove(artifact.path)

    def _serve(self, doing: str, serve: Callable[[Channel, Channel], None]) -> None:
        """Let rank 0 serve one keeper after the other, each by its two ways. All of them wait for
        their turn: once one has failed, the others are told why theirs does not come.
        """
        failed: UserError | None = None
        for keeper, machine in self.machines.items():
            there, back = self._ways(keeper)
            if failed:
                there.fail(failed)
                continue
            try:
                with screen.doing(f"{doing} machine {machine}"):
                    serve(there, back)
            except UserError as error:
                failed = error
        if failed:
            raise failed

    def _ways(self, keeper: int) -> tuple[Channel, Channel]:
        """From rank 0 to a keeper, and back."""
        other, where = (0, "") if rank() else (keeper, f"machine {self.machines[keeper]}")
        word = f"{self.word}/{self._turns}/{keeper}"
        there, back = (Channel(self.peers, f"{word}/{way}", other, where) for way in (0, 1))
        return there, back


_mirrors: Mirrors | None = None


def use(mirrors: Mirrors | None) -> None:
    """Let these be the mirrors of what is made from now on."""
    global _mirrors
    _mirrors = mirrors


def mirrors() -> Mirrors | None:
    """Those of what is being made; None where all processes see one run."""
    return _mirrors
