"""How many episodes a training pass holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmpipe.models.hardware import Hardware
from llmpipe.recipe.reinforcement import RolloutLaunch
from llmpipe.run.machine import full_pass

AUTO = re.compile(r"auto \(([0-9,]+) tokens\)")

EAGER = 2048  # tokens of a pass whose scores are heads x tokens x tokens


@dataclass(frozen=True)
class PassSize:
    """So many episodes, or as many as their tokens fill."""

    episodes: int
    tokens: int | None
    """None: `episodes` decides."""

    @classmethod
    def of(cls, launch: RolloutLaunch, hardware: Hardware, before: Any = None) -> PassSize:
        """`before`: `in_checkpoint` of the one that is gone on from, which decides `auto`."""
        if launch.micro_batch_size != "auto":
            return cls(hardware.micro_batch_size, None)
        if kept := AUTO.fullmatch(str(before)):
            return cls(hardware.micro_batch_size, int(kept[1].replace(",", "")))
        on_gpu = hardware.device == "cuda"
        eager = on_gpu and hardware.attention == "eager"
        return cls(hardware.micro_batch_size, EAGER if eager else full_pass(on_gpu))

    @property
    def words(self) -> str:
        return f"{self.tokens:,} tokens" if self.tokens else f"{self.episodes} episodes"

    @property
    def in_checkpoint(self) -> int | str:
        """What a checkpoint says of it."""
        return f"auto ({self.words})" if self.tokens else self.episodes

    def halved(self, longest: int) -> PassSize | None:
        """Half of its tokens; None where it holds no more than one episode, of `longest` tokens."""
        if not self.tokens or self.tokens < 2 * longest:
            return None
        return PassSize(self.episodes, self.tokens // 2)

    def cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """Places of episodes with these many tokens, those of a pass together: each once, those of
        like length together, and one that is too long alone."""
        most = self.tokens or self.episodes
        passes: list[list[int]] = []
        filled = most
        for length, place in sorted((length, place) for place, length in enumerate(lengths)):
            cost = length if self.tokens else 1
            if filled + cost > most:
                passes.append([])
                filled = 0
            passes[-1].append(place)
            filled += cost
        return passes
