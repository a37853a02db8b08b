"""Every family of tokenizers with every shipped template and with its own: what ends a turn, what
is learned, what stops a generation, and what somebody else reads from the saved folder.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from llmpipe.data.tokenizer import SEVERAL_LINES, Tokenizer
from tests.data.families import FAMILIES, Family

from .conftest import learned, make, talk, write

ANSWERS = ("First line.\n\nSecond:\n\t- one\n  - 12", 'Yes! "And" café 你好')
ROW = talk("Hello there", ANSWERS[0], "And\nwhat?", ANSWERS[1])
# How often a conversation holds the first token, where that is not once.
BEGINS = {("llama2", "auto"): 2, ("vicuna", "auto"): 0}
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}
CASES = [
    (family, template)
    for family in FAMILIES
    for template in ("auto", "chatml", "alpaca", "llama3")
    if not (template == "auto" and FAMILIES[family].template is None)
    and not (template == "alpaca" and family == "no-eos")
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("families")
    return {name: family.write(home / name) for name, family in FAMILIES.items()}


def expected_end(family: Family, template: str) -> str:
    if template == "auto":
        assert family.end
        return family.end
    return ENDS.get(template) or _text(family.config["eos_token"])


def _text(token: str | dict) -> str:
    return token["content"] if isinstance(token, dict) else token


@pytest.mark.parametrize(("name", "template"), CASES)
def test_a_family_with_a_template(here, folders, name, template):
    tokenizer, ids = prepared(folders[name], FAMILIES[name], template)
    bos = Tokenizer(folders[name]).bos
    if bos is not None:
        assert ids.count(bos) == BEGINS.get((name, template), 1)
    assert (tokenizer("Hello")["input_ids"][0] == tokenizer.bos_token_id) == (bos is not None)


def prepared(folder: Path, family: Family, template: str):
    """Prepare a conversation, and look at all of it; the saved tokenizer and the ids."""
    from transformers import AutoTokenizer

    write(Path("d.jsonl"), [ROW])
    record, train, _ = make(folder, "d.jsonl", template=template, packing=False)
    assert record["rows"]["rejected_by_reason"] == {}
    saved = next(Path("cache").glob("*/tokenizer"))
    tokenizer = AutoTokenizer.from_pretrained(saved)

    # what ends a turn, and what stops a generation
    end = expected_end(family, template)
    last = tokenizer.backend_tokenizer.encode(end, add_special_tokens=False).tokens[-1]
    assert record["stop_tokens"][0] == last
    stops = set(tokenizer.convert_tokens_to_ids(record["stop_tokens"]))
    assert set(family.stops) <= set(record["stop_tokens"])
    ordinary = tokenizer(SEVERAL_LINES, add_special_tokens=False)["input_ids"]
    assert None not in stops and not stops & set(ordinary)
    eos = family.config.get("eos_token")
    assert record["eos_token"] == (last if template in ENDS or eos is None else _text(eos))

    # what is learned: the words and the end behind them, and no stop token before it
    ids, labels = train[0]["input_ids"], train[0]["labels"]
    said = learned(tokenizer.backend_tokenizer, train[0])
    frames = family.frames if template == "auto" and family.frames else [("", end)] * 2
    for text, words, (before, behind) in zip(said, ANSWERS, frames, strict=True):
        assert _plain(text, family) == _plain(before + words + behind, family)
    assert [label for label in labels if label != -100][-1] in stops
    for words in ANSWERS:
        assert not stops & set(tokenizer(words, add_special_tokens=False)["input_ids"])

    # what others see
    assert ids == tokenizer.apply_chat_template(ROW["messages"], tokenize=True)["input_ids"]
    assert max(tokenizer.get_vocab().values()) + 1 == record["vocab_size"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == (record["eos_token"], record["pad_token"])
    assert (tokenizer.bos_token or "") == _text(family.config.get("bos_token") or "")
    both = _plain(tokenizer.decode(ids), family)
    assert all(_plain(words, family) in both for words in ANSWERS)
    return tokenizer, ids


def _plain(text: str, family: Family) -> str:
    """A text up to what its tokenizer keeps: all of it but for a space before the first word."""
    if family.keeps:
        return text.strip(" ").replace(" </s>", "</s>")
    return "".join(text.lower().replace("é", "e").split())


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_of_texts_are_those_of_transformers(folders, name):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders[name])
    ours = Tokenizer(folders[name])
    for text in (
        SEVERAL_LINES,
        *ANSWERS,
        " Hello  there ",
        "\n",
        "a\n\n\nb\t\tc",
        "<unused0> é 🙂",
    ):
        assert ours.ids(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.id("eos_token") == theirs.eos_token_id
    assert ours.id("pad_token") == theirs.pad_token_id
    flagged = {token.content for token in theirs.added_tokens_decoder.values() if token.special}
    assert set(ours.special_tokens()) >= flagged
