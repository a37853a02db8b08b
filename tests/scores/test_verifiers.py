"""What is right by each verifier, and the scores of libraries, also with several references."""

from pathlib import Path

import pytest

from llmpipe.scores import score, verifiers
from llmpipe.scores.verifiers import VERIFIERS


@pytest.mark.parametrize(
    ("kind", "answer", "references", "right"),
    [
        ("exact_match", " 4 \n", ["4"], 1),
        ("exact_match", "4.", ["4"], 0),
        ("exact_match", "", ["4"], 0),
        ("exact_match", "four", ["4", "four"], 1),
        ("exact_match", "five", ["4", "four"], 0),
        ("contains", "It is 4.", ["4"], 1),
        ("contains", "five", ["4"], 0),
        ("contains", "It is four.", ["4", "four"], 1),
        ("number", "so 1,234.5 in all", ["1234.5"], 1),
        ("number", "a half", ["0.5", "1/2"], 0),
        ("number", "5", ["five", "5"], 1),
        ("math_verify", "$\\frac{1}{2}$", ["$0.5$"], 1),
        ("math_verify", "$2$", ["$3$"], 0),
        ("math_verify", "$2$", ["$3$", "$2$"], 1),
        ("math_verify", "$2$", ["2\\pi"], 0),  # without delimiters it is LaTeX all the same
        ("math_verify", "$2\\pi$", ["2\\pi"], 1),
        ("math_verify", "$x^2$", ["x^2"], 1),
        ("math_verify", "", ["$2$"], 0),
    ],
)
def test_scores_of_one_answer(kind, answer, references, right):
    assert score(kind, answer, references) == {kind: float(right)}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"a": [1, -2.5e3, null, true]}', 1),
        ('```json\n{"a": [1]}\n```', 1),
        ("```\n[]\n```\n", 1),
        ("  7  ", 1),
        ("9" * 5000, 1),  # more digits than Python converts
        ("{a: 1}", 0),
        ("NaN", 0),
        ('{"a": Infinity}', 0),
        ("[-Infinity]", 0),
        ("", 0),
        ("```json\n```", 0),
        ("```python\n[]\n```", 0),
        ("```", 0),
        ('{"a": 1} and more', 0),
        ("[" * 100_000, 0),
        ("```" + "\n" * 1_000_000, 0),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_json_is_what_the_standard_has(answer, right):
    assert score("json", answer, []) == {"json": float(right)}


@pytest.mark.parametrize(
    ("pattern", "answer", "reference", "right"),
    [
        (r"Answer: (\w)", "Answer: B, surely", "B", 1),
        (r"Answer: (\w)", "Answer: C", "B", 0),
        (r"Answer: (\w)", "Answer: C. Answer: B", "B", 0),  # the first match
        (r".*Answer: (\w)", "Answer: C. Answer: B", "B", 1),
        (r"(A)|B", "B", "A", 0),
        (r"A: (\w+)|B: (\w+)", "B: yes", "yes", 1),  # the group that took part
        (r"A: (\w+)|B: (\w+)", "A: yes", "yes", 1),
        (r"A: (\w+)|B: (\w+)", "B: no", "yes", 0),
        (r"(?:(yes)|(no))", "no", "no", 1),
        (r"((A)|B)", "B", "B", 1),
        (r"= (.*)", "x =  4 \n", "4", 1),
    ],
)
def test_regex_compares_the_group_that_took_part(pattern, answer, reference, right):
    assert score("regex", answer, [reference], pattern) == {"regex": float(right)}


def test_regex_without_a_group_compares_nothing():
    assert score("regex", "yes", [], "yes|no") == {"regex": 1.0}
    assert score("regex", "perhaps", [], "yes|no") == {"regex": 0.0}


def test_rouge_is_that_of_the_best_reference():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    expected = scorer.score("the cat sat", "a cat sat")
    scores = score("rouge", "a cat sat", ["nothing alike", "the cat sat"])
    assert scores == {name: value.fmeasure for name, value in expected.items()}
    assert set(score("rouge", "", ["the cat"]).values()) == {0.0}


def test_a_verifier_is_called_as_its_file():
    files = Path(verifiers.__file__).parent.glob("*.py")
    assert set(VERIFIERS) == {path.stem for path in files} - {"__init__"}
    assert {"number", "exact_match"} <= set(VERIFIERS)
