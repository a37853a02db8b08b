"""Generate: answers to prompts, compared with references."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmpipe.data import examples
from llmpipe.data.examples import Tools
from llmpipe.data.formats import (
    Completion,
    Conversation,
    Example,
    Preference,
    prompt_and_reference,
)
from llmpipe.data.references import right_answers
from llmpipe.evaluation.book import Score, Scored
from llmpipe.evaluation.task import Ask, Item, OnItems, Place, Template, tools_of
from llmpipe.recipe.sections import Positive
from llmpipe.scores import pass_at, score
from llmpipe.scores.references import Comparison
from llmpipe.scores.thinking import answer_to
from llmpipe.scores.verifiers import VERIFIERS
from llmpipe.scores.verifiers.regex import check_pattern

if TYPE_CHECKING:
    from llmpipe.evaluation.candidate import Candidate

CORPUS = {"bleu", "chrf"}  # scores of all answers at once

PACKAGES = {name: check.package for name, check in VERIFIERS.items() if check.package}
PACKAGES |= {"rouge": "rouge_score", "bleu": "sacrebleu", "chrf": "sacrebleu"}

if TYPE_CHECKING:
    ScoreName = str
else:
    ScoreName = Literal[(*VERIFIERS, "rouge", "bleu", "chrf")]


class Prompt(Item):
    """What is asked, and the answer to compare with, or several of which any is right."""

    ask: Ask
    reference: str | list[str] | None = None
    tools: Tools = None

    @property
    def references(self) -> list[str]:
        if isinstance(self.reference, list):
            return self.reference
        return [] if self.reference is None else [self.reference]


class Generate(OnItems):
    shapes: ClassVar = (Conversation, Completion, examples.Prompt, Preference)
    item_type: ClassVar = Prompt

    task: Literal["generate"]
    """Answers to prompts, compared with references. The reference is the last assistant turn of a
    row, or what stands in a column `answer` beside a prompt: a text, or a list of which any is
    right."""
    max_new_tokens: Positive = 128
    """Longest answer in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token each time; above 0 answers are drawn, with the recipe's seed."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from this many likeliest tokens; 0 is all of them."""
    template: Template = "auto"
    """`auto`: the model's own chat template, the one it was trained with; `none`: prompts as bare
    text."""

    score: Annotated[list[ScoreName], Field(min_length=1)]
    """exact_match, contains, number (the one that the answer says, exactly: what a number is stands
    in llmpipe/scores/numbers.py), math_verify: against the reference; regex: the first match of
    `pattern` in the answer, its group against the reference; json: parses; rouge, bleu, chrf: the
    libraries' scores, bleu and chrf of the first answer to a prompt. Where the prompt ends in
    `<think>`, what follows `</think>` is scored, and nothing where that never came. A row whose
    reference no answer can equal is refused."""
    pattern: str | None = None
    """What `regex` looks for. With groups, what the first of them that took part in the match holds
    must equal the reference."""
    samples: Positive = 1
    """Answers per prompt, for pass@k."""
    pass_at: Annotated[list[Positive], Field(min_length=1)] = [1]
    """The k of pass@k, the chance that one of k answers is right: unbiased (Chen 2021, eq. 1)."""

    @model_validator(mode="after")
    def _fits(self) -> Generate:
        if self.samples > 1 and not self.temperature:
            raise ValueError("samples above 1 needs a temperature: greedy answers are all the same")
        check_pattern(self.pattern)
        if max(self.pass_at) > self.samples:
            raise ValueError(f"pass_at {max(self.pass_at)} needs as many samples")
        if ("regex" in self.score) != (self.pattern is not None):
            raise ValueError("score: regex and pattern go together")
        return self

    @property
    def packages(self) -> set[str]:
        return {PACKAGES[kind] for kind in self.score if kind in PACKAGES}

    def metrics(self, kind: str | None) -> set[str]:
        if kind == "reward-model":
            return set()
        named = set()
        for kind_of_score in self.score:
            if kind_of_score == "rouge":
                named |= {"rouge1", "rouge2", "rougeL"}
            elif self.samples > 1 and kind_of_score not in CORPUS:
                named |= {f"{kind_of_score}@{k}" for k in self.pass_at}
            else:
                named.add(kind_of_score)
        return named

    def item_of(self, row: Example, others: dict[str, Any], place: Place) -> Prompt:
        prompt, reference = prompt_and_reference(row)
        comparisons = [Comparison(kind, self.pattern) for kind in self.score]
        right = right_answers(reference, others, comparisons)
        return Prompt(
            **place._asdict(),
            ask=Ask.of(prompt, bare=self.template == "none" or _is_text(row)),
            **({"reference": right if len(right) > 1 else right[0]} if right else {}),
            **tools_of(row),
        )

    def score_batch(self, model: Candidate, batch: list[Prompt], seed: int) -> list[Scored]:
        from llmpipe.models.drawing.draw import Sampling

        sampling = Sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k)
        prompts = [model.prompt(item.ask, item.tools, item.at) for item in batch]
        ids = [model.ids(prompt, item.ask) for prompt, item in zip(prompts, batch, strict=True)]
        repeated = [prompt for prompt in ids for _ in range(self.samples)]
        responses = iter(model.responses(repeated, sampling, _seed_of(batch, seed)))
        scored = []
        for item, prompt in zip(batch, prompts, strict=True):
            drawn = [next(responses) for _ in range(self.samples)]
            answers = [response.text for response in drawn]
            shown = {
                "prompt": prompt,
                "reference": item.reference,
                "answers": answers,
                "ended": [response.ended for response in drawn],
            }
            said = [answer_to(prompt, answer) for answer in answers]
            scores = self._scores(said, item.references)
            corpus = [kind for kind in self.score if kind in CORPUS]
            scored.append(Scored(shown, scores, corpus))
        return scored

    def _scores(self, answers: list[str], references: list[str]) -> dict[str, Score]:
        """Of the answers to one prompt: pass@k of what is right or wrong, else the mean."""
        each: list[dict[str, float]] = []
        for answer in answers:
            scores: dict[str, float] = {}
            for kind in self.score:
                if kind not in CORPUS:
                    scores |= score(kind, answer, references, self.pattern)
            each.append(scores)
        if len(each) == 1:
            return dict(each[0])
        return {
            metric: value
            for name in each[0]
            for metric, value in self._over_samples(name, [one[name] for one in each]).items()
        }

    def _over_samples(self, name: str, values: list[float]) -> dict[str, float]:
        right_or_wrong = all(value in (0, 1) for value in values) and not name.startswith("rouge")
        if not right_or_wrong:
            return {name: sum(values) / len(values)}
        right = int(sum(values))
        return {f"{name}@{k}": pass_at(k, len(values), right) for k in self.pass_at}


def _is_text(row: Example) -> bool:
    """Whether a row is text to go on with, as in training."""
    texts = isinstance(row, Preference) and isinstance(row.chosen, str)
    return texts or isinstance(row, Completion)


def _seed_of(batch: list[Prompt], seed: int) -> int:
    """Answers are drawn from the seed and the batch itself, not from what was drawn before it."""
    content = f"{seed} {[item.id for item in batch]}"
    return int(sha256(content.encode()).hexdigest()[:8], 16)
