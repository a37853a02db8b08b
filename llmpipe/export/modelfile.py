"""A Modelfile for Ollama: the chat template in Go's language, and what ends an answer.

What a template puts around each turn is learned by rendering conversations with marks in them; what
was learned writes the questions of the probe anew, and conversations that are awkward. Where that
is not what the template writes, there is no TEMPLATE and this is said.

Of Ollama (0.33, its packages `parser`, `template` and `server`): messages that follow one another
in one role are joined by an empty line before a template sees them; a text in quotes is read as it
is, without escapes, and loses what is not printable; and from 0.30 on the Jinja template in the
GGUF file is taken in place of TEMPLATE where it knows tools or thoughts and TEMPLATE does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmpipe.export.ask import written
from llmpipe.export.source import Source
from llmpipe.export.vocabulary import begins_with_bos
from llmpipe.run.probe import Question

MARKS = {"system": "\u2063S\u2063", "user": "\u2063U\u2063", "assistant": "\u2063A\u2063"}
AGAIN = "\u2063V\u2063"
"""What no template holds, and no template takes away."""

BLANKS = " \t\n\v\f\r"
"""What TEMPLATE takes for blank; Go's language sees bytes, so those of other alphabets stay."""

ODD = '\n\t "{{ .Role }}" \\n {% x %} """ \u3000\u00e9 </s> \n'
AWKWARD = [
    [("user", ODD), ("assistant", ODD), ("user", "")],
    [("user", ""), ("assistant", ""), ("user", ODD)],
    [("system", ODD), ("user", ODD)],
    [("system", "a"), ("assistant", "b"), ("user", "c")],
    [("assistant", "a"), ("user", "b")],
]
LATER = [("user", "a"), ("assistant", "b"), ("system", ODD), ("user", "c")]

NATIVE = "Ollama from 0.30 on takes the template in the GGUF file"

_IS_BLANK = f"eq (index $text %s) {' '.join(str(ord(blank)) for blank in BLANKS)}"
TRIM = (
    '{{ define "trim" }}{{ $text := . }}'
    f"{{{{ range len . }}}}{{{{ if {_IS_BLANK % 0} }}}}{{{{ $text = slice $text 1 }}}}"
    "{{ else }}{{ break }}{{ end }}{{ end }}"
    "{{ range len $text }}{{ $end := len (slice $text 1) }}"
    f"{{{{ if {_IS_BLANK % '$end'} }}}}{{{{ $text = slice $text 0 $end }}}}"
    "{{ else }}{{ break }}{{ end }}{{ end }}"
    "{{ $text }}{{ end }}"
)
"""A content without the blanks around it, which Go's language has no word for."""

REFUSAL = '{{ index "this template knows no such message" -1 }}'
"""There is no such letter: Ollama answers with an error that shows this line."""


@dataclass(frozen=True)
class Turns:
    """What a template puts around turns, less the token that Ollama begins a prompt with."""

    preamble: str
    """In front of a conversation that no system message begins; its default one is in here."""
    around: dict[str, tuple[str, str]]
    """In front of and behind the content, by role; no other role may speak."""
    trimmed: frozenset[str]
    """Roles whose contents lose the blanks around them."""
    opening: str
    """Of the answer."""
    joined: bool
    """Whether a system message and the user's are one turn."""
    anywhere: bool = True
    """Whether a system message may come later."""

    def write(self, messages: list[dict[str, Any]]) -> str | None:
        """A conversation as TEMPLATE writes it; None where that refuses it."""
        text, last = "", ""
        for turn in messages:
            role = turn["role"]
            if role not in self.around or (role == "system" and last and not self.anywhere):
                return None
            before, behind = self.around[role]
            if self.joined and (last, role) == ("system", "user"):
                before = ""
            if not last and role != "system":
                text += self.preamble
            content = turn["content"].strip(BLANKS) if role in self.trimmed else turn["content"]
            text += before + content + behind
            last = role
        return text + self.opening

    def template(self) -> str:
        """In Go's language: the same as `write`."""
        preamble = _literal(self.preamble)
        if preamble:
            preamble = f'{{{{ if and (eq $last "") (ne .Role "system") }}}}{preamble}{{{{ end }}}}'
        branches = "{{ else ".join(
            f"{self._condition(role)} }}}}{self._turn(role)}" for role in self.around
        )
        return (
            f"{TRIM if self.trimmed else ''}"
            f'{{{{ $last := "" }}}}{{{{ range .Messages }}}}{preamble}'
            f"{{{{ {branches}{{{{ else }}}}{REFUSAL}{{{{ end }}}}"
            f"{{{{ $last = .Role }}}}{{{{ end }}}}{_literal(self.opening)}"
        )

    def _condition(self, role: str) -> str:
        if role == "system" and not self.anywhere:
            return 'if and (eq .Role "system") (eq $last "")'
        return f"if eq .Role {json.dumps(role)}"

    def _turn(self, role: str) -> str:
        before, behind = map(_literal, self.around[role])
        if self.joined and role == "user":
            before = f'{{{{ if ne $last "system" }}}}{before}{{{{ end }}}}'
        content = '{{ template "trim" .Content }}' if role in self.trimmed else "{{ .Content }}"
        return before + content + behind


def _literal(text: str) -> str:
    """A text as Go's language has it between its signs: nothing of it is read as a sign, and
    nothing of it is lost."""
    escaped = json.dumps(text, ensure_ascii=False)
    printable = (c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped)
    return f"{{{{ {''.join(printable)} }}}}" if text else ""


def write_modelfile(source: Source, gguf: Path) -> list[str]:
    """Write the Modelfile beside a GGUF file; what its user has to know."""
    turns = turns_of(source)
    stops = {stop: quoted(_word(source, stop)) for stop in source.probe.stops}
    lines = [f"FROM ./{gguf.name}"]
    lines += [f'TEMPLATE """{turns.template()}"""'] if turns else []
    lines += [f"PARAMETER stop {stop}" for stop in stops.values() if stop]
    gguf.with_name("Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    remarks = list(_remarks(source, turns))
    unsaid = ", ".join(str(stop) for stop, text in stops.items() if not text)
    remarks += [f"no stop for token {unsaid}, which Ollama cannot read there"] if unsaid else []
    return [f"Modelfile: {remark}" for remark in remarks]


def quoted(text: str) -> str | None:
    """A text as Ollama reads it from a Modelfile; None where it would read another one."""
    if '"""' in text or not all(c.isprintable() or c in "\n\t" for c in text):
        return None
    quote = '"""' if '"' in text else '"'
    return f"{quote}{text}{quote}"


def _word(source: Source, token: int) -> str:
    word: str = source.tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return word


def _remarks(source: Source, turns: Turns | None) -> Iterator[str]:
    """What of the template TEMPLATE does not say."""
    template = source.tokenizer.chat_template
    if not template:
        return
    if not turns:
        problem = "has no TEMPLATE, since Go's language cannot say what this one does"
        yield f"{problem}; {NATIVE}, or one that it knows"
        return
    if unknown := " and ".join(_beyond(str(template))):
        yield f"its TEMPLATE knows no {unknown}; {NATIVE}, which does"
    plain = _Rendered(source)
    text = plain(("user", ""))
    if text is not None and not text.startswith(plain.bos):
        yield f"Ollama begins every prompt with {plain.bos}, and the template does not"
    if text != _Rendered(source, {"date_string": "1 Jan 2000"})(("user", "")):
        yield "its TEMPLATE says the same date every day"


def _beyond(template: str) -> Iterator[str]:
    """What a template knows, as Ollama takes it, that TEMPLATE does not."""
    if "tools" in template or "tool_call" in template:
        yield "tools"
    if "<think>" in template and "</think>" in template:
        yield "thoughts"


# --- what a template does -------------------------------------------------------------------------


class _Rendered:
    """Conversations of (role, content), rendered by the template."""

    def __init__(self, source: Source, kwargs: dict[str, Any] | None = None):
        self.source = source
        self.kwargs = source.template_kwargs | (kwargs or {})
        tokenizer = source.tokenizer
        self.bos: str = tokenizer.bos_token if begins_with_bos(tokenizer) else ""
        """What llama.cpp puts in front of every prompt."""

    def __call__(self, *turns: tuple[str, str]) -> str | None:
        question = Question(name="", messages=_messages(turns), continuation="")
        return written(self.source.tokenizer, question, self.kwargs)

    def less_bos(self, *turns: tuple[str, str]) -> str | None:
        text = self(*turns)
        return None if text is None else text.removeprefix(self.bos)


def _messages(turns: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def turns_of(source: Source) -> Turns | None:
    """What the template puts around turns; None where that is not all that it does."""
    render = _Rendered(source)
    turns = _learned(render) if source.tokenizer.chat_template else None
    if not turns or not _writes_the_questions(turns, source, render.bos):
        return None
    if not all(_same(turns, render, conversation) for conversation in AWKWARD):
        return None
    later = render.less_bos(*LATER)
    return replace(turns, anywhere=later is not None and later == turns.write(_messages(LATER)))


def _learned(render: _Rendered) -> Turns | None:
    """The texts around marks."""
    user, assistant = (("user", MARKS["user"]), ("assistant", MARKS["assistant"]))
    plain = render.less_bos(user)
    long = render.less_bos(user, assistant, ("user", AGAIN))
    if plain is None or long is None:
        return None
    begin, _, tail = plain.partition(MARKS["user"])
    answered, _, rest = long.partition(MARKS["user"])[2].partition(MARKS["assistant"])
    between = rest.partition(AGAIN)[0]
    closed = _closed(render)
    if closed is None or not begin.endswith(between.removeprefix(closed)):
        closed = between.removesuffix(_common_end(begin, between))
    before = between.removeprefix(closed)
    ends = tail.removesuffix(_opening(render, closed))
    if not answered.startswith(ends):
        ends = _common_start(tail, answered)
    around = {"user": (before, ends), "assistant": (answered.removeprefix(ends), closed)}
    turns = Turns(begin.removesuffix(before), around, frozenset(), tail.removeprefix(ends), False)
    return _with_blanks(_with_system(turns, render), render)


def _closed(render: _Rendered) -> str | None:
    """What ends an assistant's turn, where a system message may come behind it: in front of a
    user's message it cannot be told from what begins that."""
    system, user = (("system", MARKS["system"]), ("user", MARKS["user"]))
    led = render.less_bos(system, user)
    later = render.less_bos(user, ("assistant", MARKS["assistant"]), system)
    if led is None or later is None:
        return None
    before = led.partition(MARKS["system"])[0]
    middle = later.partition(MARKS["assistant"])[2].partition(MARKS["system"])[0]
    return middle.removesuffix(before) if middle.endswith(before) else None


def _opening(render: _Rendered, closed: str) -> str:
    """What the template writes behind an answer, where another one is to follow."""
    text = render.less_bos(("user", MARKS["user"]), ("assistant", MARKS["assistant"])) or ""
    return text.partition(MARKS["assistant"])[2].removeprefix(closed)


def _with_system(turns: Turns, render: _Rendered) -> Turns:
    """The same, and what stands around a system message, where the template takes one."""
    led = render.less_bos(("system", MARKS["system"]), ("user", MARKS["user"]))
    if led is None or MARKS["system"] not in led:
        return turns
    before, _, rest = led.partition(MARKS["system"])
    behind = rest.partition(MARKS["user"])[0]
    of_user = turns.around["user"][0]
    joined = not behind.endswith(of_user)
    system = (before, behind if joined else behind.removesuffix(of_user))
    return replace(turns, around={"system": system, **turns.around}, joined=joined)


def _with_blanks(turns: Turns, render: _Rendered) -> Turns:
    """The same, and whose contents are trimmed."""
    roles = [role for role in ("system", "user", "assistant") if role in turns.around]
    text = render(*((role, f" \t{MARKS[role]}\t ") for role in roles))
    if text is None:
        return turns
    trimmed = frozenset(role for role in roles if f"\t{MARKS[role]}\t" not in text)
    return replace(turns, trimmed=trimmed)


def _same(turns: Turns, render: _Rendered, conversation: list[tuple[str, str]]) -> bool:
    """Whether both write a conversation alike; what the template refuses is never asked for."""
    text = render.less_bos(*conversation)
    return text is None or text == turns.write(_messages(conversation))


def _writes_the_questions(turns: Turns, source: Source, bos: str) -> bool:
    """Whether it writes the questions of the probe as the template does, tools aside."""
    return all(
        said.text.removeprefix(bos) == turns.write(said.question.messages)
        for said in source.probe.said
        if said.question.messages and not said.question.tools and said.text is not None
    )


def _common_start(one: str, other: str) -> str:
    length = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    return one[:length]


def _common_end(one: str, other: str) -> str:
    return _common_start(one[::-1], other[::-1])[::-1]
