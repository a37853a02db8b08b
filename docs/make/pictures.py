"""The pictures of the road, as SVG, from the figures of real runs.

    python docs/make/pictures.py

`figures.json` beside this file holds the figures: each entry says which run they are of, and the
pages say it again. An SVG follows the reader's light or dark, here and where GitHub shows it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FOLDER = HERE.parent / "pictures"
FIGURES: dict[str, Any] = json.loads((HERE / "figures.json").read_text(encoding="utf-8"))

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 616, 36, 214
STYLE = """
 text { font: 13px system-ui, sans-serif; fill: #24292f }
 .quiet { fill: #59636e } .mid { text-anchor: middle } .end { text-anchor: end }
 .axis { stroke: #8c959f; stroke-width: 1 } .grid { stroke: #8c959f; stroke-opacity: .3 }
 .a { stroke: #0a7d6c; fill: #0a7d6c } .b { stroke: #b3590a; fill: #b3590a }
 .line { fill: none; stroke-width: 2 } text.a, text.b { stroke: none } .box { fill-opacity: .12 }
 @media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .quiet { fill: #9aa4af }
  .a { stroke: #3fc8b2; fill: #3fc8b2 } .b { stroke: #f0a35e; fill: #f0a35e }
  .line { fill: none }
 }
"""


def svg(title: str, *parts: str, height: int = HEIGHT) -> str:
    """A whole picture."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img">'
    )
    return "\n".join([head, f"<title>{title}</title>", f"<style>{STYLE}</style>", *parts, "</svg>"])


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{words}</text>'


def rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def scaled(value: float, low: float, high: float, begin: float, end: float) -> float:
    return begin + (value - low) / (high - low) * (end - begin)


def curves(
    title: str,
    lines: dict[str, list[tuple[float, float]]],
    across: str,
    ticks: tuple[list[float], list[float]],
) -> str:
    """One or two curves over a common axis; `ticks` of x and of y, which they reach from end to
    end."""
    (x_low, *_, x_high), (y_low, *_, y_high) = ticks
    parts = [rule(LEFT, BOTTOM, RIGHT, BOTTOM, "axis")]
    for tick in ticks[1]:
        y = scaled(tick, y_low, y_high, BOTTOM, TOP)
        parts += [rule(LEFT, y, RIGHT, y, "grid"), text(LEFT - 8, y + 4, f"{tick:g}", "quiet end")]
    for tick in ticks[0]:
        x = scaled(tick, x_low, x_high, LEFT, RIGHT)
        parts.append(text(x, BOTTOM + 18, f"{tick:g}", "quiet mid"))
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 38, across, "quiet mid"))
    for number, (name, points) in enumerate(lines.items()):
        kind = "ab"[number]
        places = [
            (scaled(x, x_low, x_high, LEFT, RIGHT), scaled(y, y_low, y_high, BOTTOM, TOP))
            for x, y in points
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" class="line {kind}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" class="{kind}"/>' for x, y in places]
        parts.append(text(LEFT + 8 + 270 * number, 20, f"● {name}", kind))
    return svg(title, *parts)


def bars(title: str, values: dict[str, float], unit: str, highest: float) -> str:
    """Bars from the left, the last one in colour."""
    parts, height = [], 46 + 40 * len(values)
    for number, (name, value) in enumerate(values.items()):
        y = 16 + 40 * number
        length = scaled(value, 0, highest, 0, 340)
        kind = "a" if number == len(values) - 1 else "b"
        parts.append(text(200, y + 18, name, "end"))
        parts.append(f'<rect x="212" y="{y}" width="{length:.1f}" height="26" class="{kind}"/>')
        parts.append(text(220 + length, y + 18, f"{value:,g}"))
    parts.append(text(212, height - 8, unit, "quiet"))
    return svg(title, *parts, height=height)


def intervals(title: str, values: dict[str, list[float]], unit: str, ticks: list[float]) -> str:
    """Numbers with their 95 % intervals."""
    begin, parts, height = 170, [], 62 + 34 * len(values)
    low, high = ticks[0], ticks[-1]
    for tick in ticks:
        x = scaled(tick, low, high, begin, RIGHT)
        parts += [
            rule(x, 10, x, height - 46, "grid"),
            text(x, height - 28, f"{tick:g}", "quiet mid"),
        ]
    parts.append(text((begin + RIGHT) / 2, height - 8, unit, "quiet mid"))
    for number, (name, interval) in enumerate(values.items()):
        y = 26 + 34 * number
        value, *ends = (scaled(it, low, high, begin, RIGHT) for it in interval)
        kind = "b" if number == 0 else "a"
        parts.append(text(begin - 16, y + 4, name, "end"))
        parts.append(rule(ends[0], y, ends[1], y, f"line {kind}"))
        parts.append(f'<circle cx="{value:.1f}" cy="{y}" r="4.5" class="{kind}"/>')
    return svg(title, *parts, height=height)


def box(x: float, y: float, words: list[str], kind: str = "a", width: int = 104) -> str:
    """A box with a line or two of words."""
    first = y + (26 if len(words) == 1 else 19)
    lines = [
        text(x + width / 2, first + 16 * number, line, "mid" if not number else "quiet mid")
        for number, line in enumerate(words)
    ]
    frame = f'<rect x="{x}" y="{y}" width="{width}" height="44" rx="7" class="{kind} box"/>'
    return "\n".join([frame, *lines])


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a dot where it leads."""
    return rule(x1, y1, x2, y2, "axis") + f'<circle cx="{x2}" cy="{y2}" r="3" class="a"/>'


def road(words: dict[str, list[str]]) -> str:
    """What follows what."""
    at = {
        "pretrain": (16, 88),
        "sft": (176, 88),
        "reward": (336, 16),
        "dpo": (336, 88),
        "kto": (336, 160),
        "ppo": (496, 16),
        "eval": (496, 160),
    }
    ways = [
        "pretrain sft",
        "sft reward",
        "sft dpo",
        "sft kto",
        "reward ppo",
        "dpo eval",
        "kto eval",
    ]
    parts = []
    for way in ways:
        (x1, y1), (x2, y2) = (at[name] for name in way.split())
        parts.append(arrow(x1 + 104, y1 + 22, x2, y2 + 22))
    parts.append(arrow(548, 60, 548, 160))
    parts += [box(x, y, words[name], "b" if name == "eval" else "a") for name, (x, y) in at.items()]
    return svg("The stages, and what each begins with", *parts, height=222)


def low_rank(words: list[str]) -> str:
    """W, and the two thin matrices beside it."""
    whole, down, up, note = words
    parts = [
        '<rect x="60" y="24" width="150" height="150" class="b box"/>',
        text(135, 104, "W", "mid"),
        text(135, 196, whole, "quiet mid"),
        text(246, 104, "+", "mid"),
        '<rect x="290" y="24" width="26" height="150" class="a box"/>',
        text(303, 104, "B", "mid"),
        text(303, 196, up, "quiet mid"),
        text(342, 104, "×", "mid"),
        '<rect x="368" y="86" width="150" height="26" class="a box"/>',
        text(443, 104, "A", "mid"),
        text(443, 136, down, "quiet mid"),
        text(320, 228, note, "quiet mid"),
    ]
    return svg("A low-rank adapter beside a frozen weight", *parts, height=240)


def pictures() -> dict[str, str]:
    """Every picture, by its file's name."""
    drawn = {
        "road.svg": road(FIGURES["road"]["words"]),
        "road.zh.svg": road(FIGURES["road"]["chinese"]),
        "lora.svg": low_rank(FIGURES["lora"]["words"]),
        "lora.zh.svg": low_rank(FIGURES["lora"]["chinese"]),
    }
    for name, figure in FIGURES.items():
        if figure.get("as") == "curves":
            ticks = (figure["x"], figure["y"])
            picture = curves(figure["title"], figure["lines"], figure["across"], ticks)
        elif figure.get("as") == "bars":
            picture = bars(figure["title"], figure["values"], figure["unit"], figure["highest"])
        elif figure.get("as") == "intervals":
            picture = intervals(figure["title"], figure["values"], figure["unit"], figure["x"])
        else:
            continue
        drawn[f"{name}.svg"] = picture
    return drawn


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, picture in pictures().items():
        (FOLDER / name).write_text(picture + "\n", encoding="utf-8")
