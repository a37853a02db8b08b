"""Whether a template renders all that a conversation says, proven on a stand-in for it.

Every text of a stand-in is unlike any other (see `texts`). Each has to be in what is rendered, in
order, and the assistant's inside the turn that is learned. What inference would send before such a
turn, its generation prompt included, has to be what stands before it in training. Where templates
differ from that by design, the turn is kept, and a sentence says so: the constants below.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

from llmpipe.data.examples import Messages, Tools
from llmpipe.data.template import spans
from llmpipe.data.template.rendering import Template
from llmpipe.data.template.sandbox import Span
from llmpipe.data.template.texts import (
    DETAILS,
    IDS,
    NAMES,
    OF_TOOLS,
    THINKING,
    Place,
    Text,
)

INCONSISTENT = "template renders turns inconsistently"

# Habits of templates.
CUT = "the chat template leaves out what earlier turns think"
# A name labels a turn whose words are there, and most templates have none.
NO_NAMES = "the chat template leaves out the names of turns"
NO_DETAILS = "the chat template leaves out choices, defaults or details of tools' parameters"
NOTED = {NAMES: NO_NAMES, DETAILS: NO_DETAILS}
EMPTY_THOUGHT = "the chat template begins turns with an empty thought, which is learned"
UNMARKED = "the chat template's generation markers leave out turns of the assistant"


class Turn(NamedTuple):
    """A turn of the assistant's in a rendered text."""

    message: int
    """Its number, from 0."""
    span: Span
    """Characters that are learned; empty where generation markers leave the turn out."""
    notes: tuple[str, ...] = ()
    """Habits of the template that show in it."""
    refusal: tuple[str, str] | None = None
    """Why it cannot be learned: reason and detail."""


class Standin(NamedTuple):
    """A conversation of texts that are unlike any other."""

    messages: Messages
    tools: Tools
    texts: list[Text]
    places_in: Callable[[str], Iterator[Place]]
    """Where its texts stand in what is rendered of it."""
    expected: set[int]
    """Numbers of the texts that can be told from others."""


class Form:
    """A rendered stand-in: the words of the template, the places of texts, and what is proven."""

    def __init__(self, text: str, places: list[Place]):
        ends = [0, *(place.end for place in places)]
        starts = [*(place.start for place in places), len(text)]
        self.literals = [text[end:start] for end, start in zip(ends, starts, strict=True)]
        self.places = places
        self.written = [text[place.start : place.end] for place in places]
        """What stands in them."""
        self.turns: list[Turn] = []
        self.notes: set[str] = set()
        self.refusal: tuple[str, str] | None = None
        """What the template drops: reason and detail."""

    def shifts(self, text: str, options: Callable[[int], Iterable[str]]) -> list[int] | None:
        """How far characters behind each place lie from where they are in the stand-in.

        `text` is another rendering of this form, in which place k holds one of `options(k)`; None
        where it is not. The first number, 0, is for what stands before all places.
        """
        if not text.startswith(self.literals[0]):
            return None
        at = len(self.literals[0])
        shifts = [0]
        for k, (place, literal) in enumerate(zip(self.places, self.literals[1:], strict=True)):
            for written in options(k):
                end = at + len(written)
                if text.startswith(written, at) and text.startswith(literal, end):
                    break
            else:
                return None
            shifts.append(end - place.end)
            at = end + len(literal)
        return shifts if at == len(text) else None

    def moved(self, shifts: list[int]) -> list[Turn]:
        """Its turns in the text that `shifts` was made for."""
        return [
            Turn(i, (start + shifts[before], end + shifts[inside]), notes, refusal)
            for (i, (start, end), notes, refusal), (before, inside) in self._passed
        ]

    @cached_property
    def _passed(self) -> list[tuple[Turn, tuple[int, int]]]:
        """The turns, each with how many places end up to where its span begins, and ends."""
        ends = [place.end for place in self.places]
        return [
            (turn, (bisect_right(ends, turn.span[0]), bisect_right(ends, turn.span[1])))
            for turn in self.turns
        ]


def prove(template: Template, standin: Standin, open_turn: bool) -> Form:
    """The form of a stand-in's rendering, and what is proven of it. Raises Rejected."""
    messages, tools, texts, places_in, _ = standin
    text, blocks = template.render(messages, tools, open_turn)
    places = [place for place in places_in(text) if place.text < len(texts)]
    form = Form(text, places)
    where = _Places(standin, places)
    form.refusal = where.refusal
    cut = _missing(template, standin, where, form)
    if open_turn:
        return form
    finder = spans.Finder(template, text, messages, tools, cut)
    for i in where.spoken:
        form.turns.append(_turn(finder, blocks, where, i))
    return form


class _Places:
    """Which place each text of a stand-in has, turn by turn."""

    def __init__(self, standin: Standin, places: list[Place]):
        self.spoken = [i for i, m in enumerate(standin.messages) if m["role"] == "assistant"]
        self.texts = standin.texts
        self.of: dict[int, Place] = {}
        """By the number of a text."""
        self.refusal: tuple[str, str] | None = None
        self._of_turn: dict[int, list[Place]] = {}
        self._options: dict[int, list[Place]] = {}
        for place in places:
            self._options.setdefault(place.text, []).append(place)
        numbers: dict[int, list[int]] = {}
        for number, text in enumerate(self.texts):
            numbers.setdefault(text.turn, []).append(number)
        for number in numbers.get(OF_TOOLS, []):  # which stand wherever the template has them
            if number in self._options:
                self.of[number] = self._options[number][0]
        floor = 0
        for turn, message in enumerate(standin.messages):
            here = list(self._placed(numbers.get(turn, []), floor))
            if message["role"] != "system":  # which some templates write further down
                self._of_turn[turn] = here
                floor = max([floor, *(place.end for place in here)])

    def _placed(self, numbers: list[int], floor: int) -> Iterator[Place]:
        """The places of a turn's texts: the first ones from `floor` on."""
        for number in numbers:
            turn, kind, _ = self.texts[number]
            options = self._options.get(number, [])
            behind = [place for place in options if place.start >= floor]
            if behind:
                self.of[number] = behind[0]
                if kind not in (NAMES, IDS):  # these may stand in other turns, too
                    yield behind[0]
            elif options:
                self.of[number] = options[0]
                if kind not in (NAMES, IDS):
                    problem = f"turn {turn + 1} is written in front of what comes before it"
                    self.refusal = self.refusal or (INCONSISTENT, problem)

    def around(self, turn: int) -> spans.Around:
        """Where a turn's first and last texts are, and those of its neighbours."""
        here = self._of_turn[turn]
        before = [p.end for i, places in self._of_turn.items() if i < turn for p in places]
        after = [p.start for i, places in self._of_turn.items() if i > turn for p in places]
        return spans.Around(
            before=max(before, default=0),
            first=min((place.start for place in here), default=None),
            last=max((place.end for place in here), default=None),
            after=min(after, default=None),
        )

    def outside(self, turn: int, span: Span) -> set[str]:
        """The kinds of texts of a turn that are not in its span."""
        start, end = span
        here = self._of_turn[turn]
        return {self.texts[p.text].kind for p in here if not start <= p.start <= p.end <= end}


def _missing(template: Template, standin: Standin, where: _Places, form: Form) -> set[int]:
    """Turns whose thinking the template leaves out by habit; anything else that is missing goes
    to `form.refusal`."""
    cut = set()
    for number in sorted(standin.expected - where.of.keys()):
        turn, kind, _ = standin.texts[number]
        if kind == IDS or (kind == NAMES and standin.messages[turn]["role"] == "tool"):
            continue  # a result stands behind its call, which has the tool's name
        if kind in NOTED:
            form.notes.add(NOTED[kind])
        elif kind == THINKING and _is_there_at_the_end(template, standin, number):
            form.notes.add(CUT)
            cut.add(turn)
        else:
            what = "the row" if turn == OF_TOOLS else f"turn {turn + 1}"
            lost = (f"template drops {kind}", f"{what} is rendered without; chatml has it")
            form.refusal = form.refusal or lost
    return cut


def _is_there_at_the_end(template: Template, standin: Standin, number: int) -> bool:
    """Whether a text is rendered where its turn is the conversation's last."""
    turn = standin.texts[number].turn
    if turn == len(standin.messages) - 1:
        return False
    text = template.attempt(standin.messages[: turn + 1], standin.tools) or ""
    return any(place.text == number for place in standin.places_in(text))


def _turn(finder: spans.Finder, blocks: list[Span], where: _Places, i: int) -> Turn:
    """A turn of the assistant's: what of it is learned, and what has to be said of that."""
    around = where.around(i)
    begin = finder.begin(i, around)
    end = finder.end(i, begin.at, around)
    notes = set(begin.notes)
    refusal = begin.refusal or end.refusal
    span = (begin.at, end.at)
    if finder.template.has_markers:
        marked = finder.marked(blocks, span, around)
        if marked is None:
            return Turn(i, (begin.at, begin.at), (UNMARKED,))
        span = marked
    outside = where.outside(i, span)
    if outside:
        kinds = " and ".join(sorted(outside))
        detail = f"turn {i + 1}: {kinds} would not be learned: the template's markers leave it out"
        refusal = refusal or ("template leaves out what is learned", detail)
    elif finder.begins_with_empty_thought(span, around):
        notes.add(EMPTY_THOUGHT)
    return Turn(i, span, tuple(sorted(notes)), refusal)
