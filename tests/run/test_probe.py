"""Two probes, held against one another: what differs is named."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.run.probe import QUESTIONS, Probe, Said, compare, first_difference
from llmpipe.typed import record

SAID = [
    Said(
        question=question,
        text=f"<{question.name}>",
        tokens=[1, 2, 3],
        continuation=[4, 5],
        log_probs=[-1.0, -2.0],
        answer=[7, 8, 2],
        margins=[1.0, 0.01, 3.0],
        words="seven eight",
    )
    for question in QUESTIONS[:3]
]
PROBE = Probe(precision="float32", stops=[2], said=SAID)


def changed(**values) -> Probe:
    """The probe, its second answer another one."""
    first, second, third = SAID
    return replace(PROBE, said=[first, replace(second, **values), third])


def test_the_same_agrees_and_json_brings_it_back():
    again = record(Probe, asdict(PROBE))
    assert again == PROBE
    agreement = compare(PROBE, again, "a reader", 0.0)
    assert agreement.log_prob_difference == 0 and agreement.greedy == 1
    assert agreement.answers == agreement.equal_answers == 3


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"text": "<a  fact>"}, "writes the question 'a fact' otherwise: from character 3"),
        ({"text": None}, "writes the question 'a fact' otherwise: written here"),
        ({"tokens": [1, 2, 4]}, r"splits the question 'a fact' otherwise: token 2 on is \[3\]"),
        ({"tokens": [1, 2]}, "splits the question 'a fact' otherwise: token 2"),
        ({"log_probs": [-1.0, -2.1]}, "log-probabilities differ by 1.00e-01 nats"),
        ({"log_probs": [-1.0, math.nan]}, "log-probabilities differ by inf nats"),
        ({"answer": [6, 8, 2], "words": "six"}, "a fact: the answer is 'seven eight' here"),
        ({"answer": [7, 8], "words": "seven"}, "a fact: the answer is 'seven eight' here"),
    ],
)
def test_what_differs_is_refused_by_name(values, problem):
    with pytest.raises(UserError, match=f"^a reader: .*{problem}") as caught:
        compare(PROBE, changed(**values), "a reader", 0.02)
    assert caught.value.code == INTEGRITY


def test_an_answer_may_differ_where_two_tokens_are_as_likely():
    other = changed(answer=[7, 9, 9], words="seven nine")
    agreement = compare(PROBE, other, "a reader", 0.02)  # 0.01 nats were between them
    assert agreement.equal_answers == 2
    with pytest.raises(UserError, match="the answer is"):
        compare(PROBE, other, "a reader", 0.004)


def test_rounded_weights_are_measured_and_not_refused():
    agreement = compare(PROBE, changed(log_probs=[-1.5, -2.0], answer=[3]), "a reader", None)
    assert agreement.log_prob_difference == 0.5
    assert agreement.mean_log_prob_difference == pytest.approx(0.5 / 6)
    assert agreement.greedy == pytest.approx(2 / 3)


def test_another_end_is_refused():
    with pytest.raises(UserError, match="does not stop at token 2, which ends an answer"):
        compare(PROBE, replace(PROBE, stops=[3]), "a reader", None)
    assert compare(PROBE, replace(PROBE, stops=[2, 3]), "a reader", None)


def test_questions_that_cannot_be_asked_are_counted():
    first, second, third = SAID
    refused = replace(first, text=None, tokens=[], continuation=[], log_probs=[], answer=[])
    long = replace(second, continuation=[], log_probs=[], answer=[])
    probe = replace(PROBE, said=[refused, long, third])
    assert probe.unasked == "of 3 questions its template refuses 1 and 1 exceed its context"
    assert compare(probe, probe, "a reader", 0.0).answers == 1


def test_where_texts_part_is_shown():
    assert first_difference("abc", "abd") == "from character 2, 'c' here, and 'd' there"
    assert first_difference("abc", "ab") == "from character 2, 'c' here, and '' there"
