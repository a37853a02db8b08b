"""The server's process: started with the address, asked for its health, let others in, stopped.

It ends with the command (`llmpipe.ties`). What it is told comes by its standard input, so that no
key stands in a command line, in an environment or in a file.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from llmpipe.errors import RESOURCES, Say, UserError
from llmpipe.front.serve.asking import Line, Unheard
from llmpipe.front.serve.engines import Engine
from llmpipe.front.serve.gate import HEALTH, LET_IN
from llmpipe.front.serve.named import Address, Served
from llmpipe.run.signals import code_of, stopping
from llmpipe.ties import PARENT

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Variables with a key of the Hub, of which a server asks nothing."""

PAUSE = 0.1
"""Seconds between two looks at whether it answers."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the process is told first: a line of JSON."""

    name: str
    folder: str
    base: str | None
    gguf: str | None
    """The file for llama.cpp, which is served in their place."""
    template_kwargs: dict[str, Any]
    stops: list[int]
    """Tokens that end an answer."""
    writes_calls: bool
    """Whether the template has calls of tools in `<tool_call>` and JSON."""
    descriptor: int
    """Of the socket to listen at."""
    key: str | None
    word: str
    """What the command shows in place of a key, until others are let in."""

    @classmethod
    def of(cls, model: Served, descriptor: int, key: str | None, word: str) -> Order:
        """To serve a verified model."""
        return cls(
            name=model.name,
            folder=str(model.folder),
            base=str(model.base) if model.base else None,
            gguf=str(model.gguf) if model.gguf else None,
            template_kwargs=model.template_kwargs,
            stops=model.probe.stops,
            writes_calls=model.writes_calls,
            descriptor=descriptor,
            key=key,
            word=word,
        )


class Server:
    """The process, as the command sees it."""

    def __init__(self, process: subprocess.Popen[bytes], line: Line):
        self.process = process
        self.line = line
        self.signals: list[int] = []
        """That came for this command, and were handed on."""

    def answers(self) -> str:
        """Wait until it answers, and say what it computes in.

        Raises UserError with what the process ended with where it does.
        """
        while True:
            self._refuse_ended()
            with suppress(Unheard):
                status, document = self.line.get(HEALTH, timeout=5)
                if status == 200:
                    return str(document["precision"])
            time.sleep(PAUSE)

    def let_in(self) -> None:
        """From now on others are answered."""
        assert self.process.stdin
        try:
            self.process.stdin.write(f"{LET_IN}\n".encode())
            self.process.stdin.flush()
        except OSError:
            self._refuse_ended(wait=True)
        status, document = self.line.get(HEALTH)
        while status == 200 and not document.get("open"):
            time.sleep(PAUSE)
            status, document = self.line.get(HEALTH)

    def wait(self, say: Say) -> int:
        """Wait until a signal has ended the process; the exit code of that.

        Raises UserError (5) where it ended of itself.
        """
        self.process.wait()
        if not self.signals:
            self._refuse_ended()
        say("stopped")
        return code_of(self.signals[0])

    def serve_signal(self, number: int, frame: FrameType | None) -> None:
        """Hand a signal on; from the second one on nothing is waited for."""
        self.signals.append(number)
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM if len(self.signals) == 1 else signal.SIGKILL)

    def _refuse_ended(self, wait: bool = False) -> None:
        """Raise what the process ended with, where it has ended."""
        code = self.process.wait() if wait else self.process.poll()
        if code is None:
            return
        if self.signals:
            raise SystemExit(code_of(self.signals[0]))
        raise _ended_with(code, self.process)


def _ended_with(code: int, process: subprocess.Popen[bytes]) -> UserError:
    """What a process said that ended, or that it said nothing."""
    assert process.stdout
    report = process.stdout.read()
    with suppress(ValueError, KeyError, TypeError):
        said = json.loads(report)
        return UserError(said["message"], said["hint"], said["code"])
    how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
    hint = "what it printed above says more; with SIGKILL it was memory, most likely"
    return UserError(f"serve: the server ended with {how}", hint, RESOURCES)


def _without(names: tuple[str | None, ...], environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@contextmanager
def running(
    model: Served, engine: Engine, address: Address, key: str | None, key_from: str | None = None
) -> Iterator[Server]:
    """The server in a process of its own, which is killed in the end if it is still there.

    `key_from`: the variable that holds the key, which is none of the process's.
    """
    word = secrets.token_urlsafe(32)
    order = Order.of(model, address.socket.fileno(), key, word)
    process = subprocess.Popen(
        engine.command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[order.descriptor],
        start_new_session=True,  # Ctrl-C comes by this command alone
        env=_without((*TOKENS, key_from), engine.environment) | {PARENT: str(os.getpid())},
    )
    server = Server(process, Line(address.near, address.port, word))
    before = {number: signal.signal(number, server.serve_signal) for number in stopping()}
    try:
        assert process.stdin
        with suppress(BrokenPipeError):  # of what ended at once; `answers` says how
            process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
            process.stdin.flush()
        yield server
    except UserError:
        if server.signals:  # which is why nobody answers any more
            raise SystemExit(code_of(server.signals[0])) from None
        raise
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # vLLM has processes of its own
        with suppress(BrokenPipeError):  # it may be gone, and no word is left for it
            process.communicate()
        for number, handler in before.items():
            signal.signal(number, handler)
