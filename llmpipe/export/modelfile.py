"""A Modelfile for Ollama: the chat template in Go's language, the system message, the stop tokens.

Ollama does not render Jinja. What a template puts around each turn is learned by rendering
conversations with marks in them; what was learned writes the questions of the probe anew, and
where that is not what the template writes, there is no TEMPLATE and this is said.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpipe.export.ask import written
from llmpipe.export.source import Source
from llmpipe.run.probe import Question

MARKS = {"system": "\u2063S\u2063", "user": "\u2063U\u2063", "assistant": "\u2063A\u2063"}
AGAIN = "\u2063V\u2063"
"""What no template holds, and no template takes away."""


@dataclass(frozen=True)
class Turns:
    """What a template puts around turns."""

    around: dict[str, tuple[str, str]]
    """In front of and behind the content, by role."""
    opening: str
    """Of the answer."""
    system: str
    """The system message where a conversation has none."""

    def write(self, messages: list[dict[str, Any]]) -> str:
        """A conversation as the Modelfile's template writes it."""
        begins = bool(messages) and messages[0]["role"] == "system"
        if self.system and not begins:
            messages = [{"role": "system", "content": self.system}, *messages]
        text = ""
        for turn in messages:
            before, behind = self.around[turn["role"]]
            text += before + turn["content"] + behind
        return text + self.opening

    def template(self) -> str:
        """In Go's language."""
        branches = "{{ else }}".join(
            f"{{{{ if eq .Role {json.dumps(role)} }}}}{_literal(before)}{{{{ .Content }}}}"
            f"{_literal(behind)}"
            for role, (before, behind) in self.around.items()
        )
        ends = "{{ end }}" * len(self.around)
        return f"{{{{ range .Messages }}}}{branches}{ends}{{{{ end }}}}{_literal(self.opening)}"


def _literal(text: str) -> str:
    """A text as Go's language has it between its signs: nothing of it is read as a sign."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def write_modelfile(source: Source, gguf: Path) -> list[str]:
    """Write the Modelfile beside a GGUF file; what its user has to know."""
    turns = turns_of(source)
    stops = source.tokenizer.convert_ids_to_tokens(source.probe.stops)
    lines = [f"FROM ./{gguf.name}"]
    if turns:
        lines.append(f'TEMPLATE """{turns.template()}"""')
    if turns and turns.system:
        lines.append(f'SYSTEM """{turns.system}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    gguf.with_name("Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if source.tokenizer.chat_template and not turns:
        return ["Modelfile: has no TEMPLATE, since Go's language cannot say what this one does"]
    return ["Modelfile: its template knows no tools"] if turns else []


def turns_of(source: Source) -> Turns | None:
    """What the template puts around turns; None where that is not all that it does."""
    plain = _render(source, ("user", MARKS["user"]))
    led = _render(source, ("system", MARKS["system"]), ("user", MARKS["user"]))
    long = _render(
        source, ("user", MARKS["user"]), ("assistant", MARKS["assistant"]), ("user", AGAIN)
    )
    if not source.tokenizer.chat_template or plain is None or long is None:
        return None
    begin, _, tail = plain.partition(MARKS["user"])
    middle = long.partition(MARKS["user"])[2]
    answered, _, rest = middle.partition(MARKS["assistant"])
    between = rest.partition(AGAIN)[0]
    around: dict[str, tuple[str, str]] = {}
    system = ""
    in_front = _common_end(begin, between)
    if led is not None and MARKS["system"] in led:
        before, _, rest = led.partition(MARKS["system"])
        behind = rest.partition(MARKS["user"])[0]
        in_front = _common_end(in_front, behind)
        around["system"] = (before, behind.removesuffix(in_front))
        if begin.startswith(before) and begin.endswith(behind):
            system = begin.removeprefix(before).removesuffix(behind)
    ends = _common_start(tail, answered)
    around["user"] = (in_front, ends)
    around["assistant"] = (answered.removeprefix(ends), between.removesuffix(in_front))
    turns = Turns(around, tail.removeprefix(ends), system)
    return turns if _writes_the_same(turns, source) else None


def _writes_the_same(turns: Turns, source: Source) -> bool:
    """Whether it writes the questions of the probe as the template does, tools aside."""
    return all(
        said.text == turns.write(said.question.messages)
        for said in source.probe.said
        if said.question.messages and not said.question.tools and said.text is not None
    )


def _render(source: Source, *turns: tuple[str, str]) -> str | None:
    messages = [{"role": role, "content": content} for role, content in turns]
    question = Question(name="", messages=messages, continuation="")
    return written(source.tokenizer, question, source.template_kwargs)


def _common_start(one: str, other: str) -> str:
    length = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    return one[:length]


def _common_end(one: str, other: str) -> str:
    return _common_start(one[::-1], other[::-1])[::-1]
