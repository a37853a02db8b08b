# python recipes/sentiment.py
"""Writes ./sentiment/prompts.jsonl, 144 beginnings of sentences that are neither good nor bad news,
and holds the reward of recipes/sentiment.yaml: how positive VADER finds what the model goes on with
(Hutto 2014), -1 to 1.
"""

import json
from pathlib import Path

WHO = [
    "The teacher",
    "My neighbour",
    "The driver",
    "A student",
    "The painter",
    "Our manager",
    "The tourist",
    "Her cousin",
    "The nurse",
    "A farmer",
    "The clerk",
    "His brother",
]
DID = [
    "opened the letter and",
    "walked into the room and",
    "looked at the table and",
    "read the report, which",
    "came back from the meeting and",
    "picked up the phone and",
    "sat down at the window and",
    "turned the page and",
    "waited for the bus and",
    "wrote to the office that",
    "answered the question and",
    "put the box down and",
]


def positive(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """VADER's compound score of each completion."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    judge = SentimentIntensityAnalyzer()
    return [judge.polarity_scores(text)["compound"] for text in completions]


if __name__ == "__main__":
    folder = Path("sentiment")
    folder.mkdir(exist_ok=True)
    rows = [{"prompt": f"{who} {did}"} for who in WHO for did in DID]
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    print(f"{folder}/prompts.jsonl: {len(rows)} prompts")
