"""What the numbers of an evaluation are called, in which unit, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass, replace

PERCENT = "%"


@dataclass(frozen=True)
class Measure:
    """A metric in words."""

    title: str
    unit: str = ""
    higher_is_better: bool | None = None
    """None: nothing says so, and neither does llmpipe."""
    is_headline: bool = True
    """Whether it stands on the scoreboard; what says the same in another unit does not."""

    @property
    def factor(self) -> int:
        """From the number that is recorded to the one that is shown."""
        return 100 if self.unit == PERCENT else 1

    @property
    def unit_of_differences(self) -> str:
        return "points" if self.unit == PERCENT else self.unit

    @property
    def direction(self) -> str:
        if self.higher_is_better is None:
            return ""
        return "higher is better" if self.higher_is_better else "lower is better"


def _share(title: str, *, is_headline: bool = True) -> Measure:
    return Measure(title, PERCENT, higher_is_better=True, is_headline=is_headline)


KNOWN = {
    "exact_match": _share("exact match"),
    "contains": _share("contains the answer"),
    "number": _share("right number"),
    "math_verify": _share("equal in mathematics"),
    "regex": _share("pattern matches"),
    "json": _share("valid JSON"),
    "acc": _share("right choice"),
    "acc_norm": _share("right choice, by length"),
    "accuracy": _share("pairs right, by reward"),
    "accuracy_sum": _share("pairs right"),
    "accuracy_mean": _share("pairs right, by token", is_headline=False),
    "rouge1": Measure("ROUGE-1", higher_is_better=True, is_headline=False),
    "rouge2": Measure("ROUGE-2", higher_is_better=True, is_headline=False),
    "rougeL": Measure("ROUGE-L", higher_is_better=True),
    "bleu": Measure("BLEU", "of 100", higher_is_better=True),
    "chrf": Measure("chrF", "of 100", higher_is_better=True),
    "perplexity": Measure("perplexity", higher_is_better=False),
    "nats_per_token": Measure("loss", "nats per token", higher_is_better=False, is_headline=False),
    "bits_per_byte": Measure("loss", "bits per byte", higher_is_better=False, is_headline=False),
    "word_perplexity": Measure("perplexity of words", higher_is_better=False),
    "byte_perplexity": Measure("perplexity of bytes", higher_is_better=False, is_headline=False),
}


def measure(metric: str) -> Measure:
    """A metric of results.json in words; one of a library is known by a part of its name.

    `exact_match@4` is the chance that one of four answers is right, `arc_easy.acc_norm` and
    `exact_match.strict` are lm-evaluation-harness's.
    """
    name, _, k = metric.partition("@")
    if name in KNOWN:
        known = KNOWN[name]
        return replace(known, title=f"{known.title}, one of {k}") if k else known
    named = next((KNOWN[part] for part in metric.split(".") if part in KNOWN), Measure(""))
    return replace(named, title=metric.replace("_", " "))
