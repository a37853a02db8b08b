"""Which curves of a stage are shown, and that their words are true of the numbers."""

from __future__ import annotations

import json

import pytest

from llmpipe.report import parts
from llmpipe.report.panels import course, panels
from llmpipe.report.parts import Part


def part(folder, stage: str, lines: list[dict]) -> Part:
    """An artifact that was begun, with these metrics."""
    path = folder / stage
    path.mkdir()
    (path / "recipe.yaml").write_text(f"stage: {stage}\n")
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return parts.parts_of(folder)[0]


def steps(**series) -> list[dict]:
    count = len(next(iter(series.values())))
    return [
        {"step": i} | {name: values[i] for name, values in series.items()} for i in range(count)
    ]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([4.0, 3.0, 2.0, 1.0], "fell from 4.0 to 1.0"),
        ([0.0, 50.0, 100.0], "rose from 0 to 100"),
        ([1.0, 9.0, 1.1], "stayed near 1.1"),
        ([2.0, 2.0, 2.0], "stayed near 2.00"),
        ([0.0011, 0.0022], "rose from 0.00110 to 0.00220"),
    ],
)
def test_the_course_of_a_curve(values, said):
    assert course(list(enumerate(values))) == said


def test_sft_shows_loss_accuracy_and_gradient_and_folds_the_rest(tmp_path):
    half = [0.5, 0.6, 0.7, 0.8]
    lines = steps(loss=[4, 3, 2, 1], mean_token_accuracy=half, grad_norm=half, entropy=half)
    lines = [line | {"memory_gb": 0.5} for line in lines]
    lines += [{"step": 0, "eval_loss": 5.0}, {"step": 2, "eval_loss": 3.0}]
    shown = panels({"": part(tmp_path, "sft", [*lines, {"step": 3, "eval_loss": 4.0}])})
    titles = [(one.title, one.unit) for one in shown.plots]
    assert titles == [
        ("loss", "nats per token"),
        ("next tokens guessed right", "%"),
        ("gradient norm", ""),
    ]
    assert [entry.text for entry in shown.plots[0].legend] == ["train", "held out"]
    assert shown.plots[0].words == (
        "Over the training rows it fell from 4.0 to 1.0. On held-out rows it was 5 before, "
        "lowest at step 2, 3, and 4 at the end."
    )
    assert "rose from 50 to 80 %" in shown.plots[1].words
    assert [one.title for one in shown.more] == ["entropy of the next token"]
    assert shown.constant == ["memory 0.5 GB"]


def test_dpo_shows_margin_accuracy_and_both_rewards(tmp_path):
    names = ("rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected")
    values = ([0.0, 0.5], [0.5, 1.0], [0.0, -0.1], [0.0, -0.6])
    lines = steps(**dict(zip(names, values, strict=True)), loss=[0.7, 0.5])
    shown = panels({"": part(tmp_path, "dpo", lines)})
    assert [one.title for one in shown.plots] == [
        "margin",
        "pairs told apart",
        "rewards of both answers",
    ]
    assert "Chosen ones below zero: they became less likely, too." in shown.plots[2].words
    assert [one.title for one in shown.more] == ["loss"] and shown.more[0].unit == "nats per pair"


def test_dpo_without_a_reference_speaks_of_no_parent(tmp_path):
    names = ("rewards/margins", "rewards/accuracies")
    each = ("logps_per_token/chosen", "logps_per_token/rejected")
    values = ([0.0, 0.5], [0.5, 1.0], [-1.0, -1.5], [-1.0, -3.0])
    lines = steps(**dict(zip(names + each, values, strict=True)), loss=[0.7, 0.5])
    shown = panels({"": part(tmp_path, "dpo", lines)})
    titles = ["margin", "pairs told apart", "log-probability of a token"]
    assert [one.title for one in shown.plots] == titles
    assert shown.plots[2].unit == "nats per token"
    assert "Chosen ones became less likely, too." in shown.plots[2].words
    assert not any("parent" in one.words for one in shown.plots)


def test_ppo_shows_the_score_against_what_it_costs(tmp_path):
    names = ("objective/scores", "objective/kl", "answers/tokens", "objective/entropy")
    values = ([0.0, 0.5, 1.0], [0.0, 1.0, 4.0], [9.0, 8.0, 3.0], [2.0, 1.5, 1.0])
    lines = steps(**dict(zip(names, values, strict=True)))
    shown = panels({"": part(tmp_path, "ppo", lines)})
    assert [one.title for one in shown.plots] == [
        "score against KL",
        "length of answers",
        "entropy",
    ]
    assert "the score rose from 0.00 to 1.00 while KL rose from 0.0 to 4.0 nats" in (
        shown.plots[0].words
    )
    assert [one.title for one in shown.more] == ["score", "KL from the reference"]


def test_grpo_shows_what_became_of_groups(tmp_path):
    """And the score by itself where no reference says what it costs."""
    names = ("groups/mixed", "groups/all_right", "groups/none_right", "answers/tokens")
    values = ([0.2, 0.5, 0.6], [0.0, 0.1, 0.3], [0.8, 0.4, 0.1], [9.0, 8.0, 7.0])
    scores = {"objective/scores": [0.1, 0.2, 0.5]}
    lines = steps(**dict(zip(names, values, strict=True)), **scores)
    shown = panels({"": part(tmp_path, "grpo", lines)})
    titles = ["groups by their scores", "length of answers", "score"]
    assert [one.title for one in shown.plots] == titles
    groups = shown.plots[0]
    assert [entry.text for entry in groups.legend] == ["mixed", "all right", "none right"]
    assert "Mixed rose from 20 to 60 %; all right rose from 0 to 30 %; none right fell" in (
        groups.words
    )
    lines = steps(**dict(zip(names, values, strict=True)), **scores, **{"objective/kl": [0, 1, 2]})
    (tmp_path / "kl").mkdir()
    shown = panels({"": part(tmp_path / "kl", "grpo", lines)})
    assert [one.title for one in shown.plots] == ["score against KL", *titles[:2]]


def test_two_runs_share_a_plot_without_words(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a = part(tmp_path / "a", "sft", steps(loss=[4, 3]))
    b = part(tmp_path / "b", "sft", steps(loss=[4, 2]))
    (picture,) = panels({"A": a, "B": b}).plots
    assert [entry.text for entry in picture.legend] == ["A train", "B train"]
    assert picture.words == ""
    assert len({curve.style for curve in picture.curves}) == 2
