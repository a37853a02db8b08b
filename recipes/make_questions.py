# python recipes/make_questions.py
"""Writes recipes/questions.jsonl and questions-test.jsonl: 1,100 small instructions to train on and
470 to test on, with short answers that are right by construction.

Thirteen kinds of task, several phrasings each; no problem occurs twice in either of them, so that
what is tested was never seen in other words. The problems behind `samples:` in recipes/sft.yaml are
left out. Same seed, same files.
"""

import json
import random
from pathlib import Path

WORDS = """
    apple arm baby bag ball bank bath bear bed bell bird boat book bottle bread bridge brush bus
    cake camel candle cap card castle cat chain chair cheese clock cloud coat coin corn cow crown
    cup desk dog door dress drum duck ear egg engine farm fence field fire fish flag flower foot
    forest fork fox frog garden gate ghost gift glass goat gold grape grass hammer hand hat heart
    hill honey horse hotel house ice ink island jacket jar jelly key king kite knee ladder lake
    lamp leaf lemon letter lion map market milk mirror moon mouse music nail neck nest night nose
    nut oak ocean onion orange oven owl page paint paper park pear pen pencil piano pig pillow
    pizza plane plant plate pocket pond potato queen rain ring river road robot roof room root
    rope rose salt sand school sea seed shelf ship shirt shoe silk silver sky snow soap sock soup
    spoon star stone storm street sugar sun table tail tea tent tiger toast tooth tower town toy
    train tree truck wagon wall watch water wave wheel wind window wing winter wolf wood yard
    zebra
""".split()
PLURALS = dict(
    pair.split(":")
    for pair in """
    apple:apples baby:babies bag:bags beach:beaches bench:benches berry:berries bird:birds
    boat:boats book:books box:boxes boy:boys branch:branches bridge:bridges brush:brushes
    bus:buses butterfly:butterflies calf:calves candle:candles car:cars cherry:cherries
    child:children church:churches city:cities class:classes clock:clocks coat:coats
    country:countries cow:cows cup:cups daisy:daisies day:days desk:desks dish:dishes
    dress:dresses duck:ducks egg:eggs fairy:fairies family:families flower:flowers fly:flies
    foot:feet fork:forks fox:foxes garden:gardens glass:glasses goose:geese half:halves
    hero:heroes horse:horses house:houses key:keys kiss:kisses kite:kites lady:ladies leaf:leaves
    lemon:lemons letter:letters life:lives lion:lions loaf:loaves man:men match:matches
    monkey:monkeys mouse:mice ox:oxen peach:peaches pen:pens penny:pennies pig:pigs pony:ponies
    potato:potatoes puppy:puppies ring:rings river:rivers sandwich:sandwiches sheep:sheep
    shelf:shelves ship:ships story:stories thief:thieves tomato:tomatoes tooth:teeth toy:toys
    tree:trees watch:watches wife:wives wish:wishes witch:witches wolf:wolves woman:women
    """.split()
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December".split()
)
SHORT = [word for word in WORDS if len(word) <= 5]
KEPT_OUT = {
    ("add", 6, 8),
    ("larger", 47, 74),
    ("plural", "knife"),
    ("day", "Friday", 2),
    ("count", "planet"),
}

Problem = tuple  # the task's name, then what makes the problem
Row = tuple[Problem, str, str]  # the problem, a prompt, the answer


def add(rng: random.Random) -> Row:
    a, b = (
        (rng.randint(1, 9), rng.randint(1, 9))
        if rng.random() < 0.5
        else (rng.randint(2, 60), rng.randint(2, 39))
    )
    ask = rng.choice(
        [
            "What is {a} + {b}?",
            "Add {a} and {b}.",
            "Calculate {a} + {b}.",
            "What is the sum of {a} and {b}?",
            "{a} + {b} = ?",
        ]
    )
    return ("add", *sorted((a, b))), ask.format(a=a, b=b), f"{a} + {b} = {a + b}."


def subtract(rng: random.Random) -> Row:
    b, c = (
        (rng.randint(1, 9), rng.randint(1, 9))
        if rng.random() < 0.5
        else (rng.randint(2, 39), rng.randint(2, 60))
    )
    a = b + c
    ask = rng.choice(
        [
            "What is {a} - {b}?",
            "Subtract {b} from {a}.",
            "Calculate {a} - {b}.",
            "Take {b} away from {a}.",
        ]
    )
    return ("subtract", a, b), ask.format(a=a, b=b), f"{a} - {b} = {c}."


def larger(rng: random.Random) -> Row:
    a, b = rng.sample(range(1, 100), 2)
    ask = rng.choice(
        [
            "Which number is larger, {a} or {b}?",
            "Which is greater: {a} or {b}?",
            "Name the larger of {a} and {b}.",
        ]
    )
    return ("larger", *sorted((a, b))), ask.format(a=a, b=b), f"{max(a, b)} is larger."


def parity(rng: random.Random) -> Row:
    a = rng.randint(1, 250)
    ask = rng.choice(
        [
            "Is {a} even or odd?",
            "Is the number {a} odd or even?",
            "Tell me whether {a} is even or odd.",
        ]
    )
    return ("parity", a), ask.format(a=a), f"{a} is {'odd' if a % 2 else 'even'}."


def following(rng: random.Random) -> Row:
    start, step = rng.randint(1, 20), rng.choice([1, 2, 3, 5, 10])
    shown = ", ".join(str(start + step * i) for i in range(4))
    ask = rng.choice(
        [
            "What number comes next: {s}?",
            "Continue with one number: {s}",
            "{s}: which number follows?",
        ]
    )
    return ("following", start, step), ask.format(s=shown), f"{start + step * 4}."


def ordered(rng: random.Random) -> Row:
    words = rng.sample(WORDS, 3)
    ask = rng.choice(
        [
            "Sort these words alphabetically: {w}",
            "Put these words in alphabetical order: {w}",
            "Order from A to Z: {w}",
        ]
    )
    return (
        ("ordered", *sorted(words)),
        ask.format(w=", ".join(words)),
        ", ".join(sorted(words)) + ".",
    )


def reverse(rng: random.Random) -> Row:
    word = rng.choice([w for w in SHORT if len(w) <= 4])
    ask = rng.choice(
        ["Reverse the word '{w}'.", "Write '{w}' backwards.", "What is '{w}' spelled backwards?"]
    )
    return ("reverse", word), ask.format(w=word), f"{word[::-1]}."


def spell(rng: random.Random) -> Row:
    word = rng.choice(WORDS)
    ask = rng.choice(
        [
            "Spell the word '{w}' with hyphens.",
            "Spell '{w}' letter by letter.",
            "Write '{w}' with a hyphen between letters.",
        ]
    )
    return ("spell", word), ask.format(w=word), f"{'-'.join(word)}."


def count(rng: random.Random) -> Row:
    word = rng.choice(WORDS)
    ask = rng.choice(
        [
            "How many letters are in the word '{w}'?",
            "Count the letters of '{w}'.",
            "How long is the word '{w}' in letters?",
        ]
    )
    return ("count", word), ask.format(w=word), f"'{word}' has {len(word)} letters."


def edge(rng: random.Random) -> Row:
    word, end = rng.choice(WORDS), rng.choice(["first", "last"])
    ask = rng.choice(["What is the {e} letter of '{w}'?", "Name the {e} letter of the word '{w}'."])
    return ("edge", word, end), ask.format(w=word, e=end), f"{word[0 if end == 'first' else -1]}."


def capitals(rng: random.Random) -> Row:
    word = rng.choice(WORDS)
    ask = rng.choice(
        [
            "Write '{w}' in capital letters.",
            "Put the word '{w}' in upper case.",
            "Capitalize all of '{w}'.",
        ]
    )
    return ("capitals", word), ask.format(w=word), f"{word.upper()}."


def plural(rng: random.Random) -> Row:
    word = rng.choice(list(PLURALS))
    ask = rng.choice(
        [
            "What is the plural of '{w}'?",
            "Give the plural of the word '{w}'.",
            "One {w}, two what?",
            "Make '{w}' plural.",
        ]
    )
    return ("plural", word), ask.format(w=word), f"{PLURALS[word]}."


def calendar(rng: random.Random) -> Row:
    if rng.random() < 0.4:
        month, step = rng.randrange(12), rng.choice([-1, 1])
        side = "before" if step < 0 else "after"
        ask = rng.choice(["Which month comes right {s} {m}?", "Name the month {s} {m}."])
        return (
            ("month", MONTHS[month], step),
            ask.format(s=side, m=MONTHS[month]),
            f"{MONTHS[(month + step) % 12]}.",
        )
    day, step = rng.randrange(7), rng.choice([-2, -1, 1, 2, 3])
    ask = {
        -2: "Today is {d}. What day was the day before yesterday?",
        -1: "Today is {d}. What day was yesterday?",
        1: "Today is {d}. What day is tomorrow?",
        2: "Today is {d}. What day is the day after tomorrow?",
        3: "Today is {d}. What day is it in three days?",
    }[step]
    return ("day", DAYS[day], step), ask.format(d=DAYS[day]), f"{DAYS[(day + step) % 7]}."


# task -> rows to train on, rows to test on
TASKS = {
    add: (150, 80),
    subtract: (120, 80),
    larger: (100, 60),
    parity: (80, 40),
    following: (70, 20),
    ordered: (90, 60),
    reverse: (70, 10),
    spell: (80, 30),
    count: (90, 30),
    edge: (80, 40),
    capitals: (50, 20),
    plural: (70, 0),  # there are no more of them
    calendar: (50, 0),
}
FILES = ("questions", "questions-test")


def rows(seed: int = 0) -> tuple[list[dict], ...]:
    """The rows of FILES, in a shuffled order; no problem occurs twice in either or both of them."""
    seen = set(KEPT_OUT)
    return tuple(_draw(random.Random(seed + part), part, seen) for part in range(len(FILES)))


def _draw(rng: random.Random, part: int, seen: set[Problem]) -> list[dict]:
    drawn = []
    for task, wanted in TASKS.items():
        last = len(drawn) + wanted[part]
        while len(drawn) < last:
            problem, prompt, answer = task(rng)
            if problem not in seen:
                seen.add(problem)
                drawn.append((prompt, answer))
    rng.shuffle(drawn)
    return [
        {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
            ]
        }
        for prompt, answer in drawn
    ]


if __name__ == "__main__":
    for name, part in zip(FILES, rows(), strict=True):
        lines = [json.dumps(row, ensure_ascii=False) for row in part]
        Path(__file__).with_name(f"{name}.jsonl").write_text(
            "\n".join(lines) + "\n", encoding="utf-8"
        )
        print(f"{name}.jsonl: {len(lines)} rows")
