"""Which items of an evaluation are shown first, and how their answers read."""

from __future__ import annotations

import pytest

from llmpipe.report.answers import answers
from llmpipe.report.parts import Run, parts_of
from tests.report.written import write_lines


def shown(folder, lines: list[dict]):
    path = folder / "run" / "eval"
    write_lines(path / "samples.jsonl", lines)
    (path / "recipe.yaml").write_text("stage: eval\n")
    return answers(Run("run", "", parts_of(folder / "run")))


def line(model: str, item: int, scores: dict, **more) -> dict:
    return {
        "task": "t",
        "model": model,
        "item": item,
        "prompt": f"q{item}",
        "scores": scores,
        **more,
    }


def test_a_reward_model_does_not_part_with_policies_by_the_name_of_its_score(tmp_path):
    """It parts with nobody: its score is another one."""
    lines = [
        line(model, item, {name: float(right)}, values={name: [1.25, -2.0]})
        for model, name, rights in (
            ("a", "accuracy_sum", (1, 1)),
            ("b", "accuracy_sum", (1, 0)),
            ("reward", "accuracy", (0, 0)),
        )
        for item, right in enumerate(rights)
    ]
    made = shown(tmp_path, lines)
    (fold,) = made.folds
    assert fold.title == "t (eval): 2 of 2 items; the scores differ on 1, which stand first"
    assert [card.prompt.text for card in fold.cards] == ["q1", "q0"]
    assert made.items == []  # nobody wrote anything
    assert fold.cards[0].answers[0].text.text == "accuracy_sum 1.25, −2"


@pytest.mark.parametrize(
    ("scores", "is_right", "note"),
    [
        ({"exact_match": 1.0, "contains": 1.0}, True, "exact match yes, contains yes"),
        ({"exact_match": 0.0, "contains": 0.0}, False, "exact match no, contains no"),
        ({"exact_match": 0.0, "contains": 1.0}, None, "exact match no, contains yes"),
        ({"rougeL": 0.4567}, None, "rougeL 0.457"),
    ],
)
def test_right_is_what_every_score_says(tmp_path, scores, is_right, note):
    lines = [line("a", 0, scores, answers=["x"]), line("b", 0, {"other": 0.5}, answers=["y"])]
    (fold,) = shown(tmp_path, lines).folds
    first = fold.cards[0].answers[0]
    assert (first.is_right, first.note, first.text.text) == (is_right, note, "x")


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n",
        "<s>[INST] Is it? [/INST]",
        "<start_of_turn>user\nIs it?<end_of_turn>\n<start_of_turn>model\n",
        "<|start_header_id|>user<|end_header_id|>\n\nIs it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Is it?",
    ],
)
def test_the_first_screen_leaves_out_the_marks_of_a_template(tmp_path, prompt):
    """The folded items keep them: they are what the model read."""
    lines = [
        line(model, 0, {"exact_match": score}, answers=["x"]) | {"prompt": prompt}
        for model, score in (("a", 0.0), ("b", 1.0))
    ]
    made = shown(tmp_path, lines)
    assert made.items[0].prompt.text == "Is it?"
    assert made.folds[0].cards[0].prompt.text == prompt


def test_a_system_prompt_of_one_models_template_is_not_what_was_asked(tmp_path):
    chatty = (
        "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?<|im_end|>"
    )
    plain = "<|im_start|>user\nWhat is 1 + 1?<|im_end|>"
    lines = [
        line(model, 0, {"number": right}, answers=["2"]) | {"prompt": prompt}
        for model, prompt, right in (("base", chatty, 0.0), ("sft", plain, 1.0))
    ]
    made = shown(tmp_path, lines)
    assert [card.prompt.text for card in made.items] == ["What is 1 + 1?"]
