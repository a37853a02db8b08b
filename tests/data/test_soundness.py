"""Patterns and parts of a tokenizer.json that end, and those that may not."""

import json

import pytest

from llmpipe.data.patterns import check_pattern
from llmpipe.data.soundness import check_tokenizer
from llmpipe.errors import UserError
from tests import life
from tests.data.families import FAMILIES

WORDS = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"""
REAL = {
    "llama3": WORDS + r"|\s*[\r\n]|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lm}]+(?i:'s|'t|'re)?|\p{N}{1,3}",
    "deepseek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}]+",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "kimi": r"[\p{Han}]+|[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}&&[^\p{Han}]]+",
    "digits from the right": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
    "groups of digits": r"(?=(\d{3})+(?!\d))",
    "clip": r"<\|startoftext\|>|'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "spaces": r" {2,}",
}

ENDLESS = {
    "repetition of a repetition": ("(a+)+$", "in several ways"),
    "with an option": (r"(\w+\s?)*$", "in several ways"),
    "choice": ("(a|a)*", "in several ways"),
    "options": ("(?:a?b?)+x", "in several ways"),
    "counted": ("(.*a){25}", "in several ways"),
    "written out": ("((a{1,500}){1,500}){1,500}", "counted repetitions"),
    "reference": (r"(\w*)\1{20}", "reference"),
    "named reference": (r"(?<x>a)\k<x>", "reference"),
    "absence": ("(?~abc)", "not known"),
    "callout": ("(*FAIL)", "not known"),
    "length": ("x" * 20_000, "characters"),
    "depth": ("(" * 100 + ")" * 100, "nested deeper"),
    "row": (r"\w*" * 20, "in a row"),
    "no end": ("(((", "no end"),
    "no beginning": (")", "never began"),
    "no end of a class": ("[[[a", "no end"),
}


@pytest.mark.parametrize("name", REAL)
def test_patterns_of_real_families_pass(name):
    check_pattern(REAL[name])


@pytest.mark.parametrize("name", ENDLESS)
def test_patterns_without_end_are_refused(name):
    pattern, why = ENDLESS[name]
    with pytest.raises(ValueError, match=why):
        check_pattern(pattern)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokenizers_of_every_family_pass(name, tmp_path):
    family = FAMILIES[name]
    if family.build:
        check_tokenizer(family.write(tmp_path) / "tokenizer.json")


def test_growth_is_that_of_all_steps_together(tmp_path):
    values = json.loads((life.TINY / "model" / "tokenizer.json").read_text())
    twice = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    path = tmp_path / "tokenizer.json"
    for steps, refused in ((6, False), (7, True)):
        values["normalizer"] = {"type": "Sequence", "normalizers": [twice] * steps}
        path.write_text(json.dumps(values))
        if refused:
            with pytest.raises(UserError, match="may grow by 128"):
                check_tokenizer(path)
        else:
            check_tokenizer(path)
