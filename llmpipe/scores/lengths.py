"""Scores of an answer's length."""

from __future__ import annotations


def near_target(length: int, target: int) -> float:
    """1 at the target, and less by the share of it that is missing or too much; never below 0."""
    return max(0.0, 1 - abs(length - target) / target)


def within_limit(length: int, limit: int) -> float:
    """1 up to the limit, and less by the share of it that is too much; never below 0."""
    return near_target(max(length, limit), limit)
