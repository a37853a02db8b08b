"""The page of `llmpipe report`, made from run directories that are written by hand: no training,
no torch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from llmpipe.errors import UserError
from llmpipe.files import table, write_json
from llmpipe.report import charts
from llmpipe.report import page as pages
from llmpipe.sums import fingerprint

HOSTILE = "<script>alert(1)</script>"
SECTIONS = ("lineage", "training", "data", "evaluation", "samples", "recipes")
VOID = {"meta", "link"}


class Page(HTMLParser):
    """A page as a browser reads it: every tag closed in order, ids, names of pictures, text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.ids, self.targets, self.texts = [], [], [], [], []
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
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def write_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def publish(folder: Path, manifest: dict, recipe: str) -> dict:
    """Finish what lies in a folder, with a model of 1.5 MB."""
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (folder / "model").mkdir()
    (folder / "model" / "x").write_bytes(bytes(1_500_000))
    manifest = {
        "name": folder.name,
        "version": 1,
        "identity": "0" * 64,
        "seed": 42,
        "llmpipe": "0.1.0",
        "git": None,
        "versions": {},
        "machine": {},
        "environment": {},
        "seconds": 70.0,
        "finished": "2026-11-26T13:50:39Z",
        "files": {name: asdict(entry) for name, entry in table(folder).items()},
        **manifest,
    }
    manifest["fingerprint"] = fingerprint(manifest)
    write_json(folder / "manifest.json", manifest)
    return manifest


def add_sft(
    run: Path, rate: float = 0.005, loss: float = 0.46, steps: int = 40, answer: str = "Blue."
) -> dict:
    """A model that was trained, with a few rows rejected."""
    folder = run / "sft"
    rows = {
        "read": 72,
        "kept": 70,
        "rejected": 2,
        "rejected_by_reason": {"empty": 2},
        "truncated": 1,
        "split": 0,
        "pieces": 0,
        "duplicates": 3,
        "unseen": 0,
        "overlap": 0,
        "train": 63,
        "eval": 7,
    }
    source = {
        "path": "./rows.jsonl",
        "format": "messages",
        "files": [{"name": "rows.jsonl"}],
        "read": 72,
        "kept": 70,
    }
    lines = [{"step": 0, "eval_loss": 6.572}]
    for step in range(1, steps + 1):
        line = {
            "step": step,
            "loss": loss + 4 / step,
            "learning_rate": rate / step,
            "grad_norm": 1.0 + step % 3,
        }
        lines.append(
            {**line, "tokens_per_second": 20000.5, "memory_gb": 0.5, "epoch": 1.0, "seconds": 1.0}
        )
    write_lines(folder / "metrics.jsonl", [*lines, {"step": steps, "eval_loss": 3.811}])
    asks = [("before", "\u0000ES\ud800", False), ("after", answer, True)]
    write_lines(
        folder / "samples.jsonl",
        [
            {"when": when, "prompt": "What colour is the sky?", "answer": a, "ended": e}
            for when, a, e in asks
        ],
    )
    refused = [
        {"file": "rows.jsonl", "row": i, "reason": "empty", "detail": HOSTILE} for i in range(25)
    ]
    write_lines(folder / "rejected.jsonl", refused)
    return publish(
        folder,
        {
            "kind": "model",
            "stage": "sft",
            "parents": [],
            "models": {"model": {"reference": "./base", "files": "0" * 64}},
            "asked": {"recipe": {"optim": {"learning_rate": rate}}, "models": {}, "content": {}},
            "data": {
                "rows": rows,
                "sources": [{**source, "revision": None}],
                "tokens": {
                    "train": 2000,
                    "train_supervised": 500,
                    "eval": 0,
                    "eval_supervised": 0,
                    "eval_bytes": 0,
                },
                "sequences": {"train": 40, "eval": 0},
                "lengths": {"p50": 28, "p95": 39, "max": 54},
                "added_tokens": [],
                "content_digest": "0" * 64,
                "processes": 1,
            },
            "final": {"loss": loss, "eval_loss_before": 6.572, "eval_loss": 3.811},
            "training": {
                "steps": steps,
                "published_step": steps,
                "tokens": 38100,
                "seconds": 65.0,
                "exact_resume": True,
            },
            "versions": {"python": "3.11.7"},
            "git": "34a2ce1",
        },
        f"stage: sft\nname: '{HOSTILE}'\n",
    )


def add_eval(run: Path, parent: dict, items: int = 60) -> None:
    """Two models on two tasks; their scores differ on the last item."""
    folder = run / "eval"
    of_sft = parent["fingerprint"]
    cells = {
        "base": {"value": 0.0, "low": 3e-18, "high": 0.05, "n": items},
        "sft": {"value": 0.7083, "low": 0.595, "high": math.nan, "n": items},
    }
    differences = {
        "sft - base": {"value": 0.7083, "low": 0.61, "high": 0.8, "n": items},
        "base - x": {"value": 0.1, "low": -0.1, "high": 0.3, "n": items},
    }
    task = {
        "task": "generate",
        "n": items,
        "overlap": {"sft": 65},
        "metrics": {"exact": cells},
        "differences": {"exact": differences},
    }
    model = {"template": None, "stops_at": [2], "vocab_size": 9, "parameters": 106816}
    models = {label: model | {"dtype": "float32", "parent": None} for label in ("base", "sft")}
    folder.mkdir(parents=True)
    write_json(folder / "results.json", {"models": models, "tasks": {"generate": task}})
    lines = [
        {
            "task": "generate",
            "model": model,
            "item": i,
            "prompt": f"question {i}",
            "reference": "Blue.",
            "answers": [HOSTILE],
            "scores": {"exact": float(model == "sft" and i == items - 1)},
        }
        for model in models
        for i in range(items)
    ]
    perplexity = {
        "task": "perplexity",
        "model": "base",
        "item": 0,
        "text": "a scored text",
        "scores": {"nats": [1, 2]},
    }
    write_lines(folder / "samples.jsonl", [*lines, perplexity])
    publish(
        folder,
        {
            "kind": "evaluation",
            "stage": "eval",
            "asked": {"recipe": {}, "models": {}, "content": {}},
            "models": {
                "models.base": {"reference": "./base", "files": "0" * 64},
                "models.sft": {
                    "reference": "artifact:sft",
                    "artifact": "sft",
                    "fingerprint": of_sft,
                },
            },
            "parents": [{"name": "sft", "fingerprint": of_sft}],
            "final": {"generate.exact": {"base": 0.0, "sft": 0.7}},
        },
        "stage: eval\n",
    )


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


def test_a_run_has_every_section(run):
    page = page_of(run)
    assert set(SECTIONS) <= set(page.ids)
    assert (run / "report.html").stat().st_size < 200_000
    for expected in (
        "2 artifacts, 2 finished",
        "model by sft, finished",
        "held-out loss 3.811",
        "duration 1m05s",
        "size 1.5 MB",
        "2 empty",
        "25%",
        "20 of 25 rejected rows",
        "0.708",
        "[0.000, 0.050]",
        "60 items",
        "65 asked in training of sft",
        "1 of 1 prompts",
        "cut off",
        "24 of 60 items; the scores differ on 1",
        "question 59",
        "106,816 parameters",
        "git 34a2ce1",
    ):
        assert expected in page.text, expected
    assert "question 30" not in page.text and "a scored text" not in page.text
    assert page.text.count("differs") == 1 and page.text.count("not shown to differ") == 1


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
    assert all(a.get("role") == "img" and a.get("aria-label") for a in page.named("svg"))
    assert all(a.get("scope") for a in page.named("th"))
    boxes = [a for a in page.named("div") if a.get("class") == "scroll"]
    assert boxes and all(a["tabindex"] == "0" and a["aria-label"] for a in boxes)
    assert [a["href"] for a in page.named("a") if a.get("class") == "skip"] == ["#content"]


def test_headings_go_down_one_level_at_a_time(run, tmp_path):
    add_sft(tmp_path / "second")
    for page in (page_of(run), page_of(run, tmp_path / "second")):
        levels = [int(tag[1]) for tag, _ in page.tags if tag in {"h1", "h2", "h3", "h4", "h5"}]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(b <= a + 1 for a, b in pairwise(levels)), levels


def test_unfinished_and_damaged_artifacts_are_shown(run):
    dpo = run / "dpo"
    (dpo / "checkpoints" / "step-20").mkdir(parents=True)
    (dpo / "recipe.yaml").write_text("stage: dpo\n")
    write_json(dpo / "outcome.json", {"code": 143, "message": "stopped at step 20"})
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
    (run / "begun").mkdir()
    (run / "begun" / "recipe.yaml").symlink_to("/etc/passwd")
    page = page_of(run)
    for expected in (
        "checkpoint at step 20; last ended with: stopped at step 20",
        "made anew since",
        "margins",
        "kl",
        "2 values or lines",
        "DAMAGED: manifest.json",
        "no checkpoint yet",
        "a link, not followed",
    ):
        assert expected in page.text, expected
    assert "root:" not in page.text


def test_two_runs_are_compared(run, tmp_path):
    other = tmp_path / "second"
    add_sft(other, rate=0.001, loss=0.9)
    page = page_of(run, other)
    assert (run / "report-vs-second.html").exists()
    assert {"comparison", *(f"{letter}-{name}" for letter in "ab" for name in SECTIONS)} <= set(
        page.ids
    )
    assert "optim.learning_rate 0.005 0.001" in page.text
    assert "loss 0.46 0.9" in page.text
    assert "only in A: first" in page.text
    loss = next(a for a in page.named("svg") if a["aria-label"].startswith("loss"))
    assert all(
        word in loss["aria-label"] for word in ("A train", "A held out", "B train", "B held out")
    )


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


@pytest.mark.parametrize("length", [401, 1000, 12345])
def test_thinning_keeps_ends_and_extremes(length):
    points = [(float(i), math.sin(i) + (i == 333) * 50 - (i == 200) * 50) for i in range(length)]
    kept = charts.thin(points, 400)
    assert len(kept) <= 400 and kept == sorted(kept)
    assert {points[0], points[-1], points[333], points[200]} <= set(kept)
    assert charts.thin(points[:400], 400) == points[:400]


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 60, [0, 20, 40, 60]),
        (0, 10, [0, 2.5, 5, 7.5, 10]),
        (0.46, 6.6, [2, 4, 6]),
        (0, 0.005, [0, 0.002, 0.004]),
        (-140, -120, [-140, -135, -130, -125, -120]),
        (8000, 28000, [10000, 15000, 20000, 25000]),
        (1e-7, 9e-7, [2e-7, 4e-7, 6e-7, 8e-7]),
        (-0.5, 0.5, [-0.4, -0.2, 0, 0.2, 0.4]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_there_are_three_to_five_ticks():
    for low in (-3.7, 0.0, 0.1, 17.0, 12345.6):
        for width in (1e-3 * 1.13**i for i in range(150)):
            found = charts.ticks(low, low + width)
            assert 3 <= len(found) <= 5 and low - width * 1e-6 <= found[0] < found[
                -1
            ] <= low + width * (1 + 1e-6)


def test_a_curve_that_stands_still_is_drawn():
    for value in (0, 31.2, -5.0, 1e-99, 1e99):
        low, high = charts.span([value, value])
        assert low < high and low <= value <= high
        picture = charts.plot("x", "", [charts.Series("", 0, [(1, value)])], charts.span([1]), 400)
        macros = pages.templates().get_template("charts.html.j2").module
        assert "<polyline" in macros.plot(picture)


def test_folders_without_artifacts_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no artifacts"):
        pages.write_report([tmp_path])
    with pytest.raises(UserError, match="no such run"):
        pages.write_report([tmp_path / "nothing"])
    add_sft(tmp_path / "run")
    with pytest.raises(UserError, match="cannot be written"):
        pages.write_report([tmp_path / "run"], tmp_path / "nowhere" / "page.html")


def test_the_report_is_light():
    heavy = {"torch", "transformers", "numpy", "pyarrow", "pydantic", "jinja2", "yaml"}
    code = f"import sys, llmpipe.report.page; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
