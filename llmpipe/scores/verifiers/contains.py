"""`contains`: the reference stands somewhere in the answer, letter by letter, also in a word."""

from llmpipe.scores.check import Check, always


def is_right(answer: str, reference: str, pattern: str) -> bool:
    return reference.strip() in answer


CHECK = Check(is_right, always)
