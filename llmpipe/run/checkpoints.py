"""Durable checkpoints as plain functions: write, pick, verify, rotate. Shared by every trainer.

A checkpoint is `checkpoints/step-N`, published whole (`publishing`) with `sums.json`: the step, the
identity of the recipe, the machine's settings, its device and libraries, and the sha256 of every
file. The newest one that verifies wins; a damaged one is passed over and named.

Other settings refuse to go on, since they can be set back. Another card or another version of a
library goes on, for a job that was moved has no choice; the result is then called inexact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

from llmpipe.errors import INTEGRITY, Say, UserError
from llmpipe.files.json import read_written, write_json
from llmpipe.files.paths import not_plain
from llmpipe.files.tables import FileEntry, Seen, Table, check_names, differences, table
from llmpipe.files.writing import publishing, remove
from llmpipe.run.artifact import steps_of
from llmpipe.run.manifest import Leg, Platform
from llmpipe.sums import SUMS, fingerprint
from llmpipe.typed import record

T = TypeVar("T")

STATE = "llmpipe.json"
"""What the trainer underneath does not keep."""

SHARDED = "sharded"
"""The folder with the parts of a model, and of its optimizer, that processes share: one file each,
of safetensors, by `torch.distributed.checkpoint`."""

UNREAD = ("training_args.bin", "README.md")
"""Pickled arguments hold tokens in clear; the card is made for the model. Nothing reads either."""


UNSAID = {
    "activation_checkpointing": "none",
    "sharded": False,
    "copies": 1,
    "offload": False,
    "zero": 0,
}
"""Settings that older checkpoints do not say, as they were unless a recipe asked for others."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Of what training a checkpoint is."""

    identity: str
    """Of what was asked, and of the very tokens."""
    machine: dict[str, Any]
    """Settings that change the bits of a result."""
    exact: bool
    """Whether it was resumed bitwise, if at all, on the way here."""
    legs: list[Leg]
    """On what it was computed up to here, as far as that is known of an old checkpoint."""


@dataclass(frozen=True)
class Sums:
    """What sums.json holds."""

    step: int
    origin: Origin
    files: Table
    lines: Table = field(default_factory=dict)
    """What the artifact's own files of lines held then; they grow, and are cut back to it. Old
    checkpoints do not say."""

    @classmethod
    def read(cls, checkpoint: Path) -> Sums | None:
        """The sums of a checkpoint, or None where the file is absent, not whole or changed."""
        document = read_written(checkpoint / SUMS)
        if not isinstance(document, dict) or document.get("fingerprint") != fingerprint(document):
            return None
        try:
            sums = record(cls, {"origin": {"exact": True, "legs": [], **document}, **document})
            check_names(sums.files, "files")
            check_names(sums.lines, "lines")
        except ValueError:
            return None
        return sums


class Picked(NamedTuple):
    """A checkpoint to go on from."""

    path: Path
    exact: bool
    """Whether what comes of it is bitwise what a run without a stop makes."""
    legs: list[Leg]
    """On what it was computed, and what comes of it will be."""


def folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step}"


def step_of(checkpoint: Path) -> int:
    """The optimizer step at which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def settings(checkpoints: Path) -> Mapping[str, Any]:
    """The machine's settings that the newest checkpoint was written with, as far as its table says;
    nothing where there is none.
    """
    for step in reversed(steps_of(checkpoints)):
        if sums := Sums.read(folder(checkpoints, step)):
            return sums.origin.machine
    return {}


class Together(Protocol):
    """The processes that decide, of which this is one; `World` is that."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_mirrored(self) -> bool: ...
    def gather(self, value: T) -> list[T]: ...
    def bring(self, path: Path | None) -> Path: ...


class Alone:
    """One process."""

    rank, size, is_mirrored = 0, 1, False

    def gather(self, value: T) -> list[T]:
        return [value]

    def bring(self, path: Path | None) -> Path:
        assert path is not None
        return path


ALONE = Alone()


@contextmanager
def writing(
    checkpoints: Path,
    step: int,
    origin: Origin,
    state: Callable[[], dict[str, Any]],
    lines: Mapping[str, int] = MappingProxyType({}),
    hashed: Mapping[str, FileEntry] = MappingProxyType({}),
) -> Iterator[Path]:
    """Yield a folder to save into; on leaving add STATE and SUMS and publish it as `step-N`.

    `lines`: sizes, in bytes, of files of the artifact that a resumed run goes on with; `hashed`:
    files whose writers have hashed them by then.
    """
    with publishing(folder(checkpoints, step)) as staging:
        yield staging
        leave_out(staging)
        write_json(staging / STATE, state())
        sums = {"step": step, **asdict(origin), "files": table(staging, known=hashed)}
        begun = {name: _beginning(checkpoints.parent / name, size) for name, size in lines.items()}
        sums |= {"lines": begun} if begun else {}
        write_json(staging / SUMS, sums | {"fingerprint": fingerprint(sums)})


def leave_out(folder: Path) -> None:
    """Remove what nothing reads of what a library has saved in a folder."""
    for name in UNREAD:
        (folder / name).unlink(missing_ok=True)


def _part(rank: int) -> str:
    return f"shard-{rank + 1:05}-"


def _of_others(files: Table, rank: int, size: int) -> set[str]:
    """Parts that other processes read, where there are as many as have written them."""
    parts = {name for name in files if name.startswith(f"{SHARDED}/")}
    own = {name for name in parts if name.startswith(f"{SHARDED}/{_part(rank)}")}
    return parts - own if len(parts) == size else set()


def verify(checkpoint: Path, seen: Seen | None = None, rank: int = 0, size: int = 1) -> list[str]:
    """What is wrong with a checkpoint, nothing when it is whole; of one in `size` parts as far as
    the process of this rank reads it.
    """
    if checkpoint.is_symlink():
        return [f"{SUMS}: behind a link, which is not followed"]
    sums = Sums.read(checkpoint)
    if sums is None:
        return [f"{SUMS}: damaged or missing"]
    others = _of_others(sums.files, rank, size)
    problems = differences(checkpoint, sums.files, {SUMS}, seen=seen, unread=others)
    if sums.step != step_of(checkpoint):
        problems.append(f"{SUMS}: is of step {sums.step}")
    return problems


def verify_together(checkpoint: Path, world: Together) -> list[str]:
    """What any process finds wrong with a checkpoint, each as far as it reads it. Collective.

    A machine that does not see rank 0's is sent what it lacks of one that is whole there.
    """
    if world.is_mirrored:
        problems = verify(checkpoint) if world.rank == 0 else []
        if problems := world.gather(problems)[0]:
            return problems
        world.bring(checkpoint)
    return _of_any(verify(checkpoint, None, world.rank, world.size), world)


def _of_any(mine: list[T], world: Together) -> list[T]:
    """What any process has, once, the same in all of them. Collective."""
    return list(dict.fromkeys(chain(*world.gather(mine))))


def verify_lines(checkpoint: Path) -> list[str]:
    """Which of the artifact's files of lines do not begin with what they held when a checkpoint was
    written: a line for each. `verify` comes first.
    """
    sums = Sums.read(checkpoint)
    artifact = checkpoint.parent.parent
    problems = []
    for name, entry in (sums.lines if sums else {}).items():
        path = artifact / name
        try:
            problem = not_plain(path)
            begins = problem or _beginning(path, entry.size)
        except FileNotFoundError:
            begins = "missing"
        except OSError as error:
            begins = f"cannot be read: {error.strerror}"
        if isinstance(begins, str):
            problems.append(f"{name}: {begins}")
        elif begins.size < entry.size:
            problems.append(f"{name}: {begins.size:,} bytes, of {entry.size:,} then")
        elif begins != entry:
            problems.append(f"{name}: its first {entry.size:,} bytes were others then")
    return problems


def _beginning(path: Path, size: int) -> FileEntry:
    """The first `size` bytes of a file, or as many as it has."""
    with path.open("rb") as file:
        data = file.read(size)
    return FileEntry(len(data), sha256(data).hexdigest())


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what kills have left of checkpoints that were being written. Nobody writes one."""
    for path in checkpoints.glob(".step-*.staging"):
        remove(path)


def rotate(checkpoints: Path, keep: int, also: set[int]) -> None:
    """Remove all but the newest `keep` checkpoints and those in `also`."""
    for step in steps_of(checkpoints)[:-keep]:
        if step not in also:
            path = folder(checkpoints, step)
            doomed = path.with_name(f".{path.name}.old")
            remove(doomed)
            path.rename(doomed)  # first: half a checkpoint is never seen
            remove(doomed)


def pick(
    checkpoints: Path,
    identity: str,
    machine: Mapping[str, Any],
    platform: Platform,
    say: Say,
    *,
    inexact: bool = False,
    world: Together = ALONE,
) -> Picked | None:
    """The newest checkpoint that verifies in all processes of `world`, or None when there is none.
    Collective: what one of them cannot read, all pass over.

    One that was written on another platform is said to be. Raises UserError (3) when it is of
    another recipe or, unless `inexact`, of other machine settings; and where the artifact's files
    of lines are not those of any.
    """
    without_lines = None
    for step in sorted(_of_any(steps_of(checkpoints), world), reverse=True):
        path = folder(checkpoints, step)
        if problems := verify_together(path, world):
            say(f"checkpoint {path.name} is damaged ({problems[0]}); looking for an older one")
            continue
        if problems := world.gather(verify_lines(path) if world.rank == 0 else [])[0]:
            say(f"checkpoint {path.name} is of no use ({problems[0]}); looking for an older one")
            without_lines = without_lines or f"{checkpoints.parent}/{problems[0]}"
            continue
        sums = Sums.read(path)
        assert sums is not None
        if sums.origin.identity != identity:
            raise UserError(f"{path}: is of another recipe", "--fresh starts anew", INTEGRITY)
        before = UNSAID | dict(sums.origin.machine)
        now = {"sharded": False, "offload": False, "zero": 0} | dict(machine)
        changed = [name for name, value in now.items() if before.get(name) != value]
        if changed and not inexact:
            raise _other_machine(path, before, now, changed)
        legs = sums.origin.legs
        moved = _other_platform(legs[-1].platform if legs else {}, platform)
        if moved:
            say(f"{path.name}: what comes of it is not exact, bit by bit: {moved}")
            legs = [*legs, Leg(after=step, platform=platform)]
        return Picked(path, sums.origin.exact and not changed and not moved, legs)
    if without_lines:
        hint = "restore the file from a copy; --fresh starts anew"
        raise UserError(without_lines, hint, INTEGRITY)
    return None


def _other_platform(old: Platform, new: Platform) -> str:
    """In which names two platforms differ, in words; nothing where they do not."""
    if not old:
        return "it does not say on which device and with which libraries it was computed"
    return ", ".join(
        f"{name} {old.get(name, 'none')} there, {new.get(name, 'none')} now"
        for name in old | new
        if old.get(name) != new.get(name)
    )


def _other_machine(
    path: Path, old: Mapping[str, Any], new: Mapping[str, Any], changed: list[str]
) -> UserError:
    values = ", ".join(f"{name} {old.get(name)} there, {new[name]} now" for name in changed)
    hint = (
        "set them back under `launch:`, or accept a result that is not bitwise the same: "
        "--inexact-resume"
    )
    problem = f"{path}: was written with other settings of the machine: {values}"
    return UserError(problem, hint, INTEGRITY)
