"""A recipe that is far too large, too deep or no file is refused at once, in a line."""

import os
import time

import pytest

from llmpipe.errors import UserError
from llmpipe.recipe.check import load, load_pipeline
from llmpipe.recipe.yaml import dump, parse
from llmpipe.stages import STAGES, schema

SFT = schema("sft")
MOST = 256 << 10
GOOD = "stage: sft\nrun: runs/a\nmodel: ./m\ndata: {train: [{path: ./d.jsonl}]}\n"
GOOD += "optim: {learning_rate: 1e-3}\n"
TEXTS = {
    "brackets": (b"[" * 100_000, "1: nested too deeply"),
    "braces": (b"a: " + b"{a: " * 50_000, "1: nested too deeply"),
    "dashes": (b"- " * 100_000, "1: nested too deeply"),
    "indented": ("".join(f"{' ' * i}k:\n" for i in range(600)).encode(), "31: nested too deeply"),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(20_000)).encode(), "holds more than 10,000"),
    "2 MB of keys": (b"".join(b"k%d: 1\n" % i for i in range(200_000)), "larger than a recipe"),
    "a million lines": (b"-\n" * 100_000, "holds more than 10,000 values"),
    "9,000 unknown keys": ("".join(f"k{i}: 1\n" for i in range(4500)).encode(), "unknown key"),
    "unknown fields of the trainer": (
        (GOOD + "trainer:\n" + "".join(f" k{i}: 1\n" for i in range(4500))).encode(),
        "no such field",
    ),
    "a long key": (b"k" * 200_000 + b": 1", "1: .*"),
    "a long name": (GOOD.encode() + b"name: " + b"x" * 200_000, "6: name: "),
    "a long stage": (b"stage: " + b"x" * 200_000, "1: stage: "),
    "a long model": (GOOD.replace("./m", "artifact:" + "x" * 200_000).encode(), "3: model: "),
    "a long integer": (GOOD.encode() + b"seed: " + b"9" * 200_000, "6: seed: "),
    "a large number": (GOOD.encode() + b"seed: 1e400", "6: seed: "),
    "a date": (GOOD.encode() + b"seed: 2026-11-26", "6: seed: "),
    "binary": (bytes(range(256)) * 4, "2: cannot be read"),
    "UTF-16": (GOOD.encode("utf-16"), "1: cannot be read: not UTF-8"),
    "latin-1 on line 7": (GOOD.encode() + b"\nname: \xf6", "7: cannot be read: not UTF-8"),
    "NUL": (b"run: a\0b", "1: "),
    "half a character": (GOOD.encode() + b'name: "\\ud83d"', "6: half a surrogate pair"),
    "spaces": (b" " * MOST, "1: "),
    "lines": (b"\n" * MOST, "1: "),
    "comments": (b"# x\n" * (MOST // 4), "1: the file is empty"),
    "quotes": (b'a: "' + b"x " * (MOST // 2 - 10), "1: "),
    "anchors": (b"a: &a [x, x]\nb: [*a, *a]\n" * 1000, "1: anchors"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_recipe_has_an_end(tmp_path, kind):
    text, words = TEXTS[kind]
    path = tmp_path / "r.yaml"
    path.write_bytes(text)
    for read in (lambda: load(path, SFT), lambda: load_pipeline(path, schema)):
        begun = time.process_time()
        with pytest.raises(UserError) as refused:
            read()
        assert time.process_time() - begun < 3  # a third of it where nothing else is at work
        assert refused.value.code == 2 and len(str(refused.value)) < 60_000
    with pytest.raises(UserError, match=f"r.yaml:{words}|r.yaml:.*{words}"):
        load(path, SFT)


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "link", "/dev/zero", "/dev/null", "a\0b", "x" * 5000):
        with pytest.raises(UserError, match=r"cannot be read|no such recipe"):
            load(tmp_path / name, SFT)


def test_a_pipeline_has_an_end(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("run: a\nstages:\n" + "- {stage: sft}\n" * 3000)
    with pytest.raises(UserError, match="at most 200 stages"):
        load_pipeline(path, schema)


def test_a_character_that_json_escapes_in_two_halves_is_one():
    assert parse('"runs/\\ud83d\\ude42"', "x")[0] == "runs/\U0001f642"


@pytest.mark.parametrize(
    "text",
    ["1e5", "08", "0x10", "1_0", "~", "null", "yes", ".inf", "1:30", "a\x85b", "\u2028", " "],
)
def test_a_resolved_recipe_reads_as_it_was_written(tmp_path, text):
    (tmp_path / "r.yaml").write_text(GOOD)
    recipe = load(tmp_path / "r.yaml", SFT)
    recipe = recipe.model_copy(update={"model": text, "trainer": {text: text}})
    values, _ = parse(dump(recipe.model_dump(by_alias=True)), "recipe.yaml")
    assert values["model"] == text and values["trainer"] == {text: text}


@pytest.mark.parametrize("stage", [name for name in STAGES if name not in ("eval", "export")])
def test_a_length_is_one_that_can_be_counted(tmp_path, stage):
    path = tmp_path / "r.yaml"
    for length in (2**63, 10**30, 1 << 25):
        path.write_text(GOOD.replace("stage: sft", f"stage: {stage}"))
        with pytest.raises(UserError, match=r"data.max_length: .*less than or equal to 16777216"):
            load(path, schema(stage), [f"data.max_length={length}"])
