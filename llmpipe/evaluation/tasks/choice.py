"""Multiple choice: which of several answers a model finds likeliest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmpipe.data.examples import Tools
from llmpipe.data.formats import Example, MultipleChoice
from llmpipe.evaluation.book import Scored
from llmpipe.evaluation.task import (
    Ask,
    Item,
    Marked,
    OnItems,
    Place,
    Template,
    check_scored,
    tools_of,
)

if TYPE_CHECKING:
    from llmpipe.evaluation.candidate import Candidate


class Question(Item):
    """A question, its choices, and which of them is right."""

    ask: Ask
    choices: list[str]
    answer: int
    tools: Tools = None


class Choice(OnItems):
    shapes: ClassVar = (MultipleChoice,)
    item_type: ClassVar = Question

    task: Literal["choice"]
    """Multiple choice by log-likelihood: accuracy by the sum, and by the sum per character
    (lm-eval's acc_norm)."""
    template: Template = "auto"
    """`auto`: the question as a user's turn, the choice as the answer; `none`: question, space,
    choice."""

    def metrics(self, kind: str | None) -> set[str]:
        return set() if kind == "reward-model" else {"acc", "acc_norm"}

    def item_of(self, row: Example, others: dict[str, Any], place: Place) -> Question:
        assert isinstance(row, MultipleChoice)  # as its format has it
        return Question(
            **place._asdict(),
            ask=Ask.of(row.prompt, bare=self.template == "none"),
            choices=row.choices,
            answer=row.answer,
            **tools_of(row),
        )

    def score_batch(self, model: Candidate, batch: list[Question], seed: int) -> list[Scored]:
        prompts = [model.prompt(item.ask, item.tools, item.at) for item in batch]
        sequences = [
            _continued(model, item, prompt, choice)
            for item, prompt in zip(batch, prompts, strict=True)
            for choice in item.choices
        ]
        sums = iter(model.log_probs(sequences))
        return [
            _scored(item, prompt, [next(sums).log_prob for _ in item.choices])
            for item, prompt in zip(batch, prompts, strict=True)
        ]


def _continued(model: Candidate, item: Question, context: str, choice: str) -> Marked:
    """Context and choice as one sequence, the choice marked.

    White space at the end of the context belongs to the choice, as in lm-evaluation-harness: a
    token may hold both.
    """
    if model.sees_text(item.ask):
        choice = " " + choice
    bare = context.rstrip()
    before = model.ids(bare, item.ask)
    sequence = Marked.after(model.ids(context + choice, item.ask), len(before))
    check_scored(sequence, item.at, model.label)  # nothing would be likelier than any choice
    return sequence


def _scored(item: Question, prompt: str, log_probs: list[float]) -> Scored:
    """`log_probs`: the sum over each choice's tokens."""
    pairs = zip(log_probs, item.choices, strict=True)
    per_character = [log_prob / len(choice) for log_prob, choice in pairs]
    likeliest = log_probs.index(max(log_probs))
    likeliest_per_character = per_character.index(max(per_character))
    shown = {
        "prompt": prompt,
        "choices": item.choices,
        "reference": item.choices[item.answer],
        "answers": [item.choices[likeliest]],
        "log_probs": log_probs,
    }
    scores = {
        "acc": float(likeliest == item.answer),
        "acc_norm": float(likeliest_per_character == item.answer),
    }
    return Scored(shown, scores)
