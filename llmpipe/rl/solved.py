"""The difficulty filter: which prompts the policy, before it learns, solves neither too rarely nor
too often.

    solved.jsonl    {"prompt": 17, "right": 3}, a line for each prompt, in their order

A first pass answers every prompt several times. Its lines are written as it goes, so that a run
that was stopped asks only what is left; once there are all, nobody asks again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpipe.errors import INTEGRITY, NUMERIC, Say, UserError
from llmpipe.files.json import json_object
from llmpipe.files.writing import cut_back, fsync, to_write
from llmpipe.parallel.world import World
from llmpipe.recipe.reinforcement import RLRecipe
from llmpipe.rl.rewards import Rewards, scored_together
from llmpipe.rl.sampling import Note, Sampler
from llmpipe.rl.seeds import Place, Use

FILE = "solved.jsonl"

Rows = Sequence[dict[str, Any]]


class Chosen(Sequence[dict[str, Any]]):
    """Some of the rows."""

    def __init__(self, rows: Rows, places: Sequence[int]):
        self.rows = rows
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: Any) -> Any:
        return self.rows[self.places[i]]


@dataclass(frozen=True)
class Pass:
    """What the first pass needs."""

    recipe: RLRecipe
    sampler: Sampler
    rewards: Rewards
    world: World
    file: Path
    say: Say
    note: Note

    def choose(self, rows: Rows, *, has_begun: bool) -> Rows:
        """The rows that are left. Collective. Raises UserError (3) where training `has_begun` and
        the file is not whole: the policy is another one by now; and (4) where none is left."""
        bounds = self.recipe.rollout.solved
        if bounds is None:
            return rows
        rights = self._known(len(rows))
        if has_begun and len(rights) < len(rows):
            problem = f"{self.file}: has {len(rights):,} of {len(rows):,} prompts"
            hint = "training has begun, and nobody can ask the policy of then; begin anew (--fresh)"
            raise UserError(problem, hint, INTEGRITY)
        if len(rights) < len(rows):
            self.say(
                f"solved: {len(rows):,} prompts are answered {self.recipe.rollout.tries} times"
            )
            for right in self._asked(rows, len(rights)):
                rights += right
        return self._left(rows, rights, bounds)

    def _left(self, rows: Rows, rights: list[int], bounds: Sequence[float]) -> Rows:
        low, high = bounds
        tries = self.recipe.rollout.tries
        rarely = sum(right < low * tries for right in rights)
        often = sum(right > high * tries for right in rights)
        places = [i for i, right in enumerate(rights) if low * tries <= right <= high * tries]
        counts = f"{rarely:,} of {len(rows):,} prompts too rarely, {often:,} too often"
        self.say(f"solved: {counts}; {len(places):,} are left")
        if not places:
            hint = "choose wider bounds in rollout.solved, or other prompts"
            raise UserError(f"rollout.solved: {counts}: none is left", hint, NUMERIC)
        return Chosen(rows, places)

    def _asked(self, rows: Rows, first: int) -> Iterator[list[int]]:
        """How often each prompt from `first` on was answered rightly, some at a time."""
        tries, world = self.recipe.rollout.tries, self.world
        at_once = max(1, self.recipe.launch.rollout_batch_size // tries) * world.size
        for begin in range(first, len(rows), at_once):
            places = range(begin, min(begin + at_once, len(rows)))
            mine = [place for place in places if place % world.size == world.rank]
            right = dict(zip(mine, self._right(rows, mine), strict=True))
            of_all = {place: n for part in world.gather(right) for place, n in part.items()}
            lines = [of_all[place] for place in places]
            self._write(begin, lines)
            self.note(places[-1] + 1, len(rows))
            yield lines

    def _right(self, rows: Rows, mine: Sequence[int]) -> list[int]:
        """How many answers to each of these prompts are right. Collective."""
        tries = self.recipe.rollout.tries
        asked = [rows[place] for place in mine for _ in range(tries)]
        numbers = [Place(Use.SOLVED, 0, place * tries + i) for place in mine for i in range(tries)]
        said = self.sampler.draw(asked, numbers, lambda *_: None)
        scores = scored_together(self.rewards, said, self.world)
        if not mine:
            return []
        which = next(i for i, source in enumerate(self.recipe.reward) if source.tells_right)
        right = [score == 1 for score in list(scores.by_source.values())[which]]
        return [sum(right[i : i + tries]) for i in range(0, len(right), tries)]

    def _write(self, begin: int, lines: Sequence[int]) -> None:
        if not self.world.is_first:
            return
        with to_write(self.file, "a") as file:
            for place, right in enumerate(lines, begin):
                file.write(json.dumps({"prompt": place, "right": right}) + "\n")
        fsync(self.file)

    def _known(self, count: int) -> list[int]:
        """What a pass before has written, less a line that it was stopped in. Collective."""
        rights, error = [], None
        if self.world.is_first and self.file.exists():
            try:
                rights = self._read(count)
            except UserError as problem:
                error = problem
        self.world.agree(error)
        return self.world.gather(rights)[0]

    def _read(self, count: int) -> list[int]:
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        cut_back(self.file, len(whole))
        rights: list[int] = []
        for number, line in enumerate(whole.splitlines()):
            record = json_object(line) or {}
            right = record.get("right")
            is_count = isinstance(right, int) and 0 <= right <= self.recipe.rollout.tries
            if record.get("prompt") != number or not is_count or number >= count:
                problem = f"{self.file}:{number + 1}: is not what was written there"
                raise UserError(problem, "begin anew (--fresh)", INTEGRITY)
            rights.append(int(record["right"]))
        return rights
