"""Preference: which of two answers a model ranks first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmpipe.data import examples
from llmpipe.data.examples import Tools
from llmpipe.data.formats import Example, Rejected
from llmpipe.data.judged import answer
from llmpipe.errors import NUMERIC, UserError
from llmpipe.evaluation.book import Scored
from llmpipe.evaluation.task import Answer, Ask, Item, OnItems, Place, check_scored, tools_of

if TYPE_CHECKING:
    from llmpipe.data.encode import Answered
    from llmpipe.evaluation.candidate import Candidate


class Pair(Item):
    """A question with two answers."""

    ask: Ask
    chosen: Answer
    rejected: Answer
    tools: Tools = None


class Preference(OnItems):
    for_reward_models: ClassVar = True
    shapes: ClassVar = (examples.Preference,)
    item_type: ClassVar = Pair

    task: Literal["preference"]
    """Pairs: how often the chosen answer is ranked first, by a reward model's score, or by a
    policy's summed and mean log-probability."""

    def metrics(self, kind: str | None) -> set[str]:
        of_rewards, of_policies = {"accuracy"}, {"accuracy_sum", "accuracy_mean"}
        if kind is None:
            return of_rewards | of_policies
        return of_rewards if kind == "reward-model" else of_policies

    def item_of(self, row: Example, others: dict[str, Any], place: Place) -> Pair:
        assert isinstance(row, examples.Preference)  # as its format has it
        return Pair(
            **place._asdict(),
            ask=Ask.of(row.prompt, bare=isinstance(row.chosen, str)),
            chosen=row.chosen,
            rejected=row.rejected,
            **tools_of(row),
        )

    def score_batch(self, model: Candidate, batch: list[Pair], seed: int) -> list[Scored]:
        measure = _rewards if model.ranks else _log_probs
        scored = []
        for item, values in zip(batch, measure(model, batch), strict=True):
            shown = {
                "prompt": model.prompt(item.ask, item.tools, item.at),
                "chosen": _text(_read(model, item.chosen)),
                "rejected": _text(_read(model, item.rejected)),
                "values": values,
            }
            scores = {metric: _ranked_first(*pair) for metric, pair in values.items()}
            scored.append(Scored(shown, scores))
        return scored


Values = dict[str, tuple[float, float]]  # of the chosen and of the rejected answer, by metric


def _rewards(model: Candidate, batch: list[Pair]) -> list[Values]:
    """A reward model's scores. Raises UserError (4) where one is not finite: it would rank no
    answer first, and count as a wrong choice."""
    rewards = model.rewards([answered.ids for answered in _answered(model, batch)])
    pairs = zip(rewards[::2], rewards[1::2], strict=True)
    values: list[Values] = [{"accuracy": pair} for pair in pairs]
    for item, value in zip(batch, values, strict=True):
        if not all(map(math.isfinite, value["accuracy"])):
            problem = f"{item.at}: {model.label}: a reward is not finite"
            raise UserError(problem, "the model is broken", NUMERIC)
    return values


def _log_probs(model: Candidate, batch: list[Pair]) -> list[Values]:
    """A policy's log-probabilities of the answers, summed and per token."""
    asked = [item for item in batch for _ in ("chosen", "rejected")]
    marked = [
        model.answer_marked(item.ask, item.tools, answered, item.at)
        for item, answered in zip(asked, _answered(model, batch), strict=True)
    ]
    for item, sequence in zip(asked, marked, strict=True):
        check_scored(sequence, item.at, model.label)
    sums = iter(model.log_probs(marked))
    values: list[Values] = []
    for _ in batch:
        chosen, rejected = next(sums), next(sums)
        values.append(
            {
                "accuracy_sum": (chosen.log_prob, rejected.log_prob),
                "accuracy_mean": (chosen.mean, rejected.mean),
            }
        )
    return values


def _answered(model: Candidate, batch: list[Pair]) -> list[Answered]:
    """Each question with its chosen and with its rejected answer, one after the other."""
    sequences = []
    for item in batch:
        try:
            sequences += [
                model.answered(item.ask, item.tools, _read(model, item.chosen)),
                model.answered(item.ask, item.tools, _read(model, item.rejected)),
            ]
        except Rejected as error:
            raise UserError(f"{item.at}: {model.label}: {error}") from None
    return sequences


def _read(model: Candidate, given: Answer) -> Answer:
    """What a model reads of an answer: a reward model what a judge sees."""
    return answer(given) if model.ranks else given


def _ranked_first(chosen: float, rejected: float) -> float:
    """1 where the chosen answer is ranked first, a half where the two are equal."""
    return float(chosen > rejected) + 0.5 * (chosen == rejected)


def _text(answer: Answer) -> str:
    return answer if isinstance(answer, str) else "\n\n".join(turn["content"] for turn in answer)
