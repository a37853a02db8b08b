"""Thousands of wrong recipes and files of rows, through the command itself: each ends with a line
and the right exit code, and soon. Which ones is decided by their numbers, so that a case is found
again: `mutants.recipe("recipe 1234")`.
"""

import os

import pytest

from llmpipe.errors import RESOURCES
from tests import attempts, mutant_files, mutants

FULL = os.environ.get("FAULTS") == "full"
BATCH = 50


def batches(few: int, faults: int, full: int):
    """Numbers of cases in batches: the first in every run of the suite, more of them in `faults`,
    all of them nightly."""
    count = full if FULL else faults
    parts = [range(i, i + BATCH) for i in range(few, count, BATCH)]  # the last as whole as any
    return [range(few), *(pytest.param(part, marks=pytest.mark.faults) for part in parts)]


def check(ends: list[attempts.End], least: float, most: float) -> None:
    """Nothing ended as no command may; and some share was taken, and some refused."""
    assert not attempts.problems(ends)
    codes = attempts.by_code(ends)
    print(codes)
    assert least <= codes.get(0, 0) / len(ends) <= most, codes


@pytest.mark.parametrize("mutant", [mutants.recipe, mutants.trained, mutant_files.rows_file])
def test_a_mutant_is_decided_by_its_number_alone(mutant):
    """Whatever was made before it: what two share, the first would change for the second."""
    numbers = range(100)
    first = {number: mutant(f"case {number}") for number in numbers}
    for number in reversed(numbers):
        assert mutant(f"case {number}") == first[number], number


@pytest.mark.parametrize("numbers", batches(40, 1000, 5000), ids=str)
def test_mutated_recipes(tmp_path, numbers):
    """As far as the first step of the training: rows are read and tokenized where that is left."""
    cases = [mutants.recipe(f"recipe {number}") for number in numbers]
    check(attempts.attempts(cases, tmp_path), 0.01, 0.6)


@pytest.mark.parametrize("numbers", batches(25, 400, 2000), ids=str)
def test_mutated_rows(tmp_path, numbers):
    """No machine is too small for a dozen rows: what asks for more memory is damaged."""
    cases = [mutant_files.rows_file(f"rows_file {number}") for number in numbers]
    ends = attempts.attempts(cases, tmp_path)
    check(ends, 0.05, 0.95)
    assert not [f"{end.name}\n{end.text}" for end in ends if end.code == RESOURCES]


@pytest.mark.parametrize("numbers", batches(3, 100, 400), ids=str)
def test_nearly_valid_recipes_train(tmp_path, numbers):
    """One step, with a value or two that nobody would choose."""
    cases = [mutants.trained(f"trained {number}") for number in numbers]
    check(attempts.attempts(cases, tmp_path, 60), 0.1, 1.0)
