"""The page of `llmpipe report`, made from run directories that are written by hand: no training,
no torch."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from llmpipe.errors import SIGTERM, UserError
from llmpipe.files.json import write_json
from llmpipe.report import page as pages
from tests.report.written import HOSTILE, add_eval, add_sft, write_lines

SECTIONS = ("summary", "warnings", "training", "data", "numbers", "answers", "lineage", "recipes")
VOID = {"meta", "link"}
HEADINGS = {"h1", "h2", "h3", "h4", "h5"}


class Page(HTMLParser):
    """A page as a browser reads it: every tag closed in order, ids, names of pictures, text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.ids, self.targets, self.texts = [], [], [], [], []
        self.tables = {}
        """{label: rows of the texts of their cells}"""
        self.rows = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"an attribute twice: {attrs}"
        assert not any(name.startswith("on") for name in attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.targets += (
            [attributes["href"][1:]] if attributes.get("href", "").startswith("#") else []
        )
        if attributes.get("class") == "scroll":
            self.rows = self.tables.setdefault(attributes["aria-label"], [])
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if {"td", "th"} & set(self.open) and self.rows:
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "first"
    add_eval(run, add_sft(run, answer=HOSTILE))
    return run


def page_of(*runs: Path) -> Page:
    text = pages.write_report(list(runs)).read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "<script" not in text.lower()
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.targets) <= set(page.ids)
    return page


# --- what is on it --------------------------------------------------------------------------------


def test_a_run_has_every_section(run):
    page = page_of(run)
    assert set(SECTIONS) <= set(page.ids)
    assert (run / "report.html").stat().st_size < 200_000
    for expected in (
        "./base, taught by sft and measured.",
        "Both artifacts are finished, 2m20s of work, the last at 2026-11-26 13:50 UTC.",
        "learning rate 0.005",
        "time 1m05s",
        "size 1.5 MB",
        "2,000 tokens, 25 % learned",
        "2 empty",
        "20 of 25 rejected rows",
        "60 items; 65 asked in training of sft",
        "the first 1 of the 1 on which the models' scores differ, of 60.",
        "cut off",
        "24 of 60 items; the scores differ on 1",
        "question 59",
        "106,816 parameters",
        "git 34a2ce1",
        "On held-out rows it was 6.57 before and is lowest at the end, 3.81.",
    ):
        assert expected in page.text, expected
    assert "question 30" not in page.text and "a scored text" not in page.text


def test_the_scoreboard_is_the_first_table_and_marks_only_what_is_real(run):
    page = page_of(run)
    label, board = next(iter(page.tables.items()))
    assert label == "scoreboard of eval"
    assert board == [
        ["model", "generate: exact match higher is better items differ"],
        ["base", "0.0 % 0.0 to 5.0"],
        ["sft against base", "71 % 60 to 80 ▲ better, +71 points"],
        ["few against base", "50 % no interval: 3 items are too few, 20 are needed ≈ no difference "
         "shown"],
    ]  # fmt: skip
    assert sum("▲" in cell or "best" in cell for row in board for cell in row) == 1


def test_every_cell_stands_under_its_heading(run, tmp_path):
    add_sft(tmp_path / "second", rate=0.001)
    for page in (page_of(run), page_of(run, tmp_path / "second")):
        for headings, *rows in filter(None, page.tables.values()):  # pictures scroll, too
            assert all(len(row) in (1, len(headings)) for row in rows), headings
    page = page_of(run)
    assert page.tables["generate: metrics"] == [
        ["model", "value", "95 % interval", "items", "picture"],
        ["exact_match higher is better; picture from 0 to 79.9 %"],
        ["base", "0.0 %", "0.0 to 5.0", "60", "0 on a scale from 0 to 79.9"],
        ["sft", "71 %", "60 to 80", "60", "70.83 on a scale from 0 to 79.9"],
        ["few", "50 %", "no interval: 3 items are too few, 20 are needed", "3",
         "50 on a scale from 0 to 79.9"],
    ]  # fmt: skip
    assert page.tables["generate: differences"][2:] == [
        ["sft - base", "+71 points", "+61 to +80", "better", "70.83 on a scale from −10 to 80"],
        ["few - base", "+10 points", "−10 to +30", "no difference shown",
         "10 on a scale from −10 to 80"],
    ]  # fmt: skip


def test_answers_stand_side_by_side_with_what_is_right(run):
    text = page_of(run).text
    first = text[text.index("question 59") :]
    expected = f"question 59 expected Blue. base ✗ wrong {HOSTILE} exact match no"
    assert first.startswith(f"{expected} sft ✓ right {HOSTILE} exact match yes")


def test_what_to_know_before_believing_it(run):
    page = page_of(run)
    for expected in (
        "Caution, sft: 2 of 72 rows were rejected (2 empty)",
        "Caution, sft: 1 of 72 rows were cut at the longest length",
        "Caution, eval: asked in training were 65 of 60 items of generate: part of the numbers is",
    ):
        assert expected in page.text, expected
    assert "Problem" not in page.text
    assert "Warnings (3)" in page.text


def test_a_loss_that_rose_again_is_said(tmp_path):
    run = tmp_path / "run"
    losses = [(0, 6.0), (20, 3.6), (40, 6.4)]
    add_sft(run, held_out=losses)
    page = page_of(run)
    assert (
        "Caution, sft: held-out loss was lowest at step 20, 3.6, and is 6.4 at step 40, which is "
        "published: evaluation.keep_best: true publishes the best step" in page.text
    )
    (run / "sft" / "manifest.json").unlink()  # a run that goes on may find a better step
    assert "and is 6.4 at step 40, so far: evaluation.keep_best" in page_of(run).text
    add_sft(tmp_path / "best", held_out=losses, published=20)  # keep_best
    assert "held-out loss was lowest" not in page_of(tmp_path / "best").text


@pytest.mark.parametrize(("least", "word"), [(0.7, "✓ gate passed"), (0.8, "✗ gate failed")])
def test_the_gate_and_its_verdict(tmp_path, least, word):
    run = tmp_path / "run"
    add_eval(run, add_sft(run), gate=f"gate:\n  exact_match: {{min: {least}}}\n", few=False)
    page = page_of(run)
    said = f"generate.exact_match of sft is 0.708, asked is at least {least:g}"
    assert f"{word} {said}" in page.text
    assert (f"Problem, eval: the gate does not hold: {said}" in page.text) == (least > 0.7083)


# --- hostile, unfinished, damaged -----------------------------------------------------------------


def test_what_a_run_holds_is_text(run):
    text = pages.write_report([run]).read_text(encoding="utf-8")
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt;"
    assert (
        text.count(escaped) >= 4
    )  # the recipe, a rejected row, answers of training and evaluation
    assert "\x00" not in text and "\ufffdES\ufffd" in text


def test_the_page_asks_nobody_and_can_be_used_by_everybody(run):
    page = page_of(run)
    metas = {a.get("http-equiv") or a.get("name"): a.get("content") for a in page.named("meta")}
    assert (
        metas["Content-Security-Policy"]
        == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    )
    assert metas["color-scheme"] == "light dark" and "width=device-width" in metas["viewport"]
    assert [a["href"] for a in page.named("link")] == ["data:,"]
    assert not {"script", "img", "iframe", "form"} & {tag for tag, _ in page.tags}
    for picture in page.named("svg"):
        named = picture.get("role") == "img" and picture.get("aria-label")
        assert named or picture.get("aria-hidden") == "true"
    assert all(a.get("scope") for a in page.named("th"))
    boxes = [a for a in page.named("div") if a.get("class") == "scroll"]
    assert boxes and all(a["tabindex"] == "0" and a["aria-label"] for a in boxes)
    assert len({a["aria-label"] for a in boxes}) == len(boxes)
    assert [a["href"] for a in page.named("a") if a.get("class") == "skip"] == ["#content"]


def test_headings_go_down_one_level_at_a_time(run, tmp_path):
    add_sft(tmp_path / "second")
    for page in (page_of(run), page_of(run, tmp_path / "second")):
        levels = [int(tag[1]) for tag, _ in page.tags if tag in HEADINGS]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(b <= a + 1 for a, b in pairwise(levels)), levels


def test_unfinished_and_damaged_artifacts_are_shown(run):
    dpo = run / "dpo"
    (dpo / "checkpoints" / "step-20").mkdir(parents=True)
    (dpo / "recipe.yaml").write_text("stage: dpo\n")
    write_json(dpo / "outcome.json", {"code": SIGTERM, "message": "stopped at step 20"})
    model = {
        "reference": "artifact:sft",
        "identity": {"artifact": "sft", "fingerprint": "of an older one"},
    }
    write_json(dpo / "plan.json", {"asked": {"recipe": {}}, "models": {"model": model}})
    whole = '{"step": 1, "rewards/margins": 0.5, "objective/kl": 1e-7}'
    metrics = whole + '\n{"step": 2, "loss": NaN}\n{"step": 3, "lo'
    (dpo / "metrics.jsonl").write_text(metrics)
    damaged = run / "reward"
    damaged.mkdir()
    (damaged / "recipe.yaml").write_bytes(b"stage: reward\n\xff")
    (damaged / "manifest.json").write_text('{"kind": "reward-model", "fingerprint": "0"}')
    failed = run / "kto"
    failed.mkdir()
    (failed / "recipe.yaml").write_text("stage: kto\n")
    outcome = {"code": 4, "message": "step 2: the loss is nan", "hint": "lower the learning rate"}
    write_json(failed / "outcome.json", outcome)
    (run / "begun").mkdir()
    (run / "begun" / "recipe.yaml").symlink_to("/etc/passwd")
    page = page_of(run)
    for expected in (
        "2 of 6 artifacts are finished",
        "Problem, dpo: was stopped: stopped at step 20; checkpoint at step 20. The same command "
        "goes on from there.",
        "Problem, kto: failed: step 2: the loss is nan; no checkpoint yet. Remedy: lower the "
        "learning rate.",
        "Problem, begun: not finished, no checkpoint yet: it is at work, or was killed",
        "made anew since",
        "margin",
        "KL from the reference 1e−7 nats per answer",
        "2 values or lines of metrics.jsonl are no numbers",
        "DAMAGED: manifest.json",
        "a link, not followed",
    ):
        assert expected in page.text, expected
    assert "root:" not in page.text


# --- two runs -------------------------------------------------------------------------------------


def test_two_runs_are_one_table_of_differences(run, tmp_path):
    other = tmp_path / "second"
    add_sft(other, rate=0.001, loss=0.9)
    page = page_of(run, other)
    assert (run / "report-vs-second.html").exists()
    expected = {
        "comparison",
        *(f"a-{name}" for name in SECTIONS),
        *(f"b-{name}" for name in SECTIONS if name not in ("numbers", "answers")),
    }
    assert expected <= set(page.ids)
    assert page.tables["differences"] == [
        ["what", "A: first", "B: second", "B less A"],
        ["eval"],
        ["artifact", "finished", "absent", ""],
        ["sft"],
        ["optim.learning_rate", "0.005", "0.001", "−0.004"],
        ["loss, nats per token", "0.46", "0.9", "+0.44"],
    ]
    loss = next(a for a in page.named("svg") if a.get("aria-label", "").startswith("loss"))
    assert all(
        word in loss["aria-label"] for word in ("A train", "A held out", "B train", "B held out")
    )
    answers = page.text[page.text.index("answered by both") :]
    assert f"What colour is the sky? A: sft {HOSTILE} B: sft Blue." in answers


def test_two_evaluations_are_compared_on_the_same_items_only(tmp_path):
    runs = [tmp_path / name for name in ("a", "b", "c")]
    for run, items, right in zip(runs, ("0", "0", "1"), (0.7, 0.3, 0.3), strict=True):
        add_eval(run, add_sft(run), few=False, right=right, content=items * 64)
    rows = page_of(runs[0], runs[1]).tables["differences"]
    assert rows[2] == [
        "generate: exact match, sft", "70 % 60 to 80", "30 % 20 to 40",
        "−40 points −54 to −26, worse",
    ]  # fmt: skip
    assert len(rows) == 3  # what was measured is a namesake, and the rest is the same
    rows = page_of(runs[0], runs[2]).tables["differences"]
    assert rows[3][3] == "other items"


def test_equal_runs_are_said_to_be_equal(tmp_path):
    for name in "ab":
        add_sft(tmp_path / name)
    page = page_of(tmp_path / "a", tmp_path / "b")
    assert "Recipes and results are the same." in page.text
    assert "No difference in sft." in page.text and "differences" not in page.tables


# --- size -----------------------------------------------------------------------------------------


def test_a_long_run_stays_small(tmp_path):
    parent = add_sft(tmp_path / "long", steps=50_000, answer="x" * 3_000_000)
    add_eval(tmp_path / "long", parent, items=500)
    path = pages.write_report([tmp_path / "long"], tmp_path / "page.html")
    assert path == tmp_path / "page.html" and path.stat().st_size < 2_000_000
    page = Page(path.read_text(encoding="utf-8"))
    assert all(len(line["points"].split()) <= 400 for line in page.named("polyline"))
    assert "2,998,000 more characters" in page.text


def test_what_is_still_too_long_is_shown_in_part(run, monkeypatch):
    whole = pages.write_report([run]).stat().st_size
    monkeypatch.setattr(pages, "MOST_BYTES", whole - 1)
    assert pages.write_report([run]).stat().st_size < whole
    assert "12 of 60 items" in (run / "report.html").read_text(encoding="utf-8")


def test_a_chinese_run_is_told_in_its_words(tmp_path):
    run = tmp_path / "跑"
    add_sft(run, answer="草是绿色的。")
    prompt = {
        "when": "after",
        "prompt": "草是什么颜色的？",
        "answer": "草是绿色的。",
        "ended": True,
    }
    write_lines(run / "dpo" / "samples.jsonl", [prompt])
    (run / "dpo" / "recipe.yaml").write_text("stage: dpo\n")
    text = page_of(run).text
    assert "草是什么颜色的？ dpo 草是绿色的。" in text and text.startswith("跑")


def test_an_artifact_has_a_page_of_its_own_beside_it(run):
    path = pages.write_report([run / "sft"])
    assert path == run / "report-sft.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert "Its one artifact is finished" in page.text and "altered" not in page.text
    assert "scoreboard of eval" not in page.tables
    assert pages.write_report([run / "sft", run / "sft"]).name == "report-sft-vs-sft.html"
    assert "altered" not in page_of(run).text


def test_folders_without_artifacts_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no artifacts"):
        pages.write_report([tmp_path])
    with pytest.raises(UserError, match="no such run"):
        pages.write_report([tmp_path / "nothing"])
    add_sft(tmp_path / "run")
    with pytest.raises(UserError, match="cannot be written"):
        pages.write_report([tmp_path / "run"], tmp_path / "nowhere" / "page.html")


def test_the_report_is_light():
    heavy = {"torch", "transformers", "numpy", "pyarrow", "pydantic", "jinja2"}
    code = f"import sys, llmpipe.report.page; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
