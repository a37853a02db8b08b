"""The line of a terminal that moves, on a real one."""

import os
import pty
import sys
import time

from llmpipe import screen

CODE = """
import sys, time
from llmpipe.front.terminal import open_terminal
open_terminal()
from llmpipe import screen
screen.PAUSE = 0.02
with screen.doing("hashing " + "x" * 100) as say:
    time.sleep(0.3)
    print("history", end=""); time.sleep(0.1); print(" is whole")
    say("second"); time.sleep(0.2)
    with screen.doing("inner"):
        time.sleep(0.2)
print("end")
"""


def in_terminal(code, **environment):
    """What Python writes to a terminal of 80 columns; the longest silence is `longest`."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": "xterm", "COLUMNS": "80"} | environment)
        os.execv(sys.executable, [sys.executable, "-c", code])
    said = b""
    in_terminal.longest, last = 0.0, time.monotonic()
    while True:
        try:
            read = os.read(terminal, 4096)
        except OSError:  # Linux, when the other end is closed
            break
        if not read:
            break
        said += read
        now = time.monotonic()
        in_terminal.longest, last = max(in_terminal.longest, now - last), now
    assert os.waitpid(pid, 0)[1] == 0, said.decode()
    os.close(terminal)
    return said.decode()


def seen(said):
    """The lines that a terminal shows in the end."""
    lines = said.replace("\r\n", "\n").split("\n")
    return [line.rpartition(screen.ERASE)[2] for line in lines]


def test_history_goes_above_the_line_which_is_gone_in_the_end():
    said = in_terminal(CODE)
    assert seen(said) == ["history is whole", "end", ""]
    drawn = said.split(screen.ERASE)
    long = screen.DIM + "hashing " + "x" * 68 + "..." + screen.PLAIN
    assert long in drawn and screen.DIM + "second" + screen.PLAIN in drawn
    assert screen.DIM + "inner" + screen.PLAIN in drawn


def test_no_colour_and_no_terminal():
    said = in_terminal(CODE, NO_COLOR="1")
    assert "second" in said and screen.DIM not in said
    assert "second" not in in_terminal(CODE, TERM="dumb")
    assert "second" not in in_terminal(CODE, RANK="1")


def test_a_text_is_cut_by_the_columns_that_it_takes():
    assert screen.width_of("ab健康") == 6
    assert screen.cut("健康" * 10, 12) == "健康健康..."
    assert screen.cut("健康", 4) == "健康"
