# python recipes/make_sums.py
"""Sums of two numbers with one or two digits each, whose every answer can be checked: ./sums/.
With `quickstart` behind it writes recipes/quickstart/, which has fewer of them.

form.jsonl        right answers to a few, for sft: what an answer looks like
pairs.jsonl       right and wrong answers to others, for dpo, and in ./sums/ for reward
far-pairs.jsonl   in recipes/quickstart/ the same with wrong answers that are far off, for reward
asks.jsonl        in ./sums/ the expressions of the pairs, once each with their answers, for ppo
test.jsonl        sums with their answers, and in ./sums/ test-pairs.jsonl with wrong ones beside

Learned, asked and tested expressions are others, and a + b is the same expression as b + a. Same
seed, same files.
"""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DIGITS = {1: range(1, 10), 2: range(10, 100)}
FAR = 30
Sum = tuple[int, int]
Rows = list[dict]


@dataclass(frozen=True)
class Sizes:
    """Expressions of each part, and wrong answers to each that has a pair."""

    form: int
    pairs: int
    test: int
    wrong: int


WHOLE, QUICK = Sizes(160, 2400, 500, 8), Sizes(160, 1600, 400, 1)


def expressions(rng: random.Random, sizes: Sizes) -> list[list[Sum]]:
    """The expressions of the three parts: both operands short, mixed, both long, in the same
    shares in each."""
    kinds = [(1, 1), (1, 2), (2, 2)]
    every = [
        sorted({tuple(sorted((a, b))) for a in DIGITS[i] for b in DIGITS[j]}) for i, j in kinds
    ]
    parts: list[list[Sum]] = [[], [], []]
    for kind, share in zip(every, (0.01, 0.25, 0.74), strict=True):
        rng.shuffle(kind)
        for part, size in zip(parts, (sizes.form, sizes.pairs, sizes.test), strict=True):
            count = round(size * share)
            part += [rng.sample(pair, 2) for pair in kind[:count]]
            del kind[:count]
    for part in parts:
        rng.shuffle(part)
    return parts


def slip(rng: random.Random, right: int) -> int:
    """Another number: three in four a slip (tens or ones too many or too few, digits swapped), else
    any sum."""
    slips = [right + step for step in (-20, -10, -10, 10, 10, 20, -2, -1, 1, 2)]
    slips.append(int(str(right)[::-1]))
    while True:
        number = rng.choice(slips) if rng.random() < 0.75 else rng.randrange(2, 199)
        if number != right and 2 <= number <= 198:
            return number


def far(rng: random.Random, right: int) -> int:
    """Any sum that is off by `FAR` or more."""
    return next(
        number for number in iter(lambda: rng.randrange(2, 199), None) if abs(number - right) >= FAR
    )


def several(draw: Callable[[], int], count: int) -> list[int]:
    """So many that differ."""
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        drawn[draw()] = None
    return list(drawn)


def turns(role: str, text: str) -> Rows:
    return [{"role": role, "content": text}]


def ask(a: int, b: int) -> Rows:
    return turns("user", f"What is {a} + {b}?")


def answered(part: list[Sum]) -> Rows:
    return [{"messages": ask(a, b) + turns("assistant", f"{a + b}")} for a, b in part]


def pairs(
    part: list[Sum], rng: random.Random, wrong: Callable[[random.Random, int], int], count: int
) -> Rows:
    """Each with so many answers that are wrong, beside the one that is right."""
    return [
        {
            "prompt": ask(a, b),
            "chosen": turns("assistant", f"{a + b}"),
            "rejected": turns("assistant", f"{number}"),
        }
        for a, b in part
        for number in several(lambda right=a + b: wrong(rng, right), count)
    ]


def rows(seed: int = 0) -> dict[str, Rows]:
    """The files of ./sums/ and their rows."""
    rng = random.Random(seed)
    form, train, test = expressions(rng, WHOLE)
    learned = pairs(train, rng, slip, WHOLE.wrong)
    rng.shuffle(learned)
    return {
        "form": answered(form),
        "pairs": learned,
        "asks": answered(train),
        "test": answered(test),
        "test-pairs": pairs(test, rng, slip, 1),
    }


def quick_rows(seed: int = 0) -> dict[str, Rows]:
    """The files of recipes/quickstart/ and their rows."""
    rng = random.Random(seed)
    form, train, test = expressions(rng, QUICK)
    return {
        "form": answered(form),
        "far-pairs": pairs(train, rng, far, QUICK.wrong),
        "pairs": pairs(train, rng, slip, QUICK.wrong),
        "test": answered(test),
    }


if __name__ == "__main__":
    quick = sys.argv[1:] == ["quickstart"]
    if sys.argv[1:] and not quick:
        sys.exit("python recipes/make_sums.py [quickstart]")
    folder = Path(__file__).with_name("quickstart") if quick else Path("sums")
    folder.mkdir(exist_ok=True)
    for name, part in (quick_rows() if quick else rows()).items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{folder}/{name}.jsonl: {len(part):,} rows")
