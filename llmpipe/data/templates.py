"""The chat template, and which characters of a rendered conversation the assistant spoke.

Jinja is set up as transformers sets it up, so token ids equal `apply_chat_template(tokenize=True)` (a test holds this).
A template comes with the model and is as untrusted as the model: it runs in Jinja's sandbox, is tried once in a child
process with little memory and time, and every later rendering is bounded in time and size.

Spans of assistant turns come from `{% generation %}` markers where the template has them; otherwise from rendering the
conversation up to each turn; and where a template rewrites earlier turns (Qwen3 drops their thinking) from marks put
around every message. A span always runs to the end of its end-of-turn token, since a model that never sees that token
as a target never learns to stop (transformers#48016), and never includes the whitespace after it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from llmpipe.data.formats import Rejected
from llmpipe.data.tokenizer import Tokenizer, own_template, sha256_of
from llmpipe.errors import UserError

Span = tuple[int, int]
MAX_CHARS = 64_000_000  # a rendered conversation larger than this is no conversation
MAX_SECONDS = 4.0  # for one rendering, and for the first trial of a template

_OTHER = "data.template names another one"
BUILT_IN = ("chatml", "alpaca", "llama3")  # files beside this one
_MARKER = re.compile(r"<\|[^<>|\s'\"]{1,60}\|>|<(?:start|end)_of_turn>")


def template_source(tokenizer_folder: Path, choice: str) -> str | None:
    """The text of the chosen template before it meets a tokenizer: what a cache key hashes."""
    if choice == "auto":
        return own_template(tokenizer_folder)
    built_in = choice in BUILT_IN
    path = Path(__file__).with_name(f"{choice}.jinja") if built_in else Path(choice).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = ", ".join(BUILT_IN)
        raise UserError(f"data.template: {choice}: no such file", f"a file, or one of: auto, {known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.template: {choice}: cannot be read: {error}") from None


# --- Jinja as transformers sets it up, bounded -----------------------------------------------------------------------


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%"})  # the operators that make much out of little

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and isinstance(times, int) and len(text) * times > 1_000_000:
                    raise jinja2.sandbox.SecurityError("a repetition is too long")
        elif operator == "**" and isinstance(right, int | float) and abs(right) > 64:
            raise jinja2.sandbox.SecurityError("a power is too large")
        elif operator == "%" and isinstance(left, str) and re.search(r"\d{5}|\*", left):
            raise jinja2.sandbox.SecurityError("a format is too wide")
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: note where its text begins and ends."""

    tags = {"generation"}

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        environment.extend(written=0, spans=[])

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = caller()
        self.environment.spans.append((self.environment.written, self.environment.written + len(text)))
        return text


class _Namespace(jinja2.utils.Namespace):
    def __init__(*args: Any, **kwargs: Any):
        attrs = dict(*args[1:], **kwargs)
        for name in attrs:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(args[0], attrs)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.sandbox.SecurityError("a namespace cannot hold a name that starts with an underscore")


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Template:
    """A compiled chat template with the tokenizer's special tokens and the recipe's extra variables.

    `ends`: what it writes to end an assistant's turn, the last turn's first (see learn_ends).
    """

    def __init__(self, text: str, special: dict[str, str], kwargs: dict[str, Any], ends: tuple[str, ...] = ()):
        self.text = text
        self.variables = {**special, **kwargs}
        self.ends = ends
        self._end = re.compile("|".join(re.escape(end) for end in sorted(ends, key=len, reverse=True)) or r"(?!)")
        self.environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        self.environment.filters["tojson"] = _tojson
        self.environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda layout: datetime.now().strftime(layout),
            "namespace": _Namespace,
        }
        try:
            self.compiled = self.environment.from_string(text)
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            line = getattr(error, "lineno", 1)
            raise UserError(f"chat template, line {line}: {error}", _OTHER) from None
        self.marked = bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", text))

    def render(self, messages: list[dict], tools: list | None = None, prompt: bool = False) -> tuple[str, list[Span]]:
        """The rendered text and the spans of its `{% generation %}` blocks. Raises Rejected."""
        environment, parts = self.environment, []
        environment.written, environment.spans = 0, []
        try:
            for part in self.compiled.generate(
                messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self.variables
            ):
                parts.append(part)
                environment.written += len(part)
                if environment.written > MAX_CHARS:
                    raise Rejected("template too large", f"renders more than {MAX_CHARS:,} characters")
        except Rejected:
            raise
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            IndexError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as error:
            raise Rejected("template refuses", f"{error}"[:200] or type(error).__name__) from None
        return "".join(parts), environment.spans

    def turns(self, messages: list[dict], tools: list | None = None, first: int = 0) -> tuple[str, list[Span]]:
        """Render a conversation; the spans of the assistant turns from message `first` on, less those of weight 0.

        Each span is (start, end) in characters and ends behind the turn's end-of-turn token. Raises Rejected.
        """
        messages = [_clean(message) for message in messages]
        try:
            text, spans = self.render(messages, tools)
        except Rejected:
            if not any("tool_calls" in message for message in messages):
                raise
            messages = [_arguments_as_text(message) for message in messages]  # as DeepSeek's templates want them
            text, spans = self.render(messages, tools)
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.marked:
            spans = [self._to_end(text, *span) for span in spans]
            if len(spans) != len(spoken):
                if not first and not any("tool_calls" in message or "weight" in message for message in messages):
                    return text, spans  # Phi-3 marks its closing token apart
                raise Rejected("template renders turns inconsistently", "markers and assistant turns differ in number")
        else:
            spans = self._spans(text, messages, tools, spoken)
        for i, (start, end) in zip(spoken, spans, strict=True):
            # What a template silently leaves out would teach something else than the row says.
            for call in messages[i].get("tool_calls") or []:
                if call["function"]["name"] not in text[start:end]:
                    raise Rejected("template drops tool calls", "the chat template does not render them; chatml does")
        if messages[0]["role"] == "system" and messages[0]["content"].strip() not in text:
            raise Rejected("template drops the system turn", "the chat template does not render it; chatml does")
        return text, [
            span for i, span in zip(spoken, spans, strict=True) if i >= first and messages[i].get("weight") != 0
        ]

    def _spans(self, text: str, messages: list[dict], tools: list | None, spoken: list[int]) -> list[Span]:
        """The assistant's turns of a template without markers."""
        spans, marks = [], None
        for i in spoken:
            # A template may refuse a conversation that stops early, or render it differently: then only marks help.
            prompt = self.attempt(messages[:i], tools, True) if i else None
            start = len(prompt) if prompt is not None and text.startswith(prompt) else None
            if i == len(messages) - 1:
                end: int | None = len(text)
            else:
                whole = self.attempt(messages[: i + 1], tools, False)
                end = len(whole) if whole is not None and text.startswith(whole) else None
            if start is not None and end is not None and start < end:
                ends = [match.end() for match in self._end.finditer(text, start, end)]
                spans.append((start, ends[-1]) if ends else self._to_end(text, start, end))
                continue
            marks = self._marks(text, messages, tools) if marks is None else marks
            spans.append(self._by_marks(text, marks, i, start, prompt))
        return spans

    def attempt(self, messages: list[dict], tools: list | None, prompt: bool) -> str | None:
        try:
            return self.render(messages, tools, prompt)[0]
        except Rejected:
            return None

    def _marks(self, text: str, messages: list[dict], tools: list | None) -> list[Span | None]:
        """Where each message's content lies in `text`: found by marking both ends of every content and rendering."""
        marked = []
        for i, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, str) and content.strip():
                core = content.strip()  # templates trim: the marks go inside the outer whitespace
                left = content.index(core)
                content = f"{content[:left]}\ue000{i}\ue001{core}\ue002{i}\ue003{content[left + len(core) :]}"
                message = {**message, "content": content}
            marked.append(message)
        rendered, _ = self.render(marked, tools)
        places: list[list[int | None]] = [[None, None] for _ in messages]
        plain, last = "", 0
        for mark in re.finditer("(\ue000|\ue002)(\\d+)(\ue001|\ue003)", rendered):
            plain += rendered[last : mark.start()]
            last = mark.end()
            if int(mark[2]) < len(places):
                places[int(mark[2])][mark[1] == "\ue002"] = len(plain)
        if plain + rendered[last:] != text:
            raise Rejected("template renders turns inconsistently", "a turn changes with what surrounds it")
        return [None if start is None and end is None else (start, end) for start, end in places]

    def _by_marks(self, text: str, marks: list[Span | None], i: int, begin: int | None, prompt: str | None) -> Span:
        start, stop = marks[i] or (None, None)
        if begin is None:
            begin = start
        if begin is None and prompt is not None:
            # Thinking that is cut out of an earlier turn takes the first mark along, and the prompt may end with
            # "<think>": the turn begins where the prompt and the conversation part.
            begin = shared(prompt, text)
        before = max((m[1] for m in marks[:i] if m and m[1] is not None), default=0)
        after = min((m[0] for m in marks[i + 1 :] if m and m[0] is not None), default=len(text))
        if begin is None or not before <= begin <= (begin if start is None else start) <= (stop or begin) <= after:
            raise Rejected("template renders turns inconsistently", f"message {i + 1} cannot be found again")
        end = self._end.search(text, stop or begin)
        if not end or end.end() > after:
            raise Rejected("end of turn not supervised", f"message {i + 1} has no end-of-turn token")
        return begin, end.end()

    def _to_end(self, text: str, start: int, end: int) -> Span:
        """Move the end of a marked span to just behind its end-of-turn token, if there is one."""
        inside = [match.end() for match in self._end.finditer(text, start, end)]
        if inside and not text[inside[-1] : end].strip():
            return start, inside[-1]
        space = end
        while space < len(text) and text[space].isspace():
            space += 1
        after = self._end.match(text, space)
        return start, after.end() if after else end

    def learn_ends(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        """What ends the assistant's turns, found by rendering a small conversation and looking behind its words.

        Most often one token; Cohere writes two without a space, and the last of them stops a generation. Raises
        UserError when there is none.
        """
        token = "|".join(re.escape(token) for token in tokenizer.markers()) or r"(?!)"
        try:
            text, _ = self.render(_talk("user", "assistant", "user", "assistant"))
        except Rejected as error:
            raise UserError(f"the chat template cannot render a conversation: {error.detail}", _OTHER) from None
        at = [text.find(f"turn{i}") for i in range(4)]
        if min(at) < 0:
            raise UserError("the chat template leaves out turns of a conversation", _OTHER)
        final = re.compile(f"(?:{token})+").search(text, at[3])
        if not final:
            raise UserError(
                "the chat template writes no end-of-turn token after the assistant: a model would never learn to stop",
                "end the assistant's turn with {{ eos_token }}, or set data.template: chatml",
            )
        ends = [final.group()]
        if re.sub(token, "", text[final.end() :]).strip():
            # Llama 3's first template always goes on with the next header: only the first token ends the turn.
            ends = [re.compile(token).match(text, final.start()).group()]
        between = re.compile(token).findall(text, at[1], at[2])
        # gpt-oss ends inner turns with another token; one token alone would be the next turn's header.
        if len(between) > 1 and not "".join(between).startswith(ends[0]):
            ends.append(between[0])
        return tuple(ends)


def shared(a: Sequence, b: Sequence) -> int:
    """How many items two sequences have in common from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _talk(*roles: str) -> list[dict]:
    return [{"role": role, "content": f"turn{i}"} for i, role in enumerate(roles)]


_THOUGHT = ("reasoning_content", "thinking", "reasoning")


def _clean(message: dict) -> dict:
    """What transformers does before rendering: no None values; one thought under every name templates read."""
    message = {name: value for name, value in message.items() if value is not None}
    thought = next((message[name] for name in _THOUGHT if name in message), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _arguments_as_text(message: dict) -> dict:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": text}})
    return {**message, "tool_calls": calls}


@contextmanager
def bounded() -> Iterator[Callable[[], Any]]:
    """Within this block `tick()` restarts a clock, and a rendering that outlasts it is Rejected (main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def late(signum: int, frame: Any) -> None:
        raise Rejected("template too large", f"a row takes longer than {MAX_SECONDS:g} s to render")

    before = signal.signal(signal.SIGALRM, late)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS, MAX_SECONDS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- choosing --------------------------------------------------------------------------------------------------------


class Choice:
    """A tokenizer made ready for training: its template, what was added, and what stops a generation."""

    def __init__(self, folder: Path, template: str, kwargs: dict[str, Any]):
        """`template` as in `data.template`.

        Raises UserError for a missing, broken, endless or hostile template, and for a tokenizer without eos.
        """
        self.tokenizer = tokenizer = Tokenizer(folder)
        self.name, self.notes, self.added = template, [], []
        self.template: Template | None = None
        own_eos = tokenizer.special.get("eos_token")
        text = tokenizer.template if template == "auto" else template_source(folder, template)
        if own_eos is None and (text is None or "eos_token" in text):
            raise UserError(
                "the tokenizer has no end-of-sequence token",
                "set eos_token in its tokenizer_config.json, or set data.template: chatml",
            )
        if text is not None:
            if template in BUILT_IN:
                if tokenizer.bos is not None:  # a base model expects its first token before a conversation, too
                    text = "{{- bos_token }}" + text
            else:
                try_out(text, tokenizer.special, kwargs)
            plain = Template(text, tokenizer.special, kwargs)
            if template != "auto":
                shown = text + (plain.attempt(_talk("user", "assistant"), None, True) or "")
                self.added = tokenizer.add(sorted(set(_MARKER.findall(shown))))
            ends = plain.learn_ends(tokenizer)
            if template != "auto" and "eos_token" not in text:  # one that writes eos_token means the old one
                tokenizer.special["eos_token"] = tokenizer.last(ends[0])
            self.template = Template(text, tokenizer.special, kwargs, ends)
            bos = tokenizer.id("bos_token")
            start = tokenizer.ids(self.template.render(_talk("user", "assistant"))[0])[:2]
            if bos is not None and start == [bos, bos]:
                raise UserError("the chat template writes the first token twice", _OTHER)
        if "eos_token" not in tokenizer.special:
            tokenizer.special["eos_token"] = tokenizer.last(self.template.ends[0])
        self.text_eos = own_eos or tokenizer.special["eos_token"]  # what ends a plain text
        ends = self.template.ends[:1] if self.template else ()
        self.stops = list(dict.fromkeys([*(tokenizer.last(end) for end in ends), self.text_eos]))
        if self.added:
            self.notes.append(f"added to the tokenizer for the template {template}: {' '.join(self.added)}")
        if "pad_token" not in tokenizer.special:
            tokenizer.special["pad_token"] = tokenizer.special["eos_token"]
            self.notes.append(
                f"the tokenizer has no pad token; {tokenizer.special['eos_token']} pads, and no label is built from it"
            )

    @property
    def template_sha(self) -> str | None:
        return None if self.template is None else sha256_of(self.template.text)

    def save(self, folder: Path) -> None:
        self.tokenizer.save(folder, self.template.text if self.template else None)


# --- the first trial of an untrusted template ------------------------------------------------------------------------


_tried: set[str] = set()


def try_out(text: str, special: dict[str, str], kwargs: dict[str, Any]) -> None:
    """Render small conversations in a child process with 2 GiB and a few seconds. Raises UserError."""
    task = json.dumps({"text": text, "special": special, "kwargs": kwargs})
    if task in _tried:
        return
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    child = [sys.executable, "-m", "llmpipe.data.templates"]
    refusal = UserError(
        "the chat template takes too long or too much memory for a conversation of two turns: refused", _OTHER
    )
    try:
        result = subprocess.run(child, input=task.encode(), capture_output=True, timeout=MAX_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        raise refusal from None
    if result.returncode:
        raise refusal
    if problem := result.stdout.decode(errors="replace").strip():
        raise UserError(f"the chat template cannot be used: {problem}", _OTHER)
    _tried.add(task)


def _try_out() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (int(MAX_SECONDS), int(MAX_SECONDS)))
    task = json.loads(sys.stdin.buffer.read())
    problems = []
    try:
        template = Template(task["text"], task["special"], task["kwargs"])
    except UserError as error:
        print(error.message)
        return
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    talks = [_talk("user", "assistant"), _talk("system", "user", "assistant"), _talk(*["user", "assistant"] * 4)]
    for messages, tools in [*((talk, None) for talk in talks), (talks[0], [tool])]:
        try:
            if len(template.render(messages, tools)[0]) > 1_000_000:
                os._exit(1)
        except Rejected as error:
            problems.append(error.detail)
    if len(problems) == len(talks) + 1:
        print(problems[0])


if __name__ == "__main__":
    _try_out()
