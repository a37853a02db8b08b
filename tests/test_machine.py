"""What the machine does to a command, as a line: faults.py, and the disks of test processes."""

import errno
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from llmpipe.errors import LOST, UserError
from llmpipe.faults import (
    code_of,
    of_disk,
    of_machine,
    of_memory,
    of_peer,
    reading,
    remembering,
    unwritable,
    writing,
)
from llmpipe.files.writing import publishing
from llmpipe.report.starter import write_starter
from llmpipe.run.machine import for_memory


def of(number: int, path: object = None) -> OSError:
    return OSError(number, os.strerror(number), path and str(path))


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (of(errno.ENOSPC), errno.ENOSPC),
        (RuntimeError("I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (ValueError("[Errno 122] Disk quota exceeded. Detail: [errno 122]"), errno.EDQUOT),
        (RuntimeError("unable to mmap 16 bytes: Cannot allocate memory (12)"), errno.ENOMEM),
        (RuntimeError("Too many open files"), errno.EMFILE),
        (RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"), None),
        (OSError("Can't load the tokenizer"), None),
    ],
)
def test_a_number_of_the_system_in_the_words_of_a_library(error, number):
    assert code_of(error) == number


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_full_disk_says_what_there_is_and_what_is_kept(tmp_path, number):
    for step in (3, 12):
        (tmp_path / "sft" / "checkpoints" / f"step-{step}").mkdir(parents=True)
    fault = of_disk(of(number), tmp_path / "sft" / "checkpoints" / "step-15")
    assert fault.code == 5 and f"cannot be written: {os.strerror(number)}" in fault.message
    if number in (errno.ENOSPC, errno.EDQUOT):
        assert " are free" in fault.message and "goes on from step-12" in fault.hint


def test_an_error_that_came_of_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError) as raised:
        try:
            raise of(errno.ENOSPC)
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")
    assert of_machine(raised.value, tmp_path).code == 5
    assert of_machine(RuntimeError("unexpected pos 64 vs 0"), tmp_path) is None


def test_every_error_of_the_system_is_a_line(tmp_path):
    artifact = tmp_path / "run" / "sft"
    for number in (errno.EACCES, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP):
        fault = of_disk(of(number, artifact / "log.txt"), artifact)
        assert fault.code == 5 and "--run DIR" in fault.hint
        assert f"log.txt: cannot be written: {os.strerror(number)}" in fault.message
    elsewhere = of_disk(of(errno.EACCES, "/etc/shadow"), artifact)
    assert elsewhere.code == 5 and str(elsewhere).startswith("/etc/shadow: Permission denied\n")
    assert "ulimit -n" in of_disk(of(errno.EMFILE, "libc.so"), artifact).hint
    assert of_machine(ConnectionResetError(104, "Connection reset by peer")).code == 5
    assert of_machine(KeyError("step"), tmp_path) is None


@pytest.mark.parametrize(
    "error", [MemoryError(), of(errno.ENOMEM), RuntimeError("DefaultCPUAllocator: can't allocate")]
)
def test_want_of_memory(error):
    assert of_memory(error, "fewer processes").hint == "fewer processes"


def test_reading_says_whose_file_it_is(tmp_path):
    path = tmp_path / "model.safetensors"
    with (
        pytest.raises(UserError, match=r"model.safetensors: cannot be read as safetensors: header"),
        reading(path, "safetensors", ValueError),
    ):
        raise ValueError("header too large")
    with (
        pytest.raises(UserError, match="Too many open files") as refused,
        reading(path, "safetensors", OSError),
    ):
        raise of(errno.EMFILE, path)
    assert refused.value.code == 5


def test_want_of_memory_has_the_remedy_of_its_moment(tmp_path):
    """Whatever stands between: it is no fault of a file, nor of the disk."""
    for held in (writing(tmp_path), reading(tmp_path, "a model", Exception), publishing(tmp_path)):
        refusal = pytest.raises(UserError, match="out of memory: MemoryError")
        with refusal as refused, remembering("a larger machine"), held:
            raise MemoryError
        assert refused.value.hint == "a larger machine"
    launch = SimpleNamespace(stage="eval", launch=None)
    remedies = {for_memory(action, launch) for action in ("prepare", "convert", "train")}
    assert len(remedies) == 3


def test_a_library_names_the_file(tmp_path):
    lost = RuntimeError("No such file or directory: /x/model.safetensors (os error 2)")
    assert of_machine(lost, tmp_path).message == str(lost)
    assert "ulimit -n" in of_machine(RuntimeError("x: Too many open files"), tmp_path).hint
    assert of_machine(OSError(errno.EBADF, "Bad file descriptor", 7)).code == 5


def test_a_limit_of_a_files_size(tmp_path):
    """`ulimit -f`: torch's writer stops at it without a word."""
    code = f"""
import resource, torch
from pathlib import Path
from llmpipe.faults import writing
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with writing(Path({str(tmp_path)!r})):
    torch.save(torch.zeros(1_000_000), {str(tmp_path / "optimizer.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError" in done.stderr and "File too large" in done.stderr, done.stderr


def test_a_start_that_found_no_room_leaves_nothing_in_its_way(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match="File too large") as refused:
            write_starter(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.code == 5 and not list((tmp_path / "new").iterdir())
    assert write_starter(tmp_path / "new")


def test_a_place_that_takes_a_page(tmp_path):
    assert unwritable(tmp_path / "no" / "such") is None
    assert not list(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert unwritable(tmp_path) == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_bug_stays_one(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        _ = 1 / 0


def test_a_process_that_is_lost_while_a_model_is_read_is_no_fault_of_the_model(tmp_path):
    """Each of several reads its part of one together with the others."""
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]")
    with pytest.raises(RuntimeError) as raised, reading(tmp_path, "a model", Exception, code=2):
        raise lost
    assert raised.value is lost and of_peer(lost).code == LOST
