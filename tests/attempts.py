"""Many commands, each in a fork of its own of a process that has imported everything: how each
ends, within what time, and what it prints.

`attempts(cases, folder)` runs `llmpipe ARGS` for each case: the real door (`cli.main`), with the
workers in the same process (`life.start_here`). Nothing a case does reaches the next one.
"""

import collections
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests import life

CODES = {0, 2, 4, 5}
"""What a command may end with whatever a recipe or a file of rows holds: done, a mistake in them,
nothing to learn or no finite numbers, and a machine that is too small."""
PATIENCE = 6  # seconds that pass for each that is computed, where cores are shared
MEMORY = 4 << 30  # bytes that a case may take beside what the libraries have


@dataclass(frozen=True)
class Case:
    """A command on files that are written for it alone."""

    name: str
    arguments: Sequence[str]
    files: dict[str, bytes] = field(default_factory=dict)
    """By their names in the folder that the command runs in."""
    links: dict[str, str] = field(default_factory=dict)
    """Links in that folder, to files that many cases share."""
    until: str = "train"
    """The worker's action that is not begun any more; "" runs all of them."""
    culprit: str = ""
    """What a refusal has to name; the recipe or `--set` unless said."""


@dataclass(frozen=True)
class End:
    """How a case ended."""

    name: str
    code: int
    """None of the command's own where it was killed: the negative number of the signal."""
    seconds: float
    text: str
    """What it printed."""
    culprit: str

    @property
    def problem(self) -> str | None:
        """What no end may be."""
        if self.code in (-signal.SIGKILL, -signal.SIGXCPU):
            return f"hangs: {self.seconds:.0f} s"
        if "Traceback (most recent" in self.text or "a bug: " in self.text:
            return "a traceback"
        if self.code not in CODES:
            return f"exit {self.code}"
        if self.code == 2 and not any(name in self.text for name in self.culprit.split("|")):
            return f"names neither of {self.culprit}"
        if len(self.text) > 20_000:
            return f"prints {len(self.text):,} characters"
        return None


def attempts(cases: Sequence[Case], folder: Path, seconds: int = 10) -> list[End]:
    """The end of each case, in order; a case is killed that computes for longer than `seconds`, or
    waits for much longer."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "ends.jsonl"
    batch = life.forked(_batch, list(cases), str(folder), str(out), seconds)
    batch.join(len(cases) * PATIENCE * seconds)
    assert batch.exitcode == 0, f"exit code {batch.exitcode}"
    return [End(**json.loads(line)) for line in out.read_text().splitlines()]


def by_code(ends: Sequence[End]) -> dict[int, int]:
    """How many ended with each exit code."""
    return dict(sorted(collections.Counter(end.code for end in ends).items()))


def problems(ends: Sequence[End]) -> list[str]:
    """What ended as no command may."""
    return [
        f"{end.name}: {end.problem}\n{end.text[-1500:]}" for end in ends if end.problem is not None
    ]


def _batch(cases: list[Case], folder: str, out: str, seconds: int) -> None:
    with open(out, "w") as ends:
        for case in cases:
            place = Path(folder) / "case"
            place.mkdir()
            print(json.dumps(asdict(_end(case, place, seconds))), file=ends, flush=True)
            shutil.rmtree(place)


def _end(case: Case, place: Path, seconds: int) -> End:
    printed = place.with_suffix(".out")
    begun = time.monotonic()
    pid = os.fork()
    if not pid:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
            _child(case, place, printed)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    waiting = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(waiting, select.POLLIN)
    if not poll.poll(PATIENCE * seconds * 1000):
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(waiting)
    code = os.waitstatus_to_exitcode(status)
    text = printed.read_text(errors="replace")[-100_000:]
    culprit = case.culprit or "recipe.yaml|--set"
    return End(case.name, code, round(time.monotonic() - begun, 2), text, culprit)


def _child(case: Case, place: Path, printed: Path) -> None:
    """The command itself, from here to its end."""
    os.setpgid(0, 0)
    _limit_memory()
    descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1, errors="replace")
    os.chdir(place)
    for name, content in case.files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    for name, target in case.links.items():
        os.symlink(target, name)
    sys.argv = ["llmpipe", *case.arguments]
    os._exit(_code(case.until))


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MEMORY, MEMORY))


class _Enough(BaseException):
    """A case has come as far as it is to come."""


def _code(until: str) -> int:
    from llmpipe.front import cli, launch

    def start(action, *arguments, **options):
        if action == until:
            raise _Enough
        life.start_here(action, *arguments, **options)

    launch.start, launch.begun_early = start, life.nobody_early
    try:
        cli.main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except _Enough:
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
