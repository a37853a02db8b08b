"""`llmpipe report`: one run, or two beside each other, as a single HTML file without network and without JavaScript.

What lies in a run is not trusted: `tag` escapes all text, and only what it made (`Html`) passes for markup. The file
stays under 2 MB: curves are thinned, long lists and texts are cut, and the page says how much is left out.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from llmpipe import __version__
from llmpipe.errors import RESOURCES, UserError
from llmpipe.files import flat, read_json
from llmpipe.report.terminal import duration_of, size_of, status_of
from llmpipe.run.artifact import Artifact, artifacts

Point = tuple[float, float]
POINTS, ITEMS, CHARACTERS, MOST_BYTES = (
    400,
    24,
    2000,
    2_000_000,
)  # of a curve, a list, a text, the file
# Series of metrics.jsonl in the order of the page, with title and unit; others follow under their own names.
KNOWN = {"loss": ("loss", "nats per token"), "learning_rate": ("learning rate", ""), "grad_norm": ("gradient norm", ""),
         "tokens_per_second": ("speed", "tokens/s"), "memory_gb": ("memory", "GB")}  # fmt: skip
COUNTS = {"read": "read", "kept": "kept", "rejected": "rejected", "truncated": "truncated", "split": "split",
          "duplicates": "duplicate", "unseen": "unseen", "train": "to train on", "eval": "held out"}  # fmt: skip
PREFERENCES = {"reward", "dpo", "ppo", "grpo"}  # stages whose loss has no unit
ORIGIN = ("fingerprint", "identity", "finished", "seed", "llmpipe", "git", "versions", "machine", "hardware",
          "environment", "tokenizer", "verified")  # fmt: skip
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]")
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
"""


class Html(str):
    """Markup; every other string is text."""


def join(*parts: object) -> Html:
    """Parts in a row: markup as it is, anything else as escaped text without control characters."""
    return Html(
        "".join(p if isinstance(p, Html) else escape(CONTROL.sub("\ufffd", str(p))) for p in parts)
    )


def tag(name: str, *content: object, **attributes: object) -> Html:
    """An element. `class_` is written class, `text_anchor` text-anchor; an attribute that is None is left out."""
    pairs = {
        k.rstrip("_").replace("_", "-"): join(v) for k, v in attributes.items() if v is not None
    }
    inside = "".join(f' {k}="{v}"' for k, v in pairs.items())
    return Html(f"<{name}{inside}>{join(*content)}</{name}>")


def clip(text: object, most: int) -> Html:
    rest = len(text := str(text)) - most
    return join(text[:most], tag("em", f" … {rest:,} more characters")) if rest > 0 else join(text)


def scroll(label: str, content: Html) -> Html:
    return tag("div", content, class_="scroll", tabindex=0, role="region", aria_label=label)


def table(label: str, head: list[str], rows: list[list[object]]) -> Html:
    """A table in a box that scrolls. A # marks a column of numbers; None in the first column is the cell above."""
    kinds = ["number" if name.startswith("#") else None for name in head]
    top = [
        tag("th", name.lstrip("#"), scope="col", class_=kind)
        for name, kind in zip(head, kinds, strict=True)
    ]
    body, starts = [], [i for i, row in enumerate(rows) if row[0] is not None]
    for i, row in enumerate(rows):
        cells = [
            tag("td", cell, class_=kind) for cell, kind in zip(row[1:], kinds[1:], strict=True)
        ]
        height = min((k for k in starts if k > i), default=len(rows)) - i
        body.append(
            tag(
                "tr",
                tag("th", row[0], scope="row", rowspan=height) if i in starts else Html(),
                *cells,
            )
        )
    return scroll(label, tag("table", tag("thead", tag("tr", *top)), tag("tbody", *body)))


def facts(pairs: dict[Any, Any], style: str = "facts") -> Html:
    """Names and values; what is not known is left out."""
    shown = (
        tag("div", tag("dt", name), tag("dd", value))
        for name, value in pairs.items()
        if value is not None
    )
    return tag("dl", *shown, class_=style)


def fold(title: object, *content: object) -> Html:
    return tag("details", tag("summary", title), *content)


def plain(value: Any) -> str:
    """A value of a recipe or a manifest in a few words."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    return value[:12] if re.fullmatch("[0-9a-f]{64}", str(value)) else str(value)


def drawable(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e100  # no bool, NaN, infinity


def number(value: Any, decimals: int | None = None, sign: str = "", digits: int = 4) -> str:
    """A number with its thousands set apart: with `decimals`, or with `digits` that count."""
    if type(value) not in (int, float):
        return "–" if value is None else str(value)
    if decimals is None and (isinstance(value, int) or 10_000 <= abs(value) < 1e15):
        decimals = 0
    text = f"{value:{sign},.{digits}g}" if decimals is None else f"{value:{sign},.{decimals}f}"
    return text.replace("-", "−").replace("e−0", "e−")


def ticks(low: float, high: float) -> list[float]:
    """Three to five round numbers from `low` to `high`: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    power = math.floor(math.log10((high - low) / 5))
    for step in (m * 10.0**e for e in (power, power + 1) for m in (1, 2, 2.5, 5)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < 5:
            break
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def thin(points: list[Point], most: int) -> list[Point]:
    """At most `most` of the points: the first, the last, and the lowest and highest of each bucket in between."""
    if len(points) <= most:
        return points
    kept, count = {0, len(points) - 1}, (most - 2) // 2
    for a, b in pairwise(1 + i * (len(points) - 2) // count for i in range(count + 1)):
        kept |= {pick(range(a, b), key=lambda i: points[i][1]) for pick in (min, max)}
    return [points[i] for i in sorted(kept)]


class Part(NamedTuple):
    """An artifact in whatever state. `made` is its manifest, or what is known before there is one."""

    name: str
    path: Path
    recipe: str
    stage: str
    status: str
    made: dict[str, Any]
    curves: dict[str, list[Point]]
    undrawn: int


class Run(NamedTuple):
    """A run on the page. `prefix` keeps the ids of two runs apart; of what is long one part in `scale` is shown."""

    name: str
    prefix: str
    parts: list[Part]
    scale: int = 1


def dig(value: Any, *keys: str) -> Any:
    """The value at a path of a document; an empty dict where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return {} if value is None else value


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file; an empty one stands for a line that cannot be read. Links are not followed."""
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as file:
            for raw in file:
                try:
                    line = json.loads(raw)
                except (ValueError, RecursionError):
                    line = {}
                yield line if isinstance(line, dict) else {}


def read(artifact: Artifact) -> Part:
    """Gather what there is; a damaged manifest is said, not raised."""
    path, recipe = artifact.path, artifact.path / "recipe.yaml"
    text = (
        "a link, not followed"
        if recipe.is_symlink()
        else recipe.read_text(encoding="utf-8", errors="replace")
    )
    stage = re.search(r"^stage: *(\S+)", text, re.MULTILINE)
    plan, data = (read_json(path / f"{n}.json") for n in ("plan", "prepared"))
    models = {
        at: {"reference": m["reference"], **m["identity"]} for at, m in dig(plan, "models").items()
    }
    made = {"asked": dig(plan, "asked"), "models": models, "data": data}
    status, manifest = status_of(artifact)
    made = made if manifest is None else manifest
    curves: dict[str, list[Point]] = {}
    undrawn = 0
    for line in lines_of(path / "metrics.jsonl"):
        values = {
            k: v
            for k, v in line.items()
            if type(v) in (int, float) and k not in ("step", "epoch", "seconds")
        }
        good = [k for k, v in values.items() if drawable(v) and drawable(line.get("step"))]
        undrawn += len(values) - len(good) + (not line)
        for name in good:
            curves.setdefault(name, []).append((line["step"], line[name]))
    return Part(path.name, path, text, stage[1] if stage else "?", status, made, curves, undrawn)


def span(values: list[float], margin: float = 0) -> tuple[float, float]:
    """The range of values with a margin, never empty."""
    low, high = min(values), max(values)
    pad = (
        (high - low) * margin if high - low > 1e-90 else abs(high) * 0.1 if abs(high) > 1e-90 else 1
    )
    return (max(low - pad, 0) if low >= 0 else low - pad), high + pad


def plot(
    title: str,
    unit: str,
    curves: dict[str, tuple[int, list[Point]]],
    steps: Point,
    most: int,
    along: str = "step",
) -> Html:
    """Curves, {label: (style, points)}, from the first to the last of `steps`, at most `most` points each; the last
    value stands at the end. `along`: what lies on the horizontal axis."""
    left, right, top, bottom = 46, 240 if any(curves) else 284, 8, 150
    (x0, x1), (y0, y1) = steps, span([p[1] for _, points in curves.values() for p in points], 0.06)

    def at(p: Point) -> tuple[float, float]:
        x, y = (p[0] - x0) / (x1 - x0), (p[1] - y0) / (y1 - y0)
        return round(left + x * (right - left), 1), round(bottom - y * (bottom - top), 1)

    drawn, ends, below = [tag("path", d=f"M{left} {bottom}H{right}", class_="axis")], [], -math.inf
    for value in ticks(y0, y1):
        y = at((x0, value))[1]
        drawn.append(tag("path", d=f"M{left} {y}H{right}", class_="grid"))
        drawn.append(tag("text", number(value, digits=6), x=left - 6, y=y + 4, text_anchor="end"))
    for value in ticks(x0, x1):
        drawn.append(
            tag(
                "text",
                number(value, digits=6),
                x=at((value, y0))[0],
                y=bottom + 16,
                text_anchor="middle",
            )
        )
    drawn.append(tag("text", along, x=right + 26, y=bottom + 16))
    for label, (style, points) in curves.items():
        line = " ".join("{:g},{:g}".format(*at(p)) for p in thin(points, most))
        drawn.append(tag("polyline", points=line, class_=f"line s{style}"))
        mark = f"dot s{style}" + " rare" * (len(points) <= 40)
        for p in (*points[:: -(-len(points) // 8)], points[-1]):
            tip, (x, y) = tag("title", f"{label} {along} {number(p[0])}: {number(p[1])}"), at(p)
            drawn.append(tag("circle", tip, cx=x, cy=y, r=2.5, class_=mark))
        ends.append((at(points[-1])[1], f"{label} {number(points[-1][1])}", f"end s{style}"))
    for i, (y, words, style) in enumerate(sorted(ends), 1):
        below = max(min(y, bottom - 12 * (len(ends) - i)), below + 12)
        drawn.append(tag("text", words, x=right + 6, y=below + 4, class_=style))
    said = ", ".join(
        f"{label} from {number(p[0][1])} to {number(p[-1][1])}" for label, (_, p) in curves.items()
    )
    picture = tag("svg", *drawn, viewBox="0 0 340 170", role="img", aria_label=f"{title}: {said}")
    return tag("figure", tag("figcaption", title, tag("small", f" {unit}")), picture)


def plots(parts: dict[str, Part], most: int) -> Iterator[Html]:
    """Every series of metrics.jsonl in small pictures, grouped by what stands before the slash; two runs share them."""
    names = dict.fromkeys(
        name.removeprefix("eval_") for part in parts.values() for name in part.curves
    )
    groups: dict[str, list[Html]] = {}
    steps = [
        p[0]
        for part in parts.values()
        for points in part.curves.values()
        for p in (points[0], points[-1])
    ]
    for name in sorted(names, key=lambda n: [*KNOWN, n].index(n)):
        curves, twin = {}, f"eval_{name}"
        twice = any(twin in part.curves for part in parts.values())
        for i, (label, part) in enumerate(parts.items()):
            for style, key, kind in ((2 * i, name, "train" * twice), (2 * i + 1, twin, "held out")):
                if key in part.curves:
                    curves[f"{label} {kind}".strip()] = (style, part.curves[key])
        group, _, rest = name.rpartition("/")
        title, unit = KNOWN.get(name, (rest.replace("_", " "), ""))
        unit = (
            "" if name == "loss" and PREFERENCES & {part.stage for part in parts.values()} else unit
        )
        groups.setdefault(group, []).append(plot(title, unit, curves, span(steps), most))
    for group, drawn in groups.items():
        yield join(tag("h5", group) if group else "", tag("div", *drawn, class_="plots"))


def strip(cell: dict[str, Any], low: float, high: float) -> Html:
    """A number and its interval as a dot with whiskers, on the scale from `low` to `high`; a mark at zero."""
    if not drawable(cell["value"]):
        return Html()
    known = [cell[k] if drawable(cell[k]) else cell["value"] for k in ("low", "value", "high")]
    a, x, b, zero = (round(4 + (v - low) / (high - low) * 132, 1) for v in (*known, 0))
    line = tag("path", d=f"M4 9H136M{zero} 3v12", class_="axis")
    whisker = tag("path", d=f"M{a} 5v8m0 -4H{b}m0 -4v8", class_="line s0")
    name = f"{number(cell['value'])} on a scale from {number(low)} to {number(high)}"
    dot = tag("circle", tag("title", name), cx=x, cy=9, r=3.5, class_="mark")
    return tag(
        "svg", line, whisker, dot, viewBox="0 0 140 18", role="img", aria_label=name, class_="strip"
    )


def lineage(run: Run) -> Iterator[Html]:
    """What was made from what. Each box has its own row and its own column, so that no line crosses a box."""
    parts, links, drawn = {part.name: part for part in run.parts}, {}, []
    states = {p.name: f"by {p.stage}, {re.split('[,:]', p.status)[0]}" for p in run.parts}
    boxes = {
        p.name: (p.name, f"{dig(p.made, 'kind') or 'made'} {states[p.name]}") for p in run.parts
    }
    for name, model in (
        (part.name, model) for part in run.parts for model in dig(part.made, "models").values()
    ):
        source, reference = parts.get(model.get("artifact")), model["reference"]
        known = source and dig(source.made, "fingerprint") in ({}, model.get("fingerprint"))
        origin = source.name if known or (source and "checkpoint" in model) else f"from {reference}"
        boxes.setdefault(
            origin, (reference, "was made anew since" if source else "from outside this run")
        )
        links[origin, name] = None
    depth = dict.fromkeys(boxes, 0)
    for a, b in list(links) * len(boxes):
        depth[b] = max(depth[b], min(depth[a] + 1, len(boxes)))
    place = {key: (i * 34, i * 48) for i, key in enumerate(sorted(boxes, key=depth.__getitem__))}
    for (ax, ay), (bx, by) in ((place[a], place[b]) for a, b in links):
        elbow = f"M{ax + 17} {ay + 40}V{by + 14}q0 8 8 8H{bx - 1}m-7 -4l7 4l-7 4"
        drawn.append(tag("path", d=elbow, class_="link"))
    for key, (x, y) in place.items():
        (title, about), style = boxes[key], "box" if key in parts else "box outside"
        short = title if len(title) < 20 else f"{title[:6]}…{title[-12:]}"
        drawn.append(
            tag(
                "rect",
                tag("title", title),
                x=x + 1,
                y=y + 4,
                width=180,
                height=36,
                rx=6,
                class_=style,
            )
        )
        drawn.append(tag("text", short, x=x + 13, y=y + 27, class_="name"))
        drawn.append(tag("text", about, x=x + 191, y=y + 27))
    said, width = (
        "; ".join(f"{boxes[a][0]} → {boxes[b][0]}" for a, b in links),
        len(boxes) * 34 + 410,
    )
    name = f"lineage: {said or ', '.join(boxes)}"
    yield scroll(
        "lineage",
        tag("svg", *drawn, width=width, height=len(boxes) * 48, role="img", aria_label=name),
    )


def training(run: Run) -> Iterator[Html]:
    """Status, key numbers and curves of every artifact but the evaluations."""
    for part in (part for part in run.parts if part.stage != "eval"):
        about = {"status": part.status, "kind": dig(part.made, "kind") or None, "stage": part.stage}
        for name, value in (flat(dig(part.made, "final")) | dig(part.made, "training")).items():
            about[name.replace("eval_", "held-out ").replace("_", " ")] = number(value)
        if "training" in part.made:
            about |= {
                "seconds": None,
                "duration": duration_of(part.made),
                "size": size_of(part.made),
            }
        yield tag("h4", part.name)
        yield join(facts(about), *plots({"": part}, POINTS // run.scale))
        scores, kl = (dict(part.curves.get(f"objective/{name}", [])) for name in ("scores", "kl"))
        if path := [(kl[step], score) for step, score in scores.items() if step in kl]:
            picture = plot(
                "score by KL",
                "update by update",
                {"": (0, path)},
                span([x for x, _ in path]),
                400,
                "nats",
            )
            yield join(tag("h5", "what the score costs"), tag("div", picture, class_="plots"))
        drawn = list(lines_of(part.path / "rollouts.jsonl"))[-ITEMS // run.scale :]
        if drawn:
            cards = []
            for x in drawn:
                asked = (
                    x["prompt"]
                    if isinstance(x["prompt"], str)
                    else "\n\n".join(t["content"] for t in x["prompt"])
                )
                said = join(
                    clip(x["answer"], CHARACTERS), "" if x["ended"] else tag("small", "cut off")
                )
                cards.append(
                    card(
                        clip(asked, CHARACTERS),
                        {f"update {x['step']}, score {number(x['score'])}": said},
                    )
                )
            yield fold(f"the last {len(cards)} answers that were shown", *cards)
        if part.undrawn:
            yield tag(
                "p",
                f"{part.undrawn:,} values or lines of metrics.jsonl are not numbers and not drawn.",
            )


def data(run: Run) -> Iterator[Html]:
    """Rows read, kept and rejected, where they come from, and the first of those rejected."""
    rows, sources, rejected = [], [], []
    for part in run.parts:
        counts, tokens, of = (dig(part.made, "data", key) for key in ("rows", "tokens", "sources"))
        if counts:
            share = tokens.get("train_supervised", 0) / max(tokens.get("train", 0), 1)
            counted = [number(counts.get(key)) for key in COUNTS]
            reasons = (
                ", ".join(f"{n:,} {why}" for why, n in dig(counts, "rejected_by_reason").items())
                or "–"
            )
            rows.append([part.name, *counted, number(tokens.get("train")), f"{share:.0%}", reasons])
        for i, x in enumerate(of):
            counted = [number(n) for n in (len(x["files"]) or None, x["read"], x["kept"])]
            sources.append(
                [
                    None if i else part.name,
                    x["path"],
                    x["format"],
                    *counted,
                    (x["revision"] or "–")[:12],
                ]
            )
        lines = [line for line in lines_of(part.path / "rejected.jsonl") if line]
        if lines:
            first = [
                tag("li", clip(": ".join(str(v) for v in x.values() if v != ""), 300))
                for x in lines[:20]
            ]
            rejected.append(
                fold(
                    f"{part.name}: {len(first)} of {len(lines):,} rejected rows", tag("ul", *first)
                )
            )
    if rows:
        head = [
            "artifact",
            *(f"#{name}" for name in COUNTS.values()),
            "#tokens",
            "#supervised",
            "rejected for",
        ]
        yield table("rows", head, rows)
        yield table(
            "sources",
            ["artifact", "source", "format", "#files", "#read", "#kept", "revision"],
            sources,
        )
    yield from rejected


def evaluation(run: Run) -> Iterator[Html]:
    """Every number with its interval, and the differences between models on the same items."""
    for part in (part for part in run.parts if part.stage == "eval"):
        results, asked = read_json(part.path / "results.json"), dig(part.made, "models")
        models = {label: f"{dig(asked, f'models.{label}', 'reference')}, {number(model.get('parameters'))} parameters"
                  for label, model in dig(results, "models").items()}  # fmt: skip
        yield join(tag("h4", part.name), facts({"status": part.status, **models}))
        for name, task in dig(results, "tasks").items():
            seen = [
                f"{n:,} asked in training of {label}"
                for label, n in dig(task, "overlap").items()
                if n
            ]
            about = [f"{task['n']:,} items"] * ("n" in task)
            about += seen or ["none asked in training"] * bool(task.get("overlap"))
            yield join(tag("h5", name), tag("p", "; ".join(about)))
            yield numbers(name, "metric", task["metrics"])
            yield numbers(name, "difference", task["differences"])


def numbers(task: str, title: str, metrics: dict[str, dict[str, Any]]) -> Html:
    """The table of a task's metrics, or of its paired differences: one is real where its interval leaves zero out."""
    rows, paired = [], title == "difference"
    for metric, cells in metrics.items():
        known = [c[k] for c in cells.values() for k in ("low", "value", "high") if drawable(c[k])]
        (low, high), size = (
            span([0, 0 if paired else 1, *known]),
            max(map(abs, known), default=0) or 1,
        )
        decimals = min(
            max(3 - math.floor(math.log10(size)), 2 if size < 1000 else 0), 12 if size < 0.1 else 3
        )
        named = join(metric, tag("small", f" {number(low)} to {number(high)}"))
        for i, (label, c) in enumerate(cells.items()):
            value, a, b = (
                number(c[k], decimals, "+" if paired else "") for k in ("value", "low", "high")
            )
            row = [
                None if i else named,
                label,
                value,
                f"[{a}, {b}]",
                number(c["n"]),
                strip(c, low, high),
            ]
            rows.append(
                row
                + ["differs" if c["low"] > 0 or c["high"] < 0 else "not shown to differ"] * paired
            )
    head = [
        f"{title} and scale",
        "model",
        "#value",
        "#95 % interval",
        "#n",
        "picture",
        *["verdict"] * paired,
    ]
    return table(f"{task}: {title}s", head, rows) if rows else Html()


def card(prompt: object, answers: dict[str, Html]) -> Html:
    return tag("article", tag("div", prompt, class_="prompt"), facts(answers, "answers"))


def samples(run: Run) -> Iterator[Html]:
    """The recipes' prompts before and after each training, then items of the evaluations, the models side by side."""
    most, count = CHARACTERS // run.scale, ITEMS // run.scale
    prompts: dict[str, dict[str, Html]] = {}
    for part in run.parts:
        for line in (line for line in lines_of(part.path / "samples.jsonl") if "when" in line):
            answer = join(
                clip(line["answer"], most), "" if line.get("ended") else tag("small", "cut off")
            )
            prompts.setdefault(str(line["prompt"]), {})[f"{part.name}, {line['when']}"] = answer
    if prompts:
        yield tag("p", f"{min(len(prompts), count):,} of {len(prompts):,} prompts of the recipes")
        yield from (
            card(clip(prompt, most), answers) for prompt, answers in list(prompts.items())[:count]
        )
    for part in (part for part in run.parts if part.stage == "eval"):
        tasks: dict[str, dict[Any, dict[str, dict]]] = {}
        for line in (line for line in lines_of(part.path / "samples.jsonl") if "prompt" in line):
            tasks.setdefault(line["task"], {}).setdefault(line["item"], {})[line["model"]] = line
        for task, items in tasks.items():
            scores = {
                item: {plain(x["scores"]) for x in by.values() if "scores" in x}
                for item, by in items.items()
            }
            differ, cards = [item for item in items if len(scores[item]) > 1], []
            for by in (items[item] for item in list(dict.fromkeys([*differ, *items]))[:count]):
                first = next(iter(by.values()))
                answers = (
                    {"expected answer": clip(first["reference"], most)}
                    if first.get("reference")
                    else {}
                )
                for model, x in by.items():
                    text = "\n\n".join(x["answers"]) if "answers" in x else plain(x.get("values"))
                    answers[model] = join(
                        clip(text, most), tag("small", plain(x.get("scores", "")))
                    )
                cards.append(card(clip(first["prompt"], most), answers))
            about = f"{len(cards):,} of {len(items):,} items; the scores differ on {len(differ):,}, shown first"
            yield fold(f"{part.name}, {task}: {about}", *cards)


def recipes(run: Run) -> Iterator[Html]:
    """What was asked, and with what it was made."""
    for part in run.parts:
        yield fold(f"{part.name}: recipe", tag("pre", clip(part.recipe, 20_000), tabindex=0))
        about = {key: plain(dig(part.made, key)) or None for key in ORIGIN}
        yield fold(f"{part.name}: versions, machine, seed", facts(about, "origin"))


def comparison(a: Run, b: Run) -> Iterator[Html]:
    """Artifacts of one name in both runs: what was asked differently, what came out, and their curves together."""
    from llmpipe.run.identity import changes

    there = {part.name: part for part in b.parts}
    for part in a.parts:
        yield tag("h3", part.name)
        other = there.pop(part.name, None)
        if other is None:
            yield tag("p", f"only in {a.name}")
            continue
        asked = changes(dig(part.made, "asked"), dig(other.made, "asked"))
        rows: list[list[object]] = [
            [at, clip(plain(x), 200), clip(plain(y), 200)] for at, x, y in asked
        ]
        yield (
            table("recipe", ["differs in", a.name, b.name], rows)
            if rows
            else tag("p", "the same recipe and inputs")
        )
        came = [flat(dig(p.made, "final")) | dig(p.made, "training") for p in (part, other)]
        rows = [[at, number(came[0].get(at)), number(came[1].get(at))] for at in came[0] | came[1]]
        yield table("results", ["result", f"#{a.name}", f"#{b.name}"], rows)
        yield from plots({"A": part, "B": other}, POINTS // a.scale)
    yield from (join(tag("h3", name), tag("p", f"only in {b.name}")) for name in there)


def page(runs: list[Run]) -> str:
    """The whole document: the comparison of two runs, then each run in its sections."""
    body, menu = [], []
    if len(runs) == 2:
        body.append(tag("section", tag("h2", "Comparison"), *comparison(*runs), id="comparison"))
        menu.append(tag("ul", tag("li", tag("a", "Comparison", href="#comparison"))))
    for run in runs:
        done = sum(part.status == "finished" for part in run.parts)
        about = f"{len(run.parts)} artifact{'s' * (len(run.parts) > 1)}, {done} finished"
        body += [tag("h2", run.name, id=f"{run.prefix}run"), tag("p", about)]
        links = [tag("a", run.name, href=f"#{run.prefix}run")]
        for make in (lineage, training, data, evaluation, samples, recipes):
            name, title = f"{run.prefix}{make.__name__}", make.__name__.capitalize()
            content = join(*make(run)) or tag("p", "nothing in this run")
            body.append(tag("section", tag("h3", title), content, id=name))
            links.append(tag("a", title, href=f"#{name}"))
        menu.append(tag("ul", *(tag("li", link) for link in links)))
    title = " and ".join(run.name for run in runs)
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return HEAD + join(
        Html(f"<style>{style}</style>"), tag("title", f"{title}, llmpipe report"), Html("</head><body>"),
        tag("a", "to the content", href="#content", class_="skip"), tag("header", tag("h1", "llmpipe report")),
        tag("nav", *menu, aria_label="sections"), tag("main", *body, id="content"),
        tag("footer", f"llmpipe {__version__}, {time.strftime('%Y-%m-%d %H:%M')}"), Html("</body></html>\n"),
    )  # fmt: skip


def write_report(paths: list[Path], out: Path | None = None) -> Path:
    """Write the page of one run, or of two beside each other, and return where it lies. Raises UserError."""
    names, two, runs = [path.resolve().name for path in paths], len(paths) == 2, []
    for letter, name, path in zip("AB", names, paths, strict=False):
        parts = [read(artifact) for artifact in artifacts(path)]
        if not parts:
            raise UserError(
                f"{path}: holds no artifacts", "give the folder that `run:` of a recipe names"
            )
        runs.append(
            Run(f"{letter}: {name}", f"{letter.lower()}-", parts) if two else Run(name, "", parts)
        )
    out = out or paths[0] / (f"report-vs-{names[1]}.html" if two else "report.html")
    for scale in (1, 2, 4, 8, 16):
        text = page([run._replace(scale=scale) for run in runs]).encode()
        if len(text) <= MOST_BYTES:
            break
    try:
        temporary = out.with_name(f".{out.name}.{os.getpid()}")
        temporary.write_bytes(text)
        temporary.replace(out)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written: {error.strerror}", "name another file", RESOURCES
        ) from error
    return out
