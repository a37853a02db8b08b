"""Disks of a given size for a test: a tmpfs in namespaces of its own, which end with the process.

A test forks (`life.forked`), and its child calls `mount` and does everything there.
"""

import contextlib
import ctypes
import os
import subprocess
import time
from multiprocessing import get_context
from pathlib import Path

NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000


def alone() -> None:
    """Let this process mount what it likes; nobody else sees it."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_USER | NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare: this machine allows no user namespaces")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount("--make-rprivate", "/")


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def disk(folder: Path, options: str) -> Path:
    """Mount a disk with these options of tmpfs, such as size=4m or nr_inodes=100."""
    alone()
    folder.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", options, "none", str(folder))
    return folder


def remount(folder: Path, options: str) -> None:
    mount("-o", f"remount,{options}", str(folder))


def used(folder: Path) -> tuple[int, int]:
    """Bytes and inodes of a disk that are taken."""
    disk = os.statvfs(folder)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize, disk.f_files - disk.f_ffree


@contextlib.contextmanager
def read_only(folder: Path, after: float):
    """The disk turns read-only after some seconds, as soon as no file is written."""
    process = get_context("fork").Process(target=_turn, args=(folder, after))
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()
        remount(folder, "rw")


def _turn(folder: Path, after: float) -> None:
    time.sleep(after)
    turn = ["mount", "-o", "remount,ro", str(folder)]
    while subprocess.run(turn, stderr=subprocess.DEVNULL).returncode:
        time.sleep(0.01)


@contextlib.contextmanager
def filled(folder: Path, after: float):
    """Others fill the disk after some seconds, and whatever becomes free of it from then on."""
    ballast = folder / "ballast"
    filler = get_context("fork").Process(target=_fill, args=(ballast, after))
    filler.start()
    try:
        yield
    finally:
        filler.kill()
        filler.join()
        ballast.unlink(missing_ok=True)


def _fill(ballast: Path, after: float) -> None:
    time.sleep(after)
    with ballast.open("wb", buffering=0) as file:
        while True:
            with contextlib.suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass
            time.sleep(0.002)
