"""Which of a prompt's answers are learned from, and as what rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmpipe.recipe.sample import SampleRecipe

Row = dict[str, Any]

REPLACEMENT = "\ufffd"
"""What stands in a text for bytes that are no character."""

UNFINISHED = "no answer ended"
NO_TEXT = "no answer that ended is a text"
TOO_LOW = "no answer scores at_least"
ALIKE = "answers score alike"
REASONS = (UNFINISHED, NO_TEXT, TOO_LOW, ALIKE)
"""Why nothing is learned from a prompt."""


@dataclass(frozen=True)
class Asked:
    """A prompt, as rows and samples.jsonl have it."""

    prompt: Any
    """A text or turns."""
    tools: Any = None
    opening: str = ""
    """Where its template opens a block of thought, or the recipe has it do so: the tag, which the
    model did not say and which a row has to have in front of what it said."""

    @property
    def columns(self) -> Row:
        """Of each row that is made of it."""
        return {"prompt": self.prompt} | ({"tools": self.tools} if self.tools else {})

    @property
    def shown(self) -> Row:
        """In samples.jsonl."""
        return self.columns | ({"opening": self.opening} if self.opening else {})

    def answered(self, text: str) -> Any:
        """An answer beside it, as a row has it."""
        text = self.opening + text
        return text if isinstance(self.prompt, str) else [{"role": "assistant", "content": text}]


@dataclass(frozen=True)
class Sample:
    """One answer to a prompt, as samples.jsonl has it."""

    text: str
    """As a person reads it."""
    score: float
    """The weighted sum."""
    scores: dict[str, float]
    """Every source's own score, before its weight."""
    tokens: int
    """With the one that ended it."""
    ended: bool
    """Whether a token ended it, and not the limit."""
    whole: bool = True
    """Whether the text has all of it; it leaves out special tokens."""

    @property
    def is_text(self) -> bool:
        """Whether it says something, all of which is characters: tokens may end within one, or
        stand for none."""
        return self.whole and bool(self.text.strip()) and REPLACEMENT not in self.text


@dataclass(frozen=True)
class Outcome:
    """What became of a prompt."""

    rows: list[Row]
    without: str | None = None
    """Why there is no row: one of `REASONS`."""


def outcome(recipe: SampleRecipe, asked: Asked, answers: Sequence[Sample]) -> Outcome:
    """The rows that a prompt's answers become.

    An answer that never ended would be learned with an end that it did not have, and one that is
    no text as other tokens than were drawn: neither takes part. Of equal texts the first one
    counts, and so it does of equal scores.
    """
    ended = [answer for answer in answers if answer.ended]
    if not ended:
        return Outcome([], UNFINISHED)
    texts = {answer.text: answer for answer in reversed(ended) if answer.is_text}
    if not texts:
        return Outcome([], NO_TEXT)
    candidates = list(reversed(texts.values()))
    best = max(candidates, key=lambda answer: answer.score)
    worst = min(candidates, key=lambda answer: answer.score)
    least = best.score if recipe.at_least is None else recipe.at_least
    if best.score < least:
        return Outcome([], TOO_LOW)

    if recipe.write == "pairs":
        if best.score == worst.score:
            return Outcome([], ALIKE)
        pair = {"chosen": asked.answered(best.text), "rejected": asked.answered(worst.text)}
        return Outcome([asked.columns | pair])
    learned = [best]
    if recipe.write == "accepted":
        learned = [answer for answer in candidates if answer.score >= least]
    return Outcome(
        [asked.columns | {"completion": asked.answered(answer.text)} for answer in learned]
    )


@dataclass
class Tally:
    """What there is to say of all prompts."""

    prompts: int = 0
    answers: int = 0
    ended: int = 0
    no_text: int = 0
    """Of those that ended."""
    rows: int = 0
    spread: int = 0
    """Prompts whose answers do not all score alike."""
    solved: int = 0
    """Prompts with a right answer."""
    right: int = 0
    """Answers that are right."""
    score: float = 0.0
    """The sum over answers."""
    best: float = 0.0
    """The sum over prompts of their highest score."""
    worst: float = 0.0

    def add(self, answers: Sequence[Sample], rows: int, teller: str | None) -> None:
        """A prompt's answers, of which so many rows came; `teller`: which source of reward says by
        a 1 what is right."""
        totals = [answer.score for answer in answers]
        right = sum(teller is not None and answer.scores[teller] == 1 for answer in answers)
        self.prompts += 1
        self.answers += len(answers)
        self.ended += sum(answer.ended for answer in answers)
        self.no_text += sum(answer.ended and not answer.is_text for answer in answers)
        self.rows += rows
        self.spread += max(totals) > min(totals)
        self.solved += right > 0
        self.right += right
        self.score += sum(totals)
        self.best += max(totals)
        self.worst += min(totals)

    def final(self, teller: str | None) -> dict[str, Any]:
        """As the manifest has it: counts, and means and shares."""
        counts = asdict(self)
        names = ("prompts", "answers", "rows", "ended", "no_text")
        final: dict[str, Any] = {name: counts[name] for name in names}
        final |= {"spread": self.spread / self.prompts}
        if teller is not None:
            final |= {"solved": self.solved / self.prompts, "right": self.right / self.answers}
        return final | {
            "score": self.score / self.answers,
            "score_best": self.best / self.prompts,
            "score_worst": self.worst / self.prompts,
        }
