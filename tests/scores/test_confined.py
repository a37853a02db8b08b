"""Programs that answers say, run against tests: what they may, and that none of them does harm."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmpipe.errors import UserError
from llmpipe.scores import confined
from llmpipe.scores.confined import Limits, code_in, passed_of, shares_passed
from tests import life

LIMITS = Limits(seconds=1, megabytes=256)
DONE = ["assert done == 1"]  # passes where the program came to its end


def passed(code, tests=DONE, limits=LIMITS):
    return passed_of(code, tests, limits)


def test_the_share_of_the_tests_that_pass():
    answers = [
        "Here:\n```python\ndef double(x):\n    return 2 * x\n```\nDone.",
        "double = abs",
        "no",
    ]
    tests = [
        "assert double(2) == 4",
        "assert double(0) == 0",
        "import math\nassert double(-1) == -2",
    ]
    assert shares_passed(answers, [tests] * 3, LIMITS) == [1.0, 1 / 3, 0.0]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("First\n```py\nx = 1\n```\nor better\n```python\nx = 2\n```\n", "x = 2\n"),
        ("```python\nx = 1\n```\n```bash\nls\n```", "x = 1\n"),
        ("```Python\nx = '```'", "x = '```'"),
        ("```python\nx = 1", "x = 1"),
    ],
)
def test_the_program_of_an_answer(answer, code):
    assert code_in(answer) == code


USEFUL = """
import asyncio, collections, dataclasses, decimal, functools, heapq, itertools, json, math, random
import re, string, threading, time, typing
heard = []
thread = threading.Thread(target=lambda: heard.append(1))
thread.start(), thread.join(), time.sleep(0.01), print("much"), random.random()
async def later():
    await asyncio.sleep(0.01)
    return open(json.__file__).read()[:3]
said = asyncio.run(later())
done = int(len(said) == 3 and heard == [1] and re.match("a+", "aa").end() == 2)
"""


def test_what_a_program_needs_to_compute_it_has():
    assert passed(USEFUL) == 1


def test_a_test_does_not_touch_the_next_ones_names():
    assert passed("x = [1]", ["x = 2", "assert x == [1]"]) == 2


REFUSED = {
    "fork": "import os\nos.fork()",
    "forks": "import os\nwhile True: os.fork()",
    "a program": "import subprocess\nsubprocess.run(['true'], check=True)",
    "another program": "import os\nos.execv('/bin/true', ['true'])",
    "processes": "import multiprocessing as m\nm.Process(target=print).start()",
    "network": "import socket\nsocket.socket()",
    "its own kind of network": "import socket\nsocket.socket(socket.AF_UNIX)",
    "an address": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')",
    "a new file": "open('{folder}/new', 'w')",
    "a new file, read": "import os\nos.open('{folder}/new', os.O_RDONLY | os.O_CREAT)",
    "an old file": "open('{folder}/old', 'r+')",
    "an old file, cut": "import os\nos.open('{folder}/old', os.O_RDONLY | os.O_TRUNC)",
    "removal": "import os\nos.unlink('{folder}/old')",
    "a new name": "import os\nos.rename('{folder}/old', '{folder}/new')",
    "a folder": "import os\nos.mkdir('{folder}/new')",
    "a link": "import os\nos.symlink('{folder}/old', '{folder}/new')",
    "rights": "import os\nos.chmod('{folder}/old', 0)",
    "a file in memory": "import os\nos.memfd_create('x')",
    "a signal": "import os\nos.kill({pid}, 0)",
    "a signal to all": "import os\nos.killpg(0, 0)",
    "a signal by a file": "import fcntl, os\nfcntl.fcntl(0, fcntl.F_SETOWN, {pid})",
    "limits": "import resource as r\nr.prlimit({pid}, r.RLIMIT_NOFILE, (9, 9))",
    "no limits": "import resource as r\nr.setrlimit(r.RLIMIT_CPU, (-1, -1))",
    "another's memory": "open('/proc/{pid}/mem', 'r+b')",
    "namespaces": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000): raise OSError",
    "new rights": "import ctypes\nif ctypes.CDLL(None).prctl(1, 0): raise OSError",
}


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)
        yield server


def test_what_a_program_may_not(tmp_path, server):
    """Each of it is an error, and the program goes on."""
    (tmp_path / "old").write_text("as it was")
    values = {"folder": tmp_path, "pid": os.getpid(), "port": server.getsockname()[1]}
    refused = []
    for code in REFUSED.values():
        for name, value in values.items():
            code = code.replace(f"{{{name}}}", str(value))
        refused.append(f"try:\n    exec({code!r})\nexcept REFUSAL:\n    pass\nelse:\n    1 / 0")
    # a limit that may not be raised is a ValueError to Python
    assert passed("REFUSAL = OSError, ValueError", refused) == len(REFUSED)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "as it was"
    assert os.stat(tmp_path / "old").st_mode & 0o777
    with pytest.raises(BlockingIOError):
        server.accept()


ENDED = {
    "sleeps for ever": "import time\ntime.sleep(1000)",
    "computes for ever": "while True: pass",
    "reads for ever": "open('/dev/zero', 'rb').read()",
    "has no end": "import os\nwhile True: os.write(3, b'x' * 65536)",
    "leaves": "import os\nos._exit(0)",
    "leaves by an exception": "raise SystemExit(0)",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "eats memory": "x = []\nwhile True: x.append('x' * 10**7)",
    "starts threads": """
import threading, time
while True: threading.Thread(target=time.sleep, args=(1000,)).start()""",
    "is no Python": "def (",
}
ALSO_ENDED = {
    "waits for ever": "import threading\nthreading.Event().wait()",
    "catches what ends it": """
while True:
    try:
        while True: pass
    except BaseException: pass""",
    "ignores signals": """
import signal
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
while True: pass""",
    "recurses": "def f(): f()\nf()",
    "recurses for ever": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "eats all memory": "x = b'x' * 10**10",
    "opens files": "x = []\nwhile True: x.append(open('/dev/zero'))",
    "is a bomb": "x = 9 ** 9 ** 9",
    "is deep": "(" * 100_000,
}
PROGRAMS = [*ENDED.items(), *(life.by_the_dozen(*case) for case in ALSO_ENDED.items())]


def children():
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


@pytest.mark.parametrize(("what", "code"), PROGRAMS)
def test_a_program_that(monkeypatch, what, code):
    """Is ended in time, passes nothing, leaves no process, and no memory that it was given."""
    monkeypatch.setattr(confined, "WALL", 1)
    before, begun = children(), time.monotonic()
    assert passed(f"{code}\ndone = 1", ["assert done == 1", "assert True"]) == 0
    assert time.monotonic() - begun < 30 and children() == before


def test_what_passed_before_a_hang_counts(monkeypatch):
    monkeypatch.setattr(confined, "WALL", 1)
    assert passed("done = 1", [*DONE, "while True: pass", *DONE]) == 1


def test_an_answer_knows_nothing_of_the_environment(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "s3cr3t-value")
    code = "import os\ndone = int(not any('KEY' in name for name in os.environ))"
    assert passed(code) == 1


def test_nobody_else_says_what_passed():
    """Not what an answer prints, and not a pipe that it finds."""
    said = "import os\nfor fd in range(1, 64):\n    try: os.write(fd, b'0\\nbegun\\n0 0\\n')\n"
    assert passed(f"{said}    except OSError: pass\nprint(0)", ["assert False"]) == 0


def test_a_program_ends_with_who_waits_for_it(tmp_path):
    code = "import time\ntime.sleep(100)"
    waits = f"from llmpipe.scores.confined import *\npassed_of({code!r}, [], Limits(100, 256))"
    parent = subprocess.Popen([sys.executable, "-c", waits])
    path = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while not (child := path.read_text().split()):
        time.sleep(0.01)
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child[0]}").exists():
        assert time.monotonic() < deadline, "it outlives its parent"
        time.sleep(0.01)


def test_where_none_can_be_confined_none_is_run(monkeypatch):
    """A machine without the filter: the process ends before the answer begins."""
    monkeypatch.setattr(confined, "CHILD", Path(os.devnull))
    with pytest.raises(UserError, match="cannot be confined on this machine") as refused:
        confined.prove()
    assert refused.value.code == 5


@pytest.mark.parametrize(
    ("value", "tests"),
    [
        ("assert f(1)", ["assert f(1)"]),
        (["a = 1", "b = 2"], ["a = 1", "b = 2"]),
        ('["a = 1", "b = 2"]', ["a = 1", "b = 2"]),
        ("[f(1)]", ["[f(1)]"]),
    ],
)
def test_tests_of_a_row(value, tests):
    assert confined.tests_of(value) == tests


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "there are no tests"),
        ("", "there are no tests"),
        ([], "there are no tests"),
        ([""], "there are no tests"),
        (["a = 1", 3], "test 2 is no text"),
        (["a = 1", " "], "test 2 is no text"),
        ("a =", "test 1 is no Python: line 1: invalid syntax"),
        ({"input": "1"}, "test 1 is no text"),
        ("a = '\0'", "test 1 is no Python"),
    ],
)
def test_what_are_no_tests(value, problem):
    with pytest.raises(ValueError, match=problem):
        confined.tests_of(value)
    assert json.dumps(value)
