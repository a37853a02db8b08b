"""What `sample` has drawn and made, in words."""

from __future__ import annotations

from typing import Any

from llmpipe.report.text import is_number, number, percent, text_of


def told(final: dict[str, Any], write: str) -> dict[str, str]:
    """What a manifest's `final` says, in a few lines by their labels; `write`: the recipe's."""

    def shown(name: str) -> str:
        return number(final.get(name), digits=3)

    drawn = f"{number(final.get('answers'))} to {number(final.get('prompts'))} prompts"
    if unfinished := _count(final, "answers") - _count(final, "ended"):
        drawn += f", {number(unfinished)} never ended"
    if no_text := _count(final, "no_text"):
        drawn += f", {number(no_text)} no text"
    best, worst = shown("score_best"), shown("score_worst")
    said = {
        "answers": drawn,
        "scores": f"mean {shown('score')}; of a prompt the best {best}, the worst {worst}",
    }
    if is_number(solved := final.get("solved")):
        right = percent(final.get("right"))
        said["solved"] = f"{percent(solved)} % of prompts, by {right} % of answers"
    made = f"{number(final.get('rows'))} rows of {write}"
    without = final.get("without")
    for reason, count in without.items() if isinstance(without, dict) else ():
        made += f"; {number(count)} prompts without: {text_of(reason)}"
    return said | {"made": made}


def _count(final: dict[str, Any], name: str) -> int | float:
    value = final.get(name)
    return value if is_number(value) else 0
