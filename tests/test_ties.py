"""Who works for a process that has ended, ends: also one that had not begun to look."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import pytest

from llmpipe.ties import PARENT, Tie, call_tied, descendants, parent_of, tie_forks
from tests import life

PYTHON = [sys.executable, "-c"]
LAUNCHER = """
import subprocess, sys, time
print(subprocess.Popen(sys.argv[1:], start_new_session=True).pid, flush=True)
time.sleep(60)
"""
WORKER = """
import sys, time
from llmpipe.ties import die_with_command
time.sleep(float(sys.argv[1]))
die_with_command()
time.sleep(60)
"""


@contextmanager
def started(*command, **environment):
    """A process, which is killed in the end, and the pid that it prints, of one it started."""
    with subprocess.Popen(
        [*PYTHON, *command],
        env={**os.environ, "PYTHONPATH": str(life.ROOT), **environment},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid, seconds=5.0):
    """Whether a process ends within so many seconds."""
    deadline = time.monotonic() + seconds
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    alive = lives(pid)
    if alive:
        os.kill(pid, signal.SIGKILL)
    return not alive


@pytest.mark.parametrize("late", ["0", "1"])
def test_a_rank_ends_with_its_launcher(late):
    """Killed when the rank has asked for that, or, while it was importing, before."""
    command = str(os.getpid())
    rank = [*PYTHON, WORKER, late]
    with started(LAUNCHER, *rank, RANK="1", LLMPIPE_PARENT=command) as (launcher, pid):
        time.sleep(0.5)
        assert lives(pid)
        launcher.kill()
        assert gone(pid)


def test_a_rank_whose_command_has_ended_ends_though_its_launcher_lives():
    rank = [*PYTHON, WORKER, "0"]
    with started(LAUNCHER, *rank, RANK="1", LLMPIPE_PARENT="999999999") as (_, pid):
        assert gone(pid)


def test_a_worker_without_launcher_whose_command_has_ended_ends():
    environment = {**os.environ, "PYTHONPATH": str(life.ROOT), PARENT: "999999999"}
    environment.pop("RANK", None)
    assert subprocess.run([*PYTHON, WORKER, "0"], env=environment, timeout=20).returncode == 137


class Slow:
    """Takes a minute to be unpickled."""

    def __reduce__(self):
        return time.sleep, (60,)


def send_what_is_slow():
    pool = ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), call_tied, (Tie(), print, Slow())
    )
    pool.submit(print)
    print(*pool._processes, flush=True)
    time.sleep(60)


def test_a_spawned_process_ends_with_its_sender_before_it_has_what_it_was_sent():
    sending = "from tests.test_ties import send_what_is_slow as send; send()"
    with started(sending) as (sender, child):
        time.sleep(1)
        sender.kill()
        assert gone(child)


def fork():
    """Fork here and in a thread that ends; say the pids of both, and stay."""
    tie_forks()
    pids = []

    def child():
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        pids.append(pid)

    child()
    thread = threading.Thread(target=child)
    thread.start()
    thread.join()
    print(*pids, sep="\n", flush=True)
    time.sleep(60)


def test_a_forked_process_ends_with_its_parent_and_not_with_a_thread():
    with started("from tests.test_ties import fork; fork()") as (parent, child):
        of_thread = int(parent.stdout.readline())
        time.sleep(0.3)
        assert lives(child) and lives(of_thread)
        assert descendants(parent.pid) == [child, of_thread]
        assert parent_of(child) == parent.pid
        parent.kill()
        assert gone(child)
        os.kill(of_thread, signal.SIGKILL)
