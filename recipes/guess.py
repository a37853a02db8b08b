# python recipes/guess.py
"""Writes ./guess/ and holds the game of recipes/guess.yaml: a number from 1 to 7 is to be found in
three guesses, each of which is answered by "Higher." or "Lower.".

form.jsonl   games in which somebody guesses blindly, for sft
asks.jsonl   games to be played, for grpo
test.jsonl   others, held out

Same seed, same files.
"""

import json
import random
from pathlib import Path

MOST, GUESSES = 7, 3
PARTS = {"form": 400, "asks": 640, "test": 35}


class Guess:
    """1 for the number in time; nothing for any other answer."""

    def reset(self, row: dict) -> None:
        self.secret = row["secret"]
        self.guesses = 0

    def step(self, answer: str) -> tuple[str | None, float, bool]:
        self.guesses += 1
        if answer.strip() == str(self.secret):
            return None, 1.0, True
        return reply(answer, self.secret), 0.0, self.guesses == GUESSES


def reply(answer: str, secret: int) -> str:
    if not answer.strip().isdecimal():
        return f"A number from 1 to {MOST}."
    return "Higher." if int(answer) < secret else "Lower."


def question(number: int) -> dict:
    return {"role": "user", "content": f"Game {number}: a number from 1 to {MOST}?"}


def blind(number: int, secret: int, rng: random.Random) -> list[dict]:
    """A game whose guesses know nothing of what was said."""
    turns = [question(number)]
    for guess in rng.choices(range(1, MOST + 1), k=GUESSES):
        turns.append({"role": "assistant", "content": str(guess)})
        if guess == secret:
            break
        turns.append({"role": "user", "content": reply(str(guess), secret)})
    return turns if turns[-1]["role"] == "assistant" else turns[:-1]


if __name__ == "__main__":
    folder = Path("guess")
    folder.mkdir(exist_ok=True)
    rng, number = random.Random(0), 0
    for part, count in PARTS.items():
        rows = []
        for place in range(count):
            number += 1
            secret = place % MOST + 1
            row = {"prompt": [question(number)], "secret": secret}
            rows.append({"messages": blind(number, secret, rng)} if part == "form" else row)
        lines = "".join(json.dumps(each) + "\n" for each in rows)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{folder}/{part}.jsonl: {count} rows")
