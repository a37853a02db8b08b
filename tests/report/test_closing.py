"""What a pipeline says at its end: numbers, which gains are real, and the next two commands."""

from __future__ import annotations

from llmpipe.files.json import write_json
from llmpipe.report.closing import closing
from llmpipe.report.terminal import COLUMNS
from llmpipe.run.artifact import Artifact
from llmpipe.run.results import Cell, MeasuredModel, Results, TaskResults
from llmpipe.sums import fingerprint
from tests.report.written import add_eval, add_sft

FOUR = ("base", "sft", "dpo", "ppo")


def measured(run, **differences: Cell) -> None:
    """Four models that answered 400 sums, in place of what the evaluation of `run` had."""
    values = dict(zip(FOUR, (0.01, 0.42, 0.55, 0.63), strict=True))
    cells = {label: Cell(value, value - 0.05, value + 0.05, 400) for label, value in values.items()}
    parents = {"sft": "base", "dpo": "sft", "ppo": "sft"}
    models = {label: MeasuredModel(None, 2, 9, 9, "float32", parents.get(label)) for label in FOUR}
    apart = {name.replace("_", " - "): cell for name, cell in differences.items()}
    task = TaskResults("generate", {"number": cells}, {"number": apart}, n=400)
    Results(models, {"sums": task}).to_file(run / "eval" / "results.json")


def ended(tmp_path, monkeypatch, **differences: Cell) -> list[str]:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    add_eval(run, add_sft(run))
    if differences:
        measured(run, **differences)
    made = [Artifact(run.relative_to(tmp_path) / name) for name in ("sft", "eval")]
    return closing(run.relative_to(tmp_path), made)


def real(value: float) -> Cell:
    return Cell(value, value - 0.04, value + 0.04, 400)


def test_six_lines_say_what_came_of_it(tmp_path, monkeypatch):
    lines = ended(
        tmp_path, monkeypatch, sft_base=real(0.41), dpo_sft=real(0.13), ppo_sft=real(0.21)
    )
    assert lines == [
        "run: 2 stages, all finished",
        "  sums       right number, of 400 items: base 1%, sft 42%, dpo 55%, ppo 63%",
        "  gains      sft over base, dpo over sft and ppo over sft; real at 95%",
        "  look       llmpipe report run",
        "  try        llmpipe chat run/sft",
    ]


def test_what_was_not_shown_or_is_worse_is_said(tmp_path, monkeypatch):
    lines = ended(
        tmp_path, monkeypatch, sft_base=real(0.41), dpo_sft=real(0.01), ppo_sft=real(-0.3)
    )
    assert lines[2:5] == [
        "  gains      sft over base; real at 95%",
        "  losses     ppo under sft; real at 95%",
        "  not shown  dpo against sft",
    ]


def test_each_task_is_named_where_there_are_several(tmp_path, monkeypatch):
    ended(tmp_path, monkeypatch, sft_base=real(0.41), dpo_sft=real(0.01), ppo_sft=real(0.2))
    path = tmp_path / "run" / "eval" / "results.json"
    results = Results.from_file(path)
    texts = TaskResults(
        "perplexity",
        {"perplexity": {label: Cell(9.0, 8.0, 10.0, 400) for label in FOUR}},
        {
            "perplexity": {
                "sft - base": Cell(3.0, 2.0, 4.0, 400),
                "ppo - sft": Cell(-2, -3, -1, 400),
            }
        },
    )
    Results(results.models, {"texts": texts, **results.tasks}).to_file(path)
    run = tmp_path / "run"
    lines = closing(run, [Artifact(run / "sft"), Artifact(run / "eval")])
    assert lines[3:-2] == [
        "  gains      texts: ppo over sft; sums: sft over base and ppo over sft; real at",
        "             95%",
        "  losses     texts: sft under base; real at 95%",
        "  not shown  sums: dpo against sft",
    ]


def test_the_best_is_the_one_to_talk_with(tmp_path, monkeypatch):
    """`sft` alone is an artifact here that can talk; of several it is the best on the board."""
    run = tmp_path / "run"
    add_sft(run)
    (run / "sft").rename(run / "other")
    best = {"sft_base": real(0.41), "sft_dpo": real(0.1), "sft_ppo": real(0.1)}
    ended(tmp_path, monkeypatch, **best)
    made = [Artifact(run / name) for name in ("sft", "other", "eval")]
    assert closing(run, made)[-1].split()[-1].endswith("run/sft")
    measured(run, sft_base=real(0.01))
    assert closing(run, made)[-1].split()[-1].endswith("run/other")


def test_one_that_became_worse_is_not_the_one_to_talk_with(tmp_path, monkeypatch):
    run = tmp_path / "run"
    add_sft(run)
    (run / "sft").rename(run / "other")
    ended(tmp_path, monkeypatch, sft_base=real(-0.3))
    made = [Artifact(run / name) for name in ("other", "sft", "eval")]
    assert closing(run, made)[-1].endswith("run/other")
    assert closing(run, made[1:])[-1].endswith("run/sft"), "there is no other"


def test_an_evaluation_may_call_an_artifact_otherwise(tmp_path, monkeypatch):
    run = tmp_path / "run"
    add_sft(run)
    (run / "sft").rename(run / "other")
    best = {"dpo_base": real(0.5), "dpo_sft": real(0.1), "ppo_dpo": real(-0.1)}
    ended(tmp_path, monkeypatch, **best)
    manifest = Artifact(run / "eval").document()
    manifest["models"]["models.dpo"] = manifest["models"].pop("models.sft")
    manifest["fingerprint"] = fingerprint(manifest)
    write_json(run / "eval" / "manifest.json", manifest)
    made = [Artifact(run / name) for name in ("sft", "other", "eval")]
    assert closing(run, made)[-1].endswith("run/sft")


def test_it_fits_80_columns_and_takes_results_that_nobody_can_read(tmp_path, monkeypatch):
    lines = ended(tmp_path, monkeypatch)
    assert all(len(line) <= COLUMNS for line in lines) and len(lines) > 4
    write_json(tmp_path / "run" / "eval" / "results.json", {"models": 3})
    run = tmp_path / "run"
    assert closing(run, [Artifact(run / "sft"), Artifact(run / "eval")])[1:] == [
        f"  look       llmpipe report {run}",
        f"  try        llmpipe chat {run / 'sft'}",
    ]
