"""What a user reads when something is wrong, and the exit code the shell sees.

A `UserError` says what went wrong in the user's words and what to do next; `cli` and `worker` are
the only places that catch it. Anything else that escapes is a bug and is shown as one.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

Say = Callable[[str], None]  # prints a line, and keeps it where there is a log

DONE = 0
DATA = 2  # recipe or data
INTEGRITY = 3  # a file, a parent or a template is not what was recorded
NUMERIC = 4  # NaN, Inf, nothing to learn from
RESOURCES = 5  # disk, memory
BUSY = 75  # another process holds the run directory (EX_TEMPFAIL)
LOST = 75  # another process of the run is gone; the same command goes on (EX_TEMPFAIL)
LATER = 75  # the Hub takes nothing at this moment; the same command goes on (EX_TEMPFAIL)
SIGINT = 130
SIGTERM = 143


class UserError(Exception):
    """A mistake that the user can mend.

    `message` says what went wrong, `hint` what to do; `code` is the exit code.
    """

    def __init__(self, message: str, hint: str | None = None, code: int = DATA):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class Mistake(NamedTuple):
    """What is wrong with a field of a recipe, which is named by its path: `data.train.0.path`."""

    field: str
    error: UserError


class Stopped(BaseException):
    """A signal was served; `code` is 130 or 143.

    Not an Exception: nothing that handles errors may swallow it.
    """

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code
        self.message = message


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like `word`; None where none is, on a scale from 0 to 1."""
    import difflib  # here, since most commands make no mistake

    matches = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return matches[0] if matches else None


def near(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` or nothing."""
    name = nearest(word, known)
    return f"; did you mean '{name}'?" if name else ""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in a line, with the next one where that only announces it;
    its class where it says nothing."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first
