"""Episodes of several turns: the policy answers, an environment replies, the policy answers that.

    prompt | answer | reply | answer | reply | answer

Answers are drawn by the engine as single ones are, all that wait for their next turn at a time, and
who is done leaves. What was drawn stays, token by token: no answer is decoded and read again. What
stands between two of them is what the chat template writes there (`Encoder.reply`), or the template
is refused.

An episode is whole when its environment says that it is done, behind an answer that ended. Else it
is unfinished: an answer was cut off at `max_new_tokens`, or ended otherwise than the template ends
turns; the turns were used up; or the model's context has no room for one more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from llmpipe.data.encode import Encoder
from llmpipe.data.examples import Messages
from llmpipe.data.fields import Rejected
from llmpipe.errors import UserError
from llmpipe.models.drawing.draw import Episode, Inserted
from llmpipe.rl.environment import Environment, Environments
from llmpipe.rl.seeds import Place
from llmpipe.rl.sources.source import Row

T = TypeVar("T")
Answers = Callable[[list[list[int]], list[Place]], list[Episode]]
"""Draws an answer to each text, by the numbers of its place."""


@dataclass
class Game:
    """An episode, as far as it is."""

    row: Row
    environment: Environment
    prompt: Messages
    """With what the environment added to the row's."""
    ids: list[int]
    """All tokens so far."""
    place: Place
    episodes: list[Episode] = field(default_factory=list)
    """Every answer, whose prompt is all that stands before it."""
    answers: list[str] = field(default_factory=list)
    """The same as a person reads them."""
    replies: list[Messages] = field(default_factory=list)
    reward: float = 0.0
    done: bool = False

    def episode(self) -> Episode:
        """All of it as one: what the policy said is the response, replies lie in it."""
        first, *later = self.episodes
        inserted, at = [], len(first.response)
        for before, episode in zip(self.episodes, later, strict=False):
            start = len(before.prompt) + len(before.response)
            inserted.append(Inserted(at, episode.prompt[start:]))
            at += len(episode.response)
        allowed: list[Tensor] | None = None
        if first.allowed is not None:
            allowed = [ids for each in self.episodes for ids in each.allowed or []]
        return Episode(
            first.prompt,
            [token for each in self.episodes for token in each.response],
            self.done and self.episodes[-1].ended,
            torch.cat([each.log_probs for each in self.episodes]),
            allowed,
            tuple(inserted),
        )

    def said(self) -> Row:
        """The row as rewards look at the last answer: its prompt is all that was said before."""
        messages = [*self.prompt]
        for answer, reply in zip(self.answers, self.replies, strict=False):
            messages += [{"role": "assistant", "content": answer}, *reply]
        return self.row | {"prompt": messages, "earned": self.reward}


@dataclass(frozen=True)
class Turns:
    """How episodes of several turns are played."""

    environments: Environments
    encoder: Encoder
    most: int
    """Turns of the policy in an episode."""
    max_new_tokens: int
    """Of a turn."""
    context: int | None
    """Tokens that the model takes."""

    def play(
        self,
        answers: Answers,
        text: Callable[[Episode], str],
        rows: Sequence[Row],
        prompts: list[list[int]],
        places: list[Place],
    ) -> list[Game]:
        """An episode for each row; `text`: an answer as a person reads it. Raises UserError, with
        its file and line, where an environment fails, or its turn cannot be appended."""
        games = [self._begun(*each) for each in zip(rows, prompts, places, strict=True)]
        going = games
        for turn in range(self.most):
            if not going:
                break
            numbers = [game.place._replace(turn=turn) for game in going]
            drawn = answers([game.ids for game in going], numbers)
            going = [
                game
                for game, episode in zip(going, drawn, strict=True)
                if self._goes_on(game, episode, text(episode))
            ]
        return games

    def _begun(self, row: Row, ids: list[int], place: Place) -> Game:
        environment, turns = self.environments.begin(row)
        prompt = [*row["prompt"], *turns]
        if turns:
            ids = self._rendered(row, lambda: self.encoder.prompt(prompt, row["tools"]))
            if not self._fits(len(ids)):
                raise UserError(
                    f"reward: {self.environments.name}: with what reset adds the prompt has "
                    f"{len(ids):,} tokens, which leaves no room for an answer of "
                    f"{self.max_new_tokens:,} in the model's {self.context:,}, at {row['at']}"
                )
        return Game(row, environment, prompt, ids, place)

    def _goes_on(self, game: Game, episode: Episode, answer: str) -> bool:
        """Take an answer and what the environment makes of it; whether another answer follows."""
        game.episodes.append(episode)
        game.answers.append(answer)
        step = self.environments.step(game.row, game.environment, answer)
        game.reward += step.reward
        game.done = step.done
        if game.done or not episode.ended or len(game.episodes) == self.most:
            return False
        replies = [*game.replies, step.turn]
        reply = self._rendered(
            game.row, lambda: self.encoder.reply(game.prompt, replies, game.row["tools"])
        )
        ids = game.ids + episode.response + reply.ids
        if episode.response[-1] != reply.end or not self._fits(len(ids)):
            return False
        game.replies, game.ids = replies, ids
        return True

    def _fits(self, tokens: int) -> bool:
        """Whether an answer has room behind so many."""
        return self.context is None or tokens + self.max_new_tokens <= self.context

    def _rendered(self, row: Row, render: Callable[[], T]) -> T:
        """What a template makes of an environment's turn."""
        try:
            return render()
        except Rejected as error:
            problem = f"reward: {self.environments.name}: {error}, at {row['at']}"
            hint = "data.template names another template; or mend the environment's turn"
            raise UserError(problem, hint) from None
