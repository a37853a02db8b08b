"""The chat template, and which characters of a rendered conversation the assistant spoke.

Jinja is set up as transformers sets it up, so token ids equal `apply_chat_template(tokenize=True)` (a test holds this).
A template comes with the model and is as untrusted as the model: it is compiled and rendered in Jinja's sandbox, and
only within `bounded()`, which limits time and memory.

Spans of assistant turns come from `{% generation %}` markers where the template has them; otherwise from rendering the
conversation up to each turn; and where a template rewrites earlier turns (Qwen3 drops their thinking) from marks put
around every message. A span always runs to the end of its end-of-turn token, since a model that never sees that token
as a target never learns to stop (transformers#48016), and never includes the whitespace after it.
"""

from __future__ import annotations

import json
import re
import resource
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from llmpipe.data.formats import Rejected
from llmpipe.data.tokenizer import Tokenizer, own_template
from llmpipe.errors import UserError
from llmpipe.recipe.sections import TEMPLATES

Span = tuple[int, int]
Marks = list[list[int | None]]  # start and end of each message, as far as they are known
MAX_SECONDS, MAX_BYTES, MAX_CHARS = 3.0, 512 << 20, 64_000_000  # for one conversation

_OTHER = "data.template names another one"
_MARKER = re.compile(r"<\|[^<>|\s'\"]{1,60}\|>|<(?:start|end)_of_turn>")


def template_source(folder: Path, choice: str) -> str | None:
    """The text of the chosen template before it meets a tokenizer: what a cache key hashes."""
    if choice == "auto":
        return own_template(folder)
    path = (
        Path(__file__).with_name(f"{choice}.jinja")
        if choice in TEMPLATES
        else Path(choice).expanduser()
    )
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = f"a file, or one of: auto, {', '.join(TEMPLATES)}"
        raise UserError(f"data.template: {choice}: no such file", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.template: {choice}: cannot be read: {error}") from None


class _Late(BaseException):
    """Not an Exception, which Jinja's compiler would swallow."""


@contextmanager
def bounded() -> Iterator[None]:
    """MAX_SECONDS of processor time and MAX_BYTES for what is done here (main thread only). Raises Rejected."""

    def late(signum: int, frame: Any) -> None:
        raise _Late

    own = resource.getrlimit(resource.RLIMIT_AS)
    with (
        suppress(FileNotFoundError),
        open("/proc/self/statm", "rb", 0) as file,
    ):  # Linux; others do not obey the limit
        limit = int(file.read().split()[0]) * resource.getpagesize() + MAX_BYTES
        limit = min(value for value in (limit, *own) if value != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, (limit, own[1]))
    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS, MAX_SECONDS)
    try:
        yield
    except (_Late, MemoryError):
        raise Rejected(
            "template too large", "a conversation takes too long or too much memory to render"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, own)


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
        self.environment.spans.append(
            (self.environment.written, self.environment.written + len(text))
        )
        return text


class _Namespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore, which could reach Python's own."""

    def __init__(self, /, *args: Any, **kwargs: Any):
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.sandbox.SecurityError(
                "a namespace cannot hold a name that starts with an underscore"
            )
        super().__setitem__(name, value)


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _any_of(texts: Iterable[str]) -> str:
    """A pattern of any of these texts, the longest first; of none it matches nothing."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)"


class Template:
    """A compiled chat template with the tokenizer's special tokens and the recipe's extra variables.

    `ends`: what it writes to end an assistant's turn, the last turn's first (see learn_ends).
    """

    def __init__(
        self, text: str, special: dict[str, str], kwargs: dict[str, Any], ends: Sequence[str] = ()
    ):
        self.variables = {**special, **kwargs}
        self._end = re.compile(_any_of(ends))
        self.environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        self.environment.filters["tojson"] = (
            lambda value, ensure_ascii=False, indent=None, separators=None, sort_keys=False: (
                json.dumps(
                    value,
                    ensure_ascii=ensure_ascii,
                    indent=indent,
                    separators=separators,
                    sort_keys=sort_keys,
                )
            )
        )
        self.environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda layout: datetime.now().strftime(layout),
            "namespace": _Namespace,
        }
        try:
            self.compiled = self.environment.from_string(text)
        except (SyntaxError, RecursionError, jinja2.TemplateSyntaxError) as error:
            raise UserError(
                f"chat template, line {getattr(error, 'lineno', 1)}: {error}", _OTHER
            ) from None
        self.marked = bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", text))

    def render(
        self, messages: list[dict], tools: list | None = None, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The rendered text and the spans of its `{% generation %}` blocks. Raises Rejected."""
        environment, parts = self.environment, []
        environment.written, environment.spans = 0, []
        variables = dict(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=prompt,
            **self.variables,
        )
        try:
            for part in self.compiled.generate(variables):
                parts.append(part)
                environment.written += len(part)
                if environment.written > MAX_CHARS:
                    raise Rejected(
                        "template too large", f"renders more than {MAX_CHARS:,} characters"
                    )
        except (Rejected, MemoryError):
            raise
        except Exception as error:  # a template can raise whatever an expression can
            raise Rejected("template refuses", f"{error}"[:200] or type(error).__name__) from None
        return "".join(parts), environment.spans

    def turns(
        self, messages: list[dict], tools: list | None = None, first: int = 0
    ) -> tuple[str, list[Span]]:
        """Render a conversation; the spans of the assistant turns from message `first` on, less those of weight 0.

        Each span is (start, end) in characters and ends behind the turn's end-of-turn token. Raises Rejected.
        """
        messages = clean(messages)
        text, spans = self.render(messages, tools)
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.marked and len(spans) == len(spoken):
            spans = [self._to_end(text, *span) for span in spans]
        else:
            spans = self._spans(text, messages, tools, spoken)
        # What a template silently leaves out would teach something else than the row says.
        for i, (start, end) in zip(spoken, spans, strict=True):
            if any(
                call["function"]["name"] not in text[start:end]
                for call in messages[i].get("tool_calls", ())
            ):
                raise Rejected(
                    "template drops tool calls",
                    "the chat template does not render them; chatml does",
                )
        if messages[0]["role"] == "system" and messages[0]["content"].strip() not in text:
            raise Rejected(
                "template drops the system turn",
                "the chat template does not render it; chatml does",
            )
        learned = [i >= first and messages[i].get("weight") != 0 for i in spoken]
        return text, [span for span, wanted in zip(spans, learned, strict=True) if wanted]

    def _spans(
        self, text: str, messages: list[dict], tools: list | None, spoken: list[int]
    ) -> list[Span]:
        """The assistant's turns of a template without markers, or with other ones than one around each turn."""
        spans, marks = [], None
        for i in spoken:
            # A template may refuse a conversation that stops early, or render it differently: then only marks help.
            prompt = self.attempt(messages[:i], tools, True) if i else None
            start = len(prompt) if prompt is not None and text.startswith(prompt) else None
            whole = (
                text if i == len(messages) - 1 else self.attempt(messages[: i + 1], tools, False)
            )
            if (
                start is not None
                and whole is not None
                and text.startswith(whole)
                and start < len(whole)
            ):
                ends = [match.end() for match in self._end.finditer(text, start, len(whole))]
                spans.append((start, ends[-1]) if ends else self._to_end(text, start, len(whole)))
            else:
                marks = marks or self._marks(text, messages, tools)
                spans.append(self._by_marks(text, marks, i, start, prompt))
        return spans

    def attempt(self, messages: list[dict], tools: list | None, prompt: bool) -> str | None:
        try:
            return self.render(messages, tools, prompt)[0]
        except Rejected:
            return None

    def _marks(self, text: str, messages: list[dict], tools: list | None) -> Marks:
        """Where each message's content lies in `text`: found by marking both ends of every content and rendering."""
        marked = []
        for i, message in enumerate(messages):
            content = message.get("content") or ""
            if core := content.strip():  # templates trim: the marks go inside the outer whitespace
                message = {
                    **message,
                    "content": content.replace(core, f"\ue000{i}\ue001{core}\ue002{i}\ue003", 1),
                }
            marked.append(message)
        rendered, _ = self.render(marked, tools)
        places: Marks = [[None, None] for _ in messages]
        plain, last = "", 0
        for mark in re.finditer("(\ue000|\ue002)(\\d+)(\ue001|\ue003)", rendered):
            plain += rendered[last : mark.start()]
            last = mark.end()
            if int(mark[2]) < len(places):
                places[int(mark[2])][mark[1] == "\ue002"] = len(plain)
        if plain + rendered[last:] != text:
            raise Rejected(
                "template renders turns inconsistently", "a turn changes with what surrounds it"
            )
        return places

    def _by_marks(
        self, text: str, marks: Marks, i: int, begin: int | None, prompt: str | None
    ) -> Span:
        start, stop = marks[i]
        if begin is None:
            begin = start
        if begin is None and prompt is not None:
            # Thinking that is cut out of an earlier turn takes the first mark along, and the prompt may end with
            # "<think>": the turn begins where the prompt and the conversation part.
            begin = shared(prompt, text)
        before = max((end for _, end in marks[:i] if end is not None), default=0)
        after = min((start for start, _ in marks[i + 1 :] if start is not None), default=len(text))
        if (
            begin is None
            or not before
            <= begin
            <= (begin if start is None else start)
            <= (stop or begin)
            <= after
        ):
            raise Rejected(
                "template renders turns inconsistently", f"message {i + 1} cannot be found again"
            )
        end = self._end.search(text, stop or begin)
        if not end or end.end() > after:
            raise Rejected(
                "end of turn not supervised", f"message {i + 1} has no end-of-turn token"
            )
        return begin, end.end()

    def _to_end(self, text: str, start: int, end: int) -> Span:
        """Move the end of a span to just behind its end-of-turn token, if there is one."""
        inside = [match.end() for match in self._end.finditer(text, start, end)]
        if inside and not text[inside[-1] : end].strip():
            return start, inside[-1]
        after = re.compile(r"\s*").match(text, end).end()
        following = self._end.match(text, after)
        return start, following.end() if following else end

    def learn_ends(self, tokenizer: Tokenizer) -> list[str]:
        """What ends the assistant's turns, found by rendering a small conversation and looking behind its words.

        Most often one token; Cohere writes two without a space, and the last of them stops a generation. Raises
        UserError when there is none.
        """
        token = _any_of(
            added.content for added in tokenizer.backend.get_added_tokens_decoder().values()
        )
        try:
            text, _ = self.render(_talk(4))
        except Rejected as error:
            raise UserError(
                f"the chat template cannot render a conversation: {error.detail}", _OTHER
            ) from None
        at = [text.find(f"turn{i}") for i in range(4)]
        if min(at) < 0:
            raise UserError("the chat template leaves out turns of a conversation", _OTHER)
        final = re.compile(f"(?:{token})+").search(text, at[3])
        if not final:
            problem = "no end-of-turn token after the assistant: a model would never learn to stop"
            hint = "end the assistant's turn with {{ eos_token }}, or set data.template: chatml"
            raise UserError(f"the chat template writes {problem}", hint)
        ends = [final.group()]
        if re.sub(token, "", text[final.end() :]).strip():
            # Llama 3's first template always goes on with the next header: only the first token ends the turn.
            ends = [re.compile(token).match(text, final.start()).group()]
        between = re.compile(token).findall(text, at[1], at[2])
        # gpt-oss ends inner turns with another token; one token alone would be the next turn's header.
        if len(between) > 1 and not "".join(between).startswith(ends[0]):
            ends.append(between[0])
        return ends


def shared(a: Sequence, b: Sequence) -> int:
    """How many items two sequences have in common from the start."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _talk(turns: int) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": f"turn{i}"} for i in range(turns)]


def clean(messages: list[dict]) -> list[dict]:
    """What transformers does before rendering: no None values; one thought under every name templates read."""
    out = []
    for message in messages:
        message = {name: value for name, value in message.items() if value is not None}
        names = ("reasoning_content", "thinking", "reasoning")
        thought = next((message[name] for name in names if name in message), None)
        out.append(
            message
            if thought is None
            else {"thinking": thought, **message, "reasoning_content": thought}
        )
    return out


class Choice:
    """A tokenizer made ready for training: its template, what was added, and what stops a generation."""

    def __init__(self, folder: Path, name: str, kwargs: dict[str, Any]):
        """`name` as in `data.template`.

        Raises UserError for a missing, broken, endless or hostile template, and for a tokenizer without eos.
        """
        self.tokenizer = tokenizer = Tokenizer(folder)
        self.name, self.notes, self.added, self.ends = name, [], [], []
        self.template = template_source(folder, name)
        own_eos = tokenizer.special.get("eos_token")
        if own_eos is None and (self.template is None or "eos_token" in self.template):
            hint = "set eos_token in its tokenizer_config.json, or set data.template: chatml"
            raise UserError("the tokenizer has no end-of-sequence token", hint)
        if self.template is not None:
            try:
                with bounded():
                    self._meet(kwargs)
            except Rejected as error:
                raise UserError(f"the chat template is refused: {error.detail}", _OTHER) from None
        special = tokenizer.special
        self.text_eos = own_eos or special["eos_token"]  # what ends a plain text
        self.stops = list(
            dict.fromkeys([*(tokenizer.last(end) for end in self.ends[:1]), self.text_eos])
        )
        if self.added:
            self.notes.append(
                f"added to the tokenizer for the template {name}: {' '.join(self.added)}"
            )
        if "pad_token" not in special:
            special["pad_token"] = eos = special["eos_token"]
            self.notes.append(
                f"the tokenizer has no pad token; {eos} pads, and no label is built from it"
            )

    def _meet(self, kwargs: dict[str, Any]) -> None:
        """Bring template and tokenizer together: the first token, new tokens, what ends a turn."""
        tokenizer, special = self.tokenizer, self.tokenizer.special
        if (
            self.name in TEMPLATES and tokenizer.bos is not None
        ):  # a base model expects it before a conversation, too
            self.template = "{{- bos_token }}" + self.template
        template = Template(self.template, special, kwargs)
        if self.name != "auto":
            shown = self.template + (template.attempt(_talk(2), None, True) or "")
            self.added = tokenizer.add(sorted(set(_MARKER.findall(shown))))
        self.ends = template.learn_ends(tokenizer)
        if "eos_token" not in special or (self.name != "auto" and "eos_token" not in self.template):
            special["eos_token"] = tokenizer.last(self.ends[0])
        bos = tokenizer.id("bos_token")
        if bos is not None and tokenizer.ids(template.render(_talk(2))[0])[:2] == [bos, bos]:
            raise UserError("the chat template writes the first token twice", _OTHER)
