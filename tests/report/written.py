"""Run directories written by hand, for `show` and `report`: no training, no torch."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from llmpipe.files.json import write_json
from llmpipe.files.tables import table
from llmpipe.sums import fingerprint

HOSTILE = "<script>alert(1)</script>"


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
    run: Path,
    rate: float = 0.005,
    loss: float = 0.46,
    steps: int = 40,
    answer: str = "Blue.",
    held_out: list[tuple[int, float]] | None = None,
    published: int | None = None,
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
    lines = []
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
    measured = held_out or [(0, 6.572), (steps, 3.811)]
    lines += [{"step": step, "eval_loss": value} for step, value in measured]
    write_lines(folder / "metrics.jsonl", sorted(lines, key=lambda line: line["step"]))
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
                "published_step": published or steps,
                "tokens": 38100,
                "seconds": 65.0,
                "exact_resume": True,
            },
            "versions": {"python": "3.11.7"},
            "git": "34a2ce1",
        },
        f"stage: sft\nname: '{HOSTILE}'\n",
    )


def add_eval(
    run: Path,
    parent: dict,
    items: int = 60,
    gate: str = "",
    few: bool = True,
    right: float | None = None,
    content: str = "0" * 64,
) -> None:
    """Two models on a task, whose scores differ on the last item; `few`: and a third one on fewer.

    `right`: another share for the trained one; `content`: the sum of the items.
    """
    folder = run / "eval"
    of_sft = parent["fingerprint"]
    cells = {
        "base": {"value": 0.0, "low": 3e-18, "high": 0.05, "n": items},
        "sft": {"value": 0.7083, "low": 0.595, "high": 0.799, "n": items},
    }
    differences = {"sft - base": {"value": 0.7083, "low": 0.61, "high": 0.8, "n": items}}
    if right is not None:
        cells["sft"] = {"value": right, "low": right - 0.1, "high": right + 0.1, "n": items}
    if few:
        cells["few"] = {"value": 0.5, "low": math.nan, "high": math.nan, "n": 3}
        differences["few - base"] = {"value": 0.1, "low": -0.1, "high": 0.3, "n": items}
    task = {
        "task": "generate",
        "n": items,
        "overlap": {"sft": 65},
        "metrics": {"exact_match": cells},
        "differences": {"exact_match": differences},
    }
    model = {"template": None, "stops_at": [2], "vocab_size": 9, "parameters": 106816}
    models = {label: model | {"dtype": "float32", "parent": None} for label in cells}
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
            "scores": {"exact_match": float(model == "sft" and i == items - 1)},
        }
        for model in ("base", "sft")
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
            "asked": {"recipe": {}, "models": {}, "content": {"tasks.0.data.0:x": content}},
            "models": {
                "models.base": {"reference": "./base", "files": "0" * 64},
                "models.sft": {
                    "reference": "artifact:sft",
                    "artifact": "sft",
                    "fingerprint": of_sft,
                },
            },
            "parents": [{"name": "sft", "fingerprint": of_sft}],
            "final": {"generate.exact_match": {"base": 0.0, "sft": 0.7}},
        },
        f"stage: eval\n{gate}",
    )
