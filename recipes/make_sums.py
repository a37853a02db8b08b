# python recipes/make_sums.py
"""Writes ./sums/: sums of two numbers with one or two digits each, where every answer can be
checked.

form.jsonl       right answers to a few of them, for sft: what an answer looks like pairs.jsonl
right and wrong answers to others, for reward and dpo asks.jsonl       the expressions of the pairs,
once each with their answers, for ppo test.jsonl       sums with their answers, and test-pairs.jsonl
the same with wrong ones beside

Learned, asked and tested expressions are others, and a + b is the same expression as b + a. Same
seed, same files.
"""

import json
import random
from pathlib import Path

DIGITS = {1: range(1, 10), 2: range(10, 100)}
FORM, PAIRS, TEST, WRONG = (
    160,
    2400,
    500,
    8,
)  # expressions, and wrong answers for each that has a pair
Sum = tuple[int, int]


def expressions(rng: random.Random) -> list[list[Sum]]:
    """The expressions of the three parts: both operands short, mixed, both long, in the same
    shares in each."""
    kinds = [(1, 1), (1, 2), (2, 2)]
    every = [
        sorted({tuple(sorted((a, b))) for a in DIGITS[i] for b in DIGITS[j]}) for i, j in kinds
    ]
    parts: list[list[Sum]] = [[], [], []]
    for kind, share in zip(every, (0.01, 0.25, 0.74), strict=True):
        rng.shuffle(kind)
        for part, size in zip(parts, (FORM, PAIRS, TEST), strict=True):
            count = round(size * share)
            part += [rng.sample(found, 2) for found in kind[:count]]
            del kind[:count]
    for part in parts:
        rng.shuffle(part)
    return parts


def wrong(rng: random.Random, right: int, count: int) -> list[int]:
    """So many other numbers: three in four a slip (tens or ones too many or too few, digits
    swapped), else any sum."""
    found: dict[int, None] = {}
    while len(found) < count:
        slips = [right + step for step in (-20, -10, -10, 10, 10, 20, -2, -1, 1, 2)] + [
            int(str(right)[::-1])
        ]
        number = rng.choice(slips) if rng.random() < 0.75 else rng.randrange(2, 199)
        if number != right and 2 <= number <= 198:
            found[number] = None
    return list(found)


def turns(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def rows(seed: int = 0) -> dict[str, list[dict]]:
    """The files and their rows."""
    rng = random.Random(seed)
    form, train, test = expressions(rng)

    def ask(a: int, b: int) -> list[dict]:
        return turns("user", f"What is {a} + {b}?")

    def say(number: int) -> list[dict]:
        return turns("assistant", f"{number}")

    def answered(part: list[tuple[int, int]]) -> list[dict]:
        return [{"messages": ask(a, b) + say(a + b)} for a, b in part]

    def pairs(part: list[tuple[int, int]], count: int) -> list[dict]:
        return [
            {"prompt": ask(a, b), "chosen": say(a + b), "rejected": say(number)}
            for a, b in part
            for number in wrong(rng, a + b, count)
        ]

    several = pairs(train, WRONG)
    rng.shuffle(several)
    return {
        "form": answered(form),
        "pairs": several,
        "asks": answered(train),
        "test": answered(test),
        "test-pairs": pairs(test, 1),
    }


if __name__ == "__main__":
    folder = Path("sums")
    folder.mkdir(exist_ok=True)
    for name, found in rows().items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in found), encoding="utf-8"
        )
        print(f"{folder}/{name}.jsonl: {len(found):,} rows")
