"""Where templates are compiled and rendered: Jinja's sandbox, with limits of time and memory.

A template comes with the model and is as untrusted as the model. Jinja is set up as transformers
sets it up, so that a template renders to the same text.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from llmpipe.data.formats import Rejected

# for one conversation
MAX_SECONDS = 3.0
MAX_BYTES = 512 << 20
MAX_CHARS = 64_000_000

Span = tuple[int, int]  # start and end in characters


class _Late(BaseException):
    """Not an Exception, which Jinja's compiler would swallow."""


@contextmanager
def bounded() -> Iterator[None]:
    """MAX_SECONDS of processor time and MAX_BYTES for what is done inside; main thread only.

    Raises Rejected.
    """

    def late(signum: int, frame: Any) -> NoReturn:
        raise _Late

    limits = resource.getrlimit(resource.RLIMIT_AS)
    _limit_memory(*limits)
    handler = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS, MAX_SECONDS)
    try:
        yield
    except (_Late, MemoryError):
        problem = "a conversation takes too long or too much memory to render"
        raise Rejected("template too large", problem) from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _limit_memory(soft: int, hard: int) -> None:
    """Let the process grow by MAX_BYTES, and not beyond the limits that it has."""
    with suppress(FileNotFoundError):  # Linux; other systems do not obey the limit
        pages = os.pread(_statm(os.getpid()), 64, 0).split()[0]
        size = int(pages) * resource.getpagesize()
        limits = (size + MAX_BYTES, soft, hard)
        limit = min(value for value in limits if value != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


@cache
def _statm(process: int) -> int:
    """The file that holds a process's size, kept open: opening it anew would cost a row as much as
    the whole of the limits."""
    return os.open(f"/proc/{process}/statm", os.O_RDONLY | os.O_CLOEXEC)


class Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: note where its text begins and ends."""

    tags = {"generation"}

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self.begin()

    def begin(self) -> None:
        """A new text: nothing of it is written."""
        self.written = 0  # characters so far, counted by who renders
        self.spans: list[Span] = []

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.spans.append((self.written, self.written + len(text)))
        return text


class _Namespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore, which could reach Python's own."""

    def __init__(self, /, *args: Any, **kwargs: Any):
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            problem = "a namespace cannot hold a name that starts with an underscore"
            raise jinja2.exceptions.SecurityError(problem)
        super().__setitem__(name, value)


def _raise(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without Jinja's escapes for HTML, as transformers has it."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def sandbox() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """A new environment that a template is compiled in, with what transformers gives templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _now,
        "namespace": _Namespace,
    }
    return environment
