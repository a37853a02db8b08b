# python recipes/make_from_zero.py
"""Writes ./from-zero/, which recipes/from-zero.yaml learns from and is tested on: no download.

texts/        what comes with Python itself (PSF licence), two megabytes of English: its reference
              documentation, a file per topic, and the docstrings of its library, a file per module;
              held-out/ has every tenth of them, and is for measuring alone
form.jsonl    whether a number is larger than another one, with the right answers, for sft
pairs.jsonl   others with the right answer and the wrong one, for reward, dpo and ppo
test.jsonl    others with the right answers

Two numbers are asked about in one file alone, in either order. Same seed, same files.
"""

import ast
import gzip
import json
import pydoc_data.topics
import random
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

FORM, PAIRS, TEST = 200, 2400, 400
FOLDER = Path("from-zero")
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
SHORT = 500  # characters of docstrings that are no document
Rows = list[dict]


def texts() -> tuple[dict[str, str], dict[str, str]]:
    """Documents by name, to train on and to measure with."""
    documents = sorted((pydoc_data.topics.topics | dict(docstrings())).items())
    held_out = dict(documents[::10])
    return {name: text for name, text in documents if name not in held_out}, held_out


def docstrings() -> Iterator[tuple[str, str]]:
    """The modules of Python's library by name, each with all of its docstrings."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if not LEFT_OUT & set(name.parts):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            said = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
            text = "\n\n".join(part for part in said if part)
            if len(text) > SHORT:
                yield ".".join(("library", *name.with_suffix("").parts)), text


def turns(role: str, text: object) -> Rows:
    return [{"role": role, "content": f"{text}"}]


def rows(seed: int = 0) -> dict[str, Rows]:
    """The files of questions, and their rows."""
    rng = random.Random(seed)
    every = [(a, b) for a in range(10, 100) for b in range(10, a)]
    drawn = [rng.sample(two, 2) for two in rng.sample(every, FORM + PAIRS + TEST)]
    asks = [turns("user", f"Is {a} larger than {b}?") for a, b in drawn]
    right = [turns("assistant", "Yes." if a > b else "No.") for a, b in drawn]
    wrong = [turns("assistant", "No." if a > b else "Yes.") for a, b in drawn]
    answered = [{"messages": ask + say} for ask, say in zip(asks, right, strict=True)]
    pairs = [
        {"prompt": ask, "chosen": chosen, "rejected": rejected}
        for ask, chosen, rejected in zip(asks, right, wrong, strict=True)
    ]
    return {
        "form": answered[:FORM],
        "pairs": pairs[FORM : FORM + PAIRS],
        "test": answered[FORM + PAIRS :],
    }


def gzip_bits(before: dict[str, str], documents: dict[str, str]) -> float:
    """Bits per byte that gzip -9 takes for `documents` behind what was there before."""
    known, new = ("".join(part.values()).encode() for part in (before, documents))
    packed = len(gzip.compress(known + new, 9)) - len(gzip.compress(known, 9))
    return 8 * packed / len(new)


if __name__ == "__main__":
    learned, held_out = texts()
    for folder, documents in (("texts", learned), ("held-out", held_out)):
        shutil.rmtree(FOLDER / folder, ignore_errors=True)  # of another Python they are others
        (FOLDER / folder).mkdir(parents=True)
        for name, text in documents.items():
            (FOLDER / folder / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{FOLDER}/{folder}: {len(documents)} documents")
    print(f"gzip -9 takes {gzip_bits(learned, held_out):.2f} bits per byte of {FOLDER}/held-out")
    for name, part in rows().items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (FOLDER / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{FOLDER}/{name}.jsonl: {len(part):,} rows")
