"""`exact_match`: the answer is the reference, but for white space around it."""

from llmpipe.scores.check import Check, always


def is_right(answer: str, reference: str, pattern: str) -> bool:
    return answer.strip() == reference.strip()


CHECK = Check(is_right, always)
