"""Environments of turns: objects of the user's file that answer what the policy says.

    class Guess:
        def reset(self, row):
            self.secret = row["secret"]

        def step(self, answer):
            if answer.strip() == str(self.secret):
                return None, 1.0, True
            return "Another one.", 0.0, False

`reward: [{environment: ./game.py:Guess}]` names one, as a reward function is named: a class, or a
function that returns an object. Every episode has an object of its own, and so has each answer of a
group. The words are gymnasium's (Towers 2024), the shape is TRL's and verifiers': what it says is
text, and masks, tokens and templates are not its matter.

What is random in an environment has to follow from the row: then the answers to a prompt meet the
same task, and a resumed run goes on bit by bit.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from copy import deepcopy
from threading import Thread
from typing import Any, NamedTuple, Protocol

from llmpipe.data.conversation import messages_of
from llmpipe.data.examples import Messages
from llmpipe.data.fields import Rejected, Values
from llmpipe.errors import DATA, NUMERIC, UserError
from llmpipe.rl.sources.functions import UserFiles, where
from llmpipe.rl.sources.source import Row, is_score, shortened

SECONDS = 300.0  # that a call may take: who waits for longer, waits for nobody

Turn = str | dict[str, Any] | list[dict[str, Any]] | None
"""A text, which is a user's turn, a message, or several: of the roles user, tool and system."""


class Environment(Protocol):
    """What plays one episode."""

    def reset(self, row: dict[str, Any]) -> Turn:
        """Begin. `row` has what is asked (`prompt`, messages), the row's answer (`reference`, or
        None) and every other column by its name; what is returned follows the prompt, mostly
        nothing."""
        ...

    def step(self, answer: str) -> tuple[Turn, float, bool]:
        """The next turn, the reward of this answer, and whether the episode is done. `answer` is
        the text of the policy's last turn, without special tokens."""
        ...


class Step(NamedTuple):
    """What an environment returned."""

    turn: Messages
    reward: float
    done: bool


class Environments:
    """Makes and asks the objects of a user's class, whatever they do.

    All calls are made in one thread, as connections and event loops need: what they set for it, and
    what is set for drawing (autocast, no gradients), does not reach the other. One that hangs is
    left behind there.
    """

    def __init__(self, name: str, files: UserFiles):
        """`name`: ./file.py:Name."""
        self.name = name
        self._path, _, attribute = name.rpartition(":")
        self._make = files.take(name, self._path, attribute)
        self._calls: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        Thread(target=self._serve, name=name, daemon=True).start()

    def begin(self, row: Row) -> tuple[Environment, Messages]:
        """An environment for a row, and what it adds to the prompt. Raises UserError."""
        environment: Environment = self._called(row, self._make)
        asked = deepcopy(row["columns"] | {name: row[name] for name in ("prompt", "reference")})
        turn = self._called(row, lambda: environment.reset(asked))
        return environment, self._messages(row, "reset", turn)

    def step(self, row: Row, environment: Environment, answer: str) -> Step:
        """What an environment makes of an answer. Raises UserError, (4) for a reward that is no
        finite number."""
        value = self._called(row, lambda: environment.step(answer))
        if not isinstance(value, tuple | list) or len(value) != 3:
            raise self._bad(row, f"step returned {_shown(value)}, not (turn, reward, done)")
        turn, reward, done = value
        reward, done = _unwrapped(reward), _unwrapped(done)
        if not is_score(reward):
            code = NUMERIC if isinstance(reward, float) else DATA
            raise self._bad(row, f"step gave {_shown(reward)} as reward", code)
        if not isinstance(done, bool):
            raise self._bad(row, f"step gave {_shown(done)} for done, which is true or false")
        messages = self._messages(row, "step", turn)
        if not done and not messages:
            raise self._bad(row, "step gave no turn, and the episode is not done")
        return Step(messages, float(reward), done)

    def _messages(self, row: Row, method: str, turn: Any) -> Messages:
        """A turn as messages."""
        if turn is None or turn == []:
            return []
        if isinstance(turn, str):
            turn = {"role": "user", "content": turn}
        turns = [turn] if isinstance(turn, dict) else turn
        values = Values({"turn": turns})
        try:
            messages = messages_of(values, "turn")
        except Rejected as error:
            raise self._bad(row, f"{method}: {error}") from None
        if values.unread:
            unread = ", ".join(sorted(values.unread))
            raise self._bad(row, f"{method}: gave {unread}, which no template would be shown")
        if any(message["role"] == "assistant" for message in messages):
            raise self._bad(row, f"{method}: gave a turn of the assistant's, who is the policy")
        return messages

    def _called(self, row: Row, function: Callable[[], Any]) -> Any:
        """What a call returns within `SECONDS`; what it raises is named with its line."""
        self._calls.put(function)
        try:
            value, error = self._results.get(timeout=SECONDS)
        except queue.Empty:
            raise self._bad(row, f"did not return within {SECONDS:g} seconds") from None
        if error is not None:
            raise self._bad(row, where(error, self._path)) from error
        return value

    def _serve(self) -> None:
        while True:
            function = self._calls.get()
            try:
                self._results.put((function(), None))
            except BaseException as error:  # an exit as well: nobody else would say so
                self._results.put((None, error))

    def _bad(self, row: Row, problem: str, code: int = DATA) -> UserError:
        """With the file and line of the prompt that was played."""
        return UserError(f"reward: {self.name}: {problem}, at {row['at']}", code=code)


def _unwrapped(value: Any) -> Any:
    """The number in what NumPy and torch have for one; anything else as it is."""
    try:
        return value.item() if hasattr(value, "item") else value
    except Exception:  # of several numbers
        return value


def _shown(value: Any) -> str:
    return shortened(repr(value))
