"""A conversation as tokens will see it: its text, and which characters the assistant spoke.

What a template does is proven once for every shape of conversation (see `proof`), on a stand-in. A
row of that shape whose rendering is the stand-in's, but for its texts, has the same proof. Where it
is not, since a template may read what a text says, the row is marked and stands in for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

from llmpipe.data.examples import Messages, Tools, is_learned
from llmpipe.data.formats import Rejected
from llmpipe.data.template.proof import INCONSISTENT, Form, Standin, Turn, prove
from llmpipe.data.template.rendering import Template, clean
from llmpipe.data.template.results import misplaced
from llmpipe.data.template.sandbox import Span
from llmpipe.data.template.texts import (
    MAX_SENTINELS,
    OF_TOOLS,
    Text,
    is_written_as,
    marked,
    marks_in,
    plain,
    rewritten,
    sentinel,
    sentinels_in,
    ways,
    without_marks,
)

MOST_FORMS = 4096  # kept of a template


class Reading(NamedTuple):
    """A rendered conversation."""

    text: str
    spans: list[Span]
    """Characters [start, end) of each turn that is learned."""
    texts: list[Text]
    """What the conversation says."""
    notes: set[str]
    """Habits of the template that show in it."""


def turns(
    template: Template,
    messages: Messages,
    tools: Tools = None,
    first: int = 0,
    *,
    proven: bool = True,
) -> Reading:
    """Render a conversation; the spans of the assistant's turns that are learned.

    These are the turns from message `first` on, less those of weight 0. A span begins where the
    prompt of inference ends, and ends behind the turn's end-of-turn token. Raises Rejected, and
    unless `proven` not for what the template drops: an answer that a model gave is as it is.
    """
    messages = clean(messages)
    learned = {i for i, m in enumerate(messages) if i >= first and is_learned(m)}
    text, texts, form, every = _read(template, messages, tools, open_turn=False)
    if proven:
        _refuse(form.refusal or misplaced(messages, text, texts, form.places))
    notes = set(form.notes)
    spans = []
    for turn in every:
        if turn.message in learned:
            _refuse(turn.refusal)
            notes.update(turn.notes)
            spans.append(turn.span)
    return Reading(text, spans, texts, notes)


def prompt(template: Template, messages: Messages, tools: Tools = None) -> Reading:
    """Render a conversation up to where an answer would begin. Raises Rejected."""
    messages = clean(messages)
    text, texts, form, _ = _read(template, messages, tools, open_turn=True)
    _refuse(form.refusal or misplaced(messages, text, texts, form.places))
    return Reading(text, [], texts, form.notes)


def _refuse(refusal: tuple[str, str] | None) -> None:
    if refusal:
        raise Rejected(*refusal)


def _read(
    template: Template, messages: Messages, tools: Tools, open_turn: bool
) -> tuple[str, list[Text], Form, list[Turn]]:
    """A conversation's text, what it says, its proof, and the assistant's turns in the text."""
    text, _ = template.render(messages, tools, open_turn)
    texts = None if tools else plain(messages)
    if texts is not None:
        key: Hashable = (*(kind for _, kind, _ in texts), open_turn)
        form = _form_of_shape(template, key, open_turn, lambda: _standin(messages, tools))
    else:
        standin = _standin(messages, tools)
        texts = standin.texts
        key = (repr(standin.messages), repr(standin.tools), open_turn)
        form = _form_of_shape(template, key, open_turn, lambda: standin)
    if form is not None:
        places = form.places
        shifts = form.shifts(text, lambda k: ways(texts[places[k].text].value))
        if shifts is not None:
            return text, texts, form, form.moved(shifts)
    try:
        form, every = _form_of_itself(template, text, messages, tools, open_turn)
    except Rejected:
        if form is not None:
            _refuse(form.refusal)  # which says more
        raise
    return text, texts, form, every


def _standin(messages: Messages, tools: Tools) -> Standin:
    new, masked, texts = rewritten(messages, tools, sentinel)
    return Standin(new, masked, texts, sentinels_in, set(range(len(texts))))


def _form_of_shape(
    template: Template, shape: Hashable, open_turn: bool, standin: Callable[[], Standin]
) -> Form | None:
    """The form of every conversation of a shape; None where the template refuses a stand-in."""
    forms = template.forms
    if shape not in forms:
        if len(forms) >= MOST_FORMS:
            forms.clear()
        forms[shape] = _proven(template, standin(), open_turn)
    form: Form | None = forms[shape]
    return form


def _proven(template: Template, standin: Standin, open_turn: bool) -> Form | None:
    if len(standin.texts) > MAX_SENTINELS:
        return None
    try:
        return prove(template, standin, open_turn)
    except Rejected:
        return None


def _form_of_itself(
    template: Template, text: str, messages: Messages, tools: Tools, open_turn: bool
) -> tuple[Form, list[Turn]]:
    """The form of one conversation, and its turns in `text`. Raises Rejected."""
    new, masked, texts = rewritten(messages, tools, marked)
    can_be_told = {i for i, it in enumerate(texts) if marked(i, it) != it.value}
    standin = Standin(new, masked, texts, marks_in, can_be_told)
    form = prove(template, standin, open_turn)
    shifts = form.shifts(text, lambda k: [without_marks(form.written[k])])
    if shifts is None:
        raise Rejected(INCONSISTENT, "a turn changes with what surrounds it")
    for place, written in zip(form.places, form.written, strict=True):
        said = texts[place.text]
        if not is_written_as(said, without_marks(written)):
            what = "the row" if said.turn == OF_TOOLS else f"turn {said.turn + 1}"
            detail = f"{what} is rendered with other words than the row's"
            form.refusal = form.refusal or (f"template changes {said.kind}", detail)
    return form, form.moved(shifts)
