"""What the page says of a stage that trained, beside its curves."""

from __future__ import annotations

from llmpipe.report.training import trained
from tests.report.test_panels import part, steps
from tests.report.written import write_lines


def test_answers_of_a_group_stand_side_by_side(tmp_path):
    """Those of another prompt, and of another update, on cards of their own."""
    drawn = [(1, "a?", 1.0), (1, "a?", 0.0), (1, "b?", 1.0), (2, "b?", 0.5)]
    of_run = part(tmp_path, "grpo", steps(**{"objective/scores": [0.1, 0.2]}))
    write_lines(
        of_run.path / "rollouts.jsonl",
        [
            {"step": step, "prompt": prompt, "answer": f"{score}", "score": score, "ended": True}
            for step, prompt, score in drawn
        ],
    )
    fold = trained(of_run, 1).rollouts
    assert fold.title == "The last 4 answers drawn in training that were kept"
    shown = [
        (card.prompt.text, [answer.text.text for answer in card.answers]) for card in fold.cards
    ]
    assert shown == [("a?", ["1.0", "0.0"]), ("b?", ["1.0"]), ("b?", ["0.5"])]
