"""Data in and out: what became of the rows that a stage read, as a flow from left to right.

Sources, then what was kept of them and what was not, then what is trained on and what is held out.
The page draws bands between columns of text, so that every word can be read on a phone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmpipe.report.parts import Part, Run, dig
from llmpipe.report.pieces import Fact
from llmpipe.report.text import Clipped, clip, counted, in_words, number, text_of

HEIGHT = 84  # of all rows that were read, in pixels
PITCHES = (76, 60, 60)
"""Pixels from one text to the next at least, in each column: on a phone a path takes four lines."""
SOURCES = 5  # at most; the others are one


@dataclass(frozen=True)
class Node:
    """Rows at one place of the flow."""

    title: str
    detail: str
    rows: int
    top: float
    height: float
    is_lost: bool = False


@dataclass(frozen=True)
class Band:
    """From one node to another; in a picture of 100 across."""

    path: str
    is_lost: bool


@dataclass(frozen=True)
class Flow:
    """The rows of one artifact, or of several that took the same ones."""

    name: str
    columns: list[list[Node]]
    bands: list[list[Band]]
    """Between each two columns."""
    height: int
    said: str
    """The flow in words, for who cannot see it."""
    facts: list[Fact]
    rejected: list[Clipped]
    """The first of the rows that were rejected."""
    rejected_title: str


@dataclass(frozen=True)
class Amount:
    """A node before it has a place; `origin`: of which node of the column before."""

    title: str
    detail: str
    rows: int
    origin: int = 0
    is_lost: bool = False


def flows(run: Run) -> list[Flow]:
    parts = [part for part in run.parts if part.known("data", "rows")]
    alike: dict[str, list[Flow]] = {}
    for made in map(_flow, parts):
        alike.setdefault(repr(replace(made, name="", said="")), []).append(made)
    return [replace(same[0], name=in_words([one.name for one in same])) for same in alike.values()]


def _flow(part: Part) -> Flow:
    rows = part.known("data", "rows")
    sources = _sources(part)
    kept = [Amount("kept", "", rows["kept"]), *_lost(rows)]
    used = _used(part)
    columns, height = _placed([sources, kept, used])
    bands = [_merged(columns[0], columns[1]), _split(columns[1][0], columns[2])]
    rejected = [line for line in part.lines("rejected.jsonl") if line]
    shown = [
        clip(": ".join(text_of(v) for v in line.values() if v != ""), 300) for line in rejected
    ]
    return Flow(
        name=part.name,
        columns=columns,
        bands=bands,
        height=height,
        said=_said(columns),
        facts=_facts(part),
        rejected=shown[:20],
        rejected_title=f"{len(shown[:20])} of {counted(len(rejected), 'rejected row')}",
    )


def _sources(part: Part) -> list[Amount]:
    amounts = []
    for source in part.known("data", "sources"):
        read = dig(source, "read")
        path = text_of(dig(source, "path") or "unnamed")
        details = [text_of(dig(source, "format") or "")]
        if revision := dig(source, "revision"):
            details.append(f"at {text_of(revision)[:12]}")
        amounts.append(Amount(path, ", ".join(filter(None, details)), _count(read)))
    if len(amounts) > SOURCES:
        rest = amounts[SOURCES - 1 :]
        total = sum(amount.rows for amount in rest)
        amounts[SOURCES - 1 :] = [Amount(f"{len(rest):,} more sources", "", total)]
    return amounts or [Amount("rows", "", part.known("data", "rows")["read"])]


def _count(value: object) -> int:
    return min(value, 10**15) if isinstance(value, int) and value > 0 else 0


def _lost(rows: dict[str, object]) -> Iterator[Amount]:
    if count := _count(rows["rejected"]):
        reasons = dig(rows, "rejected_by_reason").items()
        why = ", ".join(f"{number(n)} {text_of(reason)}" for reason, n in reasons)
        yield Amount("rejected", why, count, is_lost=True)


def _used(part: Part) -> list[Amount]:
    rows, tokens = part.known("data", "rows"), part.known("data", "tokens")
    trained = _tokens(tokens["train"], tokens["train_supervised"], part.stage)
    use = "to answer" if part.stage == "sample" else "to train on"
    used = [Amount(use, trained, _count(rows["train"]))]
    if held_out := _count(rows["eval"]):
        text = _tokens(tokens.get("eval", 0), tokens.get("eval_supervised", 0), part.stage)
        used.append(Amount("held out", text, held_out))
    if unseen := _count(rows["unseen"]):
        used.append(Amount("left out", "by the source's weight", unseen, is_lost=True))
    return used


def _tokens(count: int, supervised: int, stage: str) -> str:
    if not count:
        return ""
    if stage in ("ppo", "grpo", "sample"):
        return f"{number(count)} tokens of prompts"
    learned = (200 * supervised + count) // (2 * count)  # in per cent, of numbers of any size
    return f"{number(count)} tokens, {number(learned)} % learned"


def _facts(part: Part) -> list[Fact]:
    """What else became of rows, of what occurred."""
    rows = part.known("data", "rows")
    lengths, sequences = part.known("data", "lengths"), part.known("data", "sequences")
    facts = []
    if lengths:
        said = [number(lengths.get(name)) for name in ("p50", "p95", "max")]
        text = f"{said[0]} in the middle, 95 % up to {said[1]}, longest {said[2]}"
        facts.append(Fact("tokens of a row", text))
    if sequences:
        facts.append(Fact("sequences", number(sequences.get("train"))))
    names = {
        "truncated": "cut to the longest length",
        "split": "split into several",
        "duplicates": "equal to another row",
        "overlap": "held out, but trained on as well",
    }
    facts += [Fact(title, number(rows[name])) for name, title in names.items() if rows.get(name)]
    return facts


# --- places ---------------------------------------------------------------------------------------


def _placed(columns: list[list[Amount]]) -> tuple[list[list[Node]], int]:
    """Bars whose heights are the rows, far enough from each other for the texts beside them."""
    most = max(1, *(sum(amount.rows for amount in column) for column in columns))
    placed = []
    for pitch, column in zip(PITCHES, columns, strict=True):
        nodes = []
        top = 0.0
        for amount in column:
            height = round(max(amount.rows / most * HEIGHT, 2), 1)
            nodes.append(
                Node(amount.title, amount.detail, amount.rows, top, height, amount.is_lost)
            )
            top = round(top + max(height + 6, pitch), 1)
        placed.append(nodes)
    ends = [
        max(node.top + node.height, node.top + pitch - 8)
        for pitch, nodes in zip(PITCHES, placed, strict=True)
        for node in nodes
    ]
    return placed, round(max(ends))


def _band(from_top: float, from_height: float, to_top: float, to_height: float) -> str:
    a, b = round(from_top, 1), round(from_top + from_height, 1)
    c, d = round(to_top, 1), round(to_top + to_height, 1)
    return f"M0 {a}C50 {a} 50 {c} 100 {c}V{d}C50 {d} 50 {b} 0 {b}Z"


def _merged(sources: list[Node], made: list[Node]) -> list[Band]:
    """From every source to what was kept, and to what was not, in their shares."""
    total = sum(node.rows for node in sources) or 1
    bands = []
    begins = [node.top for node in sources]
    for target in made:
        end = target.top
        for i, source in enumerate(sources):
            share = source.rows / total
            leaves = source.height * target.rows / max(sum(node.rows for node in made), 1)
            arrives = target.height * share
            if leaves > 0 and arrives > 0:
                bands.append(Band(_band(begins[i], leaves, end, arrives), target.is_lost))
            begins[i] += leaves
            end += arrives
    return bands


def _split(kept: Node, used: list[Node]) -> list[Band]:
    total = sum(node.rows for node in used) or 1
    bands = []
    begin = kept.top
    for node in used:
        leaves = kept.height * node.rows / total
        bands.append(Band(_band(begin, leaves, node.top, node.height), node.is_lost))
        begin += leaves
    return bands


def _said(columns: list[list[Node]]) -> str:
    rows = [", ".join(f"{number(n.rows)} {n.title}" for n in nodes) for nodes in columns]
    return f"rows: {' → '.join(rows)}"
