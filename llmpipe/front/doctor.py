"""`llmpipe doctor`: this machine, the libraries, the Hub, and what `auto` becomes, and why.

What can be known without PyTorch is printed at once; the rest by a process of its own, which gets
`LIMIT` seconds: importing PyTorch takes some, and a broken driver may hang it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from time import monotonic
from typing import NamedTuple

from llmpipe import __version__, screen
from llmpipe.data.readers.hub import is_reachable, kept_offline
from llmpipe.errors import RESOURCES, Say, UserError
from llmpipe.files.tables import in_bytes
from llmpipe.front.ahead import OPTIONAL, to_install
from llmpipe.front.launch import library_environment
from llmpipe.run.machine import gpus
from llmpipe.run.provenance import installed

LIMIT = 180
"""Seconds for PyTorch."""

LITTLE_DISK, LITTLE_MEMORY = 5e9, 4e9
"""Bytes below which a small model may not fit."""

PROBE = [sys.executable, "-m", "llmpipe.models.probe"]

TITLE = 12
"""Columns before what is said."""


class Fact(NamedTuple):
    title: str
    text: str
    is_wrong: bool = False
    """Whether something has to be mended."""


def examine(say: Say) -> None:
    """Say all of it. Raises UserError (5) where something is wrong."""
    wrong = 0
    shown = None
    for fact in _facts():
        wrong += fact.is_wrong
        for line in _lines(fact, repeats=fact.title == shown):
            say(line)
        shown = fact.title
    if wrong:
        problem = f"{wrong} of these things {'is' if wrong == 1 else 'are'} wrong"
        raise UserError(problem, "see the lines marked WRONG", RESOURCES)


def _lines(fact: Fact, *, repeats: bool) -> list[str]:
    """A fact in lines of 80 columns; a title that `repeats` the last one is not said again."""
    mark = screen.coloured("WRONG ", screen.RED, sys.stdout) if fact.is_wrong else ""
    lines = textwrap.wrap(fact.text, 79 - TITLE - len("WRONG ") * fact.is_wrong) or [""]
    title = "" if repeats else fact.title
    return [f"{title:<{TITLE}}{mark}{lines[0]}", *(" " * TITLE + line for line in lines[1:])]


def _facts() -> Iterator[Fact]:
    """All there is to know, the quickest first."""
    yield _of_llmpipe()
    yield from _of_hardware()
    yield from _of_libraries()
    yield from _of_disks()
    yield from _of_hub()
    yield from _of_pytorch()


# --- without PyTorch ------------------------------------------------------------------------------


def _of_llmpipe() -> Fact:
    system = f"{platform.system()} {platform.machine()}"
    here = Path(__file__).parent.parent
    return Fact("llmpipe", f"{__version__}, Python {platform.python_version()}, {system}, {here}")


def _of_hardware() -> Iterator[Fact]:
    cores = len(os.sched_getaffinity(0))
    of = f" of {os.cpu_count()}" if cores != os.cpu_count() else ""
    yield Fact("processor", f"{_processor()}, {cores}{of} cores")
    total, free = _memory()
    text = f"{in_bytes(total)}, {in_bytes(free)} of it free"
    few = "; a model of 135 M weights needs about 4 GB to be trained whole"
    yield Fact("memory", text + few * (free < LITTLE_MEMORY))
    cards = _cards()
    for number, card in enumerate(cards):
        yield Fact("GPU", f"{number}: {card}")
    if not cards:
        yield Fact("GPU", "none that the kernel knows of (/proc/driver/nvidia)")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        yield Fact("GPU", f"CUDA_VISIBLE_DEVICES={visible}: llmpipe sees {gpus()}")


def _processor() -> str:
    """The name of the CPU, and which of the instructions that matter it has."""
    text = _read("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    flags = [flag for flag in known if re.search(rf"\b{flag}\b", text)]
    return ", ".join([name[1] if name else platform.machine(), *flags])


def _memory() -> tuple[int, int]:
    """Bytes of memory and what is free of them, by the kernel and by the limit of a container."""
    text = _read("/proc/meminfo")
    kilobytes = {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}
    total, free = (1024 * kilobytes.get(name, 0) for name in ("MemTotal", "MemAvailable"))
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    used = _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        total = min(total, int(limit))
        free = min(free, max(0, int(limit) - int(used)))
    return total, free


def _cards() -> list[str]:
    """Names of the GPUs, as the driver gives them."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    version = re.search(r"Kernel Module(?: for \S+)?\s+(\S+)", _read("/proc/driver/nvidia/version"))
    driver = f", driver {version[1]}" if version else ""
    models = [re.search(r"^Model:\s*(.+)$", _read(file), re.MULTILINE) for file in files]
    return [(model[1] if model else "unknown") + driver for model in models]


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _of_libraries() -> Iterator[Fact]:
    """Versions, and which of them llmpipe was not made for."""
    needed = list(_requirements())
    having = [f"{name} {installed(name) or 'MISSING'}" for name, _ in needed]
    yield Fact("libraries", ", ".join(having))
    for name, bounds in needed:
        version = installed(name)
        if version is None:
            yield Fact(
                "libraries", f"{name} is missing: pip install '{name}{bounds}'", is_wrong=True
            )
        elif not _lies_in(version, bounds):
            text = f"{name} {version} is not {bounds}: pip install '{name}{bounds}'"
            yield Fact("libraries", text, is_wrong=True)
    absent = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    present = ", ".join(f"{name} {installed(name)}" for name in OPTIONAL if name not in absent)
    yield Fact("optional", present or "nothing of it is installed")
    if absent:
        ways = ", ".join(f"{name} ({to_install(name)})" for name in absent)
        yield Fact("optional", f"not installed: {ways}")


def _requirements() -> Iterator[tuple[str, str]]:
    """What llmpipe needs everywhere, and between which versions; nothing where it is not installed
    as a package."""
    try:
        lines = metadata.requires("llmpipe") or []
    except metadata.PackageNotFoundError:
        return
    for line in lines:
        requirement, _, marker = line.partition(";")
        if "extra" not in marker and (match := re.match(r"([\w.-]+)\s*(.*)", requirement)):
            yield match[1], match[2].strip()


def _lies_in(version: str, bounds: str) -> bool:
    """Whether a version is within bounds such as `<1.17,>=1.16`, by its numbers."""
    number = _numbers(version)
    for bound in filter(None, bounds.split(",")):
        match = re.match(r"\s*(>=|<)\s*([\d.]+)\s*$", bound)
        if match is None:
            continue  # pyproject.toml has no other kind
        limit = _numbers(match[2])
        if (number < limit) if match[1] == ">=" else (number >= limit):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _of_disks() -> Iterator[Fact]:
    temporary = Path(tempfile.gettempdir())
    places = {"here": Path.cwd(), "Hub's cache": _hub_cache(), "temporary": temporary}
    for what, place in places.items():
        there = place
        while not there.exists() and there != there.parent:
            there = there.parent
        free = shutil.disk_usage(there).free
        little = "; a checkpoint is 12 bytes a weight" if free < LITTLE_DISK else ""
        closed = not os.access(there, os.W_OK)
        text = f"{what}: {place}, {in_bytes(free)} free{little}"
        yield Fact("disk", text + "; this user may not write there" * closed, is_wrong=closed)


def _hub_cache() -> Path:
    """Where huggingface_hub keeps what it fetched, by its variables."""
    home = os.environ.get("HF_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def _of_hub() -> Iterator[Fact]:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if kept_offline():
        yield Fact("Hub", "not asked: HF_HUB_OFFLINE is set; what is in the cache can be used")
    else:
        begun = monotonic()
        with screen.doing(f"asking {endpoint}"):
            answers = is_reachable()
        if answers:
            yield Fact("Hub", f"{endpoint} answers after {monotonic() - begun:.1f} s")
        else:
            rest = "local files, and what is in the cache, can be used; a mirror is HF_ENDPOINT"
            yield Fact("Hub", f"{endpoint} cannot be reached from here: {rest}")
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    token = next((name for name in names if os.environ.get(name)), None)
    kept = Path(os.environ.get("HF_TOKEN_PATH") or _hub_cache().parent / "token")
    if token or kept.is_file():
        yield Fact("Hub", f"a token is there ({token or kept}); it was not looked at")
    else:
        yield Fact("Hub", "no token: models that are gated need `hf auth login`, or HF_TOKEN")
    cached = len(list(_hub_cache().glob("models--*")))
    yield Fact("Hub", f"{cached} models in the cache")


# --- by a process that imports it -----------------------------------------------------------------


def _of_pytorch() -> Iterator[Fact]:
    """What `llmpipe.models.probe` says, as it says it."""
    with tempfile.TemporaryFile("w+") as errors:
        probing = subprocess.Popen(
            PROBE,
            env=os.environ | library_environment("train"),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        with probing as probe:
            try:
                with screen.doing("importing PyTorch") as say:
                    yield from map(_fact, _in_time(probe, say))
            finally:
                probe.kill()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
    if probe.returncode == -signal.SIGKILL:
        why = f"said no more within {LIMIT} s, or was killed for want of memory"
        yield Fact("PyTorch", why, is_wrong=True)
    elif probe.returncode:
        why = f"cannot be used, its process ended with {probe.returncode}: {last}"
        yield Fact("PyTorch", why, is_wrong=True)


def _fact(line: str) -> Fact:
    title, _, text = line.rstrip("\n").partition("\t")
    return Fact(title.removeprefix("!"), text, title.startswith("!"))


def _in_time(probe: subprocess.Popen[str], say: Callable[[str], None]) -> Iterator[str]:
    """Lines of a process until it ends, or the time is over."""
    lines: Queue[str | None] = Queue()
    assert probe.stdout is not None
    Thread(target=_pass_on, args=(probe.stdout, lines), daemon=True).start()
    end = monotonic() + LIMIT
    while True:
        try:
            line = lines.get(timeout=max(0, end - monotonic()))
        except Empty:
            return
        if line is None:
            probe.wait()
            return
        yield line
        say("looking at what PyTorch can do")


def _pass_on(lines: Iterable[str], queue: Queue[str | None]) -> None:
    for line in lines:
        queue.put(line)
    queue.put(None)
