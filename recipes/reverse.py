# python recipes/reverse.py
"""Writes ./reverse/: names of three to five made-up syllables, letter by letter, and the same from
behind. Holds the reward of recipes/reverse.yaml: how much of the right answer is in an answer.

form.jsonl   names with their reversals, for sft
asks.jsonl   other names, for grpo
test.jsonl   others again

Same seed, same files.
"""

import itertools
import json
import random
from pathlib import Path

SYLLABLES = ["".join(both) for both in itertools.product("bdfgklmnprstvz", "aeiou")]
PARTS = {"form": 320, "asks": 640, "test": 400}


def names(rng: random.Random, count: int) -> list[str]:
    """So many that differ, of six to ten letters."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn["".join(rng.choices(SYLLABLES, k=rng.choice((3, 4, 5))))] = None
    return list(drawn)


def row(name: str) -> dict:
    turns = (("user", f"Reverse: {' '.join(name)}"), ("assistant", " ".join(reversed(name))))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def subsequence(
    prompts: list[str], completions: list[str], reference: list[str], **_: object
) -> list[float]:
    """The longest common subsequence of letters of each answer and the right one, twice its length
    by the length of both: 1 for the right answer, 0 for one without any of its letters."""
    pairs = zip(completions, reference, strict=True)
    return [common("".join(answer.split()), "".join(right.split())) for answer, right in pairs]


def common(answer: str, right: str) -> float:
    lengths = [0] * (len(right) + 1)  # of the letters of the answer so far, with each beginning
    for letter in answer:
        before = list(lengths)
        for i, other in enumerate(right):
            lengths[i + 1] = before[i] + 1 if letter == other else max(before[i + 1], lengths[i])
    return 2 * lengths[-1] / (len(answer) + len(right))


if __name__ == "__main__":
    folder = Path("reverse")
    folder.mkdir(exist_ok=True)
    every = iter(names(random.Random(0), sum(PARTS.values())))
    for part, count in PARTS.items():
        rows = [row(name) for name in itertools.islice(every, count)]
        lines = "".join(json.dumps(each) + "\n" for each in rows)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{folder}/{part}.jsonl: {count} rows")
