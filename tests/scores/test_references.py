"""What answers are compared with, and references that no answer can equal."""

import math

import pytest

from llmpipe.scores.references import (
    Comparison,
    Missing,
    Unfit,
    from_column,
    references_of,
    unread,
)

CHOICE = r"Answer: ([A-D])"


@pytest.mark.parametrize(
    ("kind", "value", "texts"),
    [
        ("exact_match", "four", ["four"]),
        ("exact_match", " four\n", ["four"]),
        ("exact_match", 4, ["4"]),
        ("exact_match", ["4", "four"], ["4", "four"]),
        ("exact_match", [4, "four"], ["4", "four"]),
        ("number", 7.0, ["7.0"]),
        ("number", "3 + 4 = 7\n#### 7", ["3 + 4 = 7\n#### 7"]),
        ("number", ["five", "5"], ["five", "5"]),
        ("regex", "B", ["B"]),
        ("regex", ["B", "(B)"], ["B", "(B)"]),
        ("bleu", "中文", ["中文"]),
        ("rouge", "Ä 1", ["Ä 1"]),
        ("math_verify", "\\text{(A)}", ["\\text{(A)}"]),
        ("json", "text", ["text"]),
        ("json", True, []),
        ("json", None, []),
    ],
)
def test_references_are_texts_of_which_any_is_right(kind, value, texts):
    pattern = CHOICE if kind == "regex" else None
    assert references_of(value, [Comparison(kind, pattern)]) == texts


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        ("exact_match", True, "true is no text"),
        ("contains", False, "false is no text"),
        ("number", True, "true is no text"),
        ("exact_match", 7.0, "7.0 is a number, and exact_match compares texts"),
        ("rouge", 7.5, "7.5 is a number"),
        ("number", math.nan, "nan is no finite number"),
        ("number", "none", "'none' says no number"),
        ("number", "five", "'five' says no number"),
        ("number", "3,14", "'3,14' says no number"),
        ("number", ["five", "six"], "'five' says no number"),
        ("exact_match", [], "the list of right answers is empty"),
        ("contains", ["4", ""], "a right answer is empty"),
        ("contains", ["4", " "], "a right answer is empty"),
        ("exact_match", ["4", None], "a right answer is null"),
        ("exact_match", [["4"]], "a right answer is a list"),
        ("exact_match", {"answer": "4"}, "a right answer is an object"),
        ("regex", "Answer: B", "'Answer: B' is nothing that the group of the pattern"),
        ("regex", "E", "'E' is nothing that the group of the pattern"),
        ("rouge", "中文", "'中文' has no letter from a to z and no digit"),
        ("math_verify", "hello", "'hello' is nothing that math-verify can read"),
    ],
)
def test_what_no_answer_can_equal_is_refused(kind, value, problem):
    with pytest.raises(Unfit) as refused:
        references_of(value, [Comparison(kind, CHOICE if kind == "regex" else None)])
    assert problem in str(refused.value)


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_a_reference_is_needed_where_something_compares(value):
    with pytest.raises(Missing, match="no answer to compare with"):
        references_of(value, [Comparison("json"), Comparison("exact_match")])


def test_each_comparison_needs_a_reference_that_serves_it():
    both = [Comparison("exact_match"), Comparison("number")]
    assert references_of(["five", "5"], both) == ["five", "5"]
    with pytest.raises(Unfit, match="says no number"):
        references_of("five", both)
    with pytest.raises(Unfit, match="exact_match compares texts"):
        references_of(7.0, both)


@pytest.mark.parametrize(
    ("pattern", "reference", "can_hold"),
    [
        (r"(\d+)", "42", True),
        (r"(\d+)", "4 2", False),
        (r"A: (\w+)|B: (\w+)", "yes", True),
        (r"A: (\d+)|B: ([a-z]+)", "yes", True),
        (r"A: (\d+)|B: ([a-z]+)", "Yes", False),
        (r"(?i)A: (\d+)|B: ([a-z]+)", "Yes", True),
        (r"(?:is )(?P<it>\d+)", "42", True),
        (r"(?:is )(?P<it>\d+)", "is 42", False),
        (r"is(\s\w+)", "yes", True),
        (r"((yes|no), (sir))", "yes, sir", True),
        (r"((yes|no), (sir))", "sir", False),
        (r"[(](\w+)[)]", "x", True),
        (r"\((\w+)\)", "(x)", False),
        (r"([)]+)", ")", True),
        (r"(.+)", "two\nlines", False),
        (r"(?s)(.+)", "two\nlines", True),
        # what groups hold cannot be told from these
        (r"(\w)\1", "anything at all", True),
        (r"(\d+)(?= km)", "x", True),
        (r"(?i:(a))", "A", True),
    ],
)
def test_what_a_group_can_hold(pattern, reference, can_hold):
    problem = Comparison("regex", pattern).refuses(reference)
    assert (problem is None) == can_hold


def test_a_column_holds_a_text_or_a_list_also_as_json():
    assert from_column("four") == "four"
    assert from_column(["4", "four"]) == ["4", "four"]
    assert from_column('["4", "four"]') == ["4", "four"]
    assert from_column("[1, 2]") == "[1, 2]"  # an answer that is a list of numbers
    assert from_column("[x]") == "[x]"
    with pytest.raises(Unfit, match="write it as JSON"):
        from_column("['4', 'four']")


def test_a_reference_that_nothing_reads():
    without_group = Comparison("regex", "yes|no")
    assert unread("yes", [without_group])
    assert unread("yes", [without_group, Comparison("json")])
    assert not unread(None, [without_group])
    assert not unread("yes", [without_group, Comparison("contains")])
    assert not unread("yes", [Comparison("regex", "(yes|no)")])
    assert not unread("yes", [Comparison("json")])
