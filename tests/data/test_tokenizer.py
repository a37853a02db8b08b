"""A model folder's tokenizer as transformers reads it, and refused where it cannot be meant so."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken

from llmpipe.data.template import choose, sandbox
from llmpipe.data.tokenizer import Tokenizer
from llmpipe.errors import UserError
from tests.data.families import FAMILIES, GEMMA, GEMMA_MARKED, QWEN

from .conftest import learned, make, saved, talk, write

LINES = talk("Hello", "One,\ntwo,\n\nthree.", "And?", "- a\n- b")
TEXT = "Hello there\n<|im_start|>user\nAnd<|im_end|>\n"


def folder(path: Path, name: str = "qwen", **changes) -> Path:
    return replace(FAMILIES[name], **changes).write(path)


def ids(path: Path, text: str = TEXT) -> tuple[list[int], list[int]]:
    """Ids as llmpipe has them, and as transformers has them."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(path)(text, add_special_tokens=False)["input_ids"]
    return Tokenizer(path).ids(text), theirs


# --- what ends a turn -----------------------------------------------------------------------------


@pytest.mark.parametrize("template", [GEMMA, GEMMA_MARKED])
@pytest.mark.parametrize("where", ["auto", "./own.jinja"])
def test_a_newline_that_is_an_added_token_ends_no_turn(here, template, where):
    Path("own.jinja").write_text(template)
    model = folder(here / "m", "gemma", template=template)
    write(Path("d.jsonl"), [LINES])
    record, train, _ = make(model, "d.jsonl", template=where, packing=False)
    assert record["rows"]["rejected_by_reason"] == {}
    assert record["stop_tokens"] == ["<end_of_turn>", "<eos>"]
    assert record["eos_token"] == ("<eos>" if where == "auto" else "<end_of_turn>")
    said = learned(saved(), train[0])
    assert said == ["One,\ntwo,\n\nthree.<end_of_turn>", "- a\n- b<end_of_turn>"]


@pytest.mark.parametrize("name", ["gemma", "unigram", "llama3"])
@pytest.mark.parametrize("end", [r"\n", r"\n\n", "<unused0>", " STOP"])
def test_what_is_no_special_token_ends_no_turn(tmp_path, name, end):
    """Whatever the vocabulary makes of it: a piece of its own, an added token, or letters."""
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + 'END' }}{% endfor %}"
    template = template.replace("END", end)
    model = folder(tmp_path / "m", name, template=template)
    with pytest.raises(UserError, match="no end-of-turn token") as error:
        choose(model, "auto", {})
    assert "which is no special token" in str(error.value) and "chatml" in error.value.hint


@pytest.mark.parametrize(
    ("written", "ends"),
    [
        # only at the end of the conversation, and headers of two special tokens
        ("'<|TURN|><|USER|>' + m.content + (eos_token if loop.last else '')", ["<|END_TURN|>"]),
        # and behind it the end of the text
        ("m.content + '<|END_SAYS|>' + (eos_token if loop.last else '')", ["<|END_SAYS|>"]),
        # text before it
        ("m.role + ': ' + m.content + '\n-- over --\n<|END_TURN|>\n'", ["<|END_TURN|>"]),
        # another one within
        (
            "'<|TURN|>' + m.content + ('<|END_TURN|>' if loop.last else '<|END_SAYS|>')",
            ["<|END_TURN|>", "<|END_SAYS|>"],
        ),
    ],
)
def test_what_ends_turns(tmp_path, written, ends):
    loop = "{% for m in messages %}{{ " + written + " }}{% endfor %}"
    opening = "{% if add_generation_prompt %}{{ '<|TURN|><|BOT|>' }}{% endif %}"
    model = folder(tmp_path / "m", "cohere", template=loop + opening)
    assert choose(model, "auto", {}).ends == ends


@pytest.mark.parametrize("condition", ["m.content == 'turn3'", "'\n' not in m.content"])
def test_an_end_that_depends_on_the_words_is_none(tmp_path, condition):
    template = "{% for m in messages %}{{ m.content + (eos_token if COND else '\n') }}{% endfor %}"
    model = folder(tmp_path / "m", "llama3", template=template.replace("COND", condition))
    with pytest.raises(UserError, match="no end-of-turn token"):
        choose(model, "auto", {})


def test_a_template_that_rewrites_words(tmp_path):
    template = "{% for m in messages %}{{ m.content | replace('\n', ' ') + eos_token }}{% endfor %}"
    model = folder(tmp_path / "m", "llama3", template=template)
    with pytest.raises(UserError, match=r"does not say 'Turn 0:\\n"):
        choose(model, "auto", {})


def test_an_end_that_is_not_read_behind_words(tmp_path):
    end = AddedToken("stop", single_word=True, special=True, normalized=False)
    template = "{% for m in messages %}{{ m.content + 'stop' }}{% endfor %}"
    model = folder(tmp_path / "m", "gpt2", special=("<|endoftext|>", end), template=template)
    with pytest.raises(UserError, match="ends turns with stop, which the tokenizer reads as text"):
        choose(model, "auto", {})


# --- what stops a generation ----------------------------------------------------------------------


@pytest.mark.parametrize("template", ["auto", "chatml", "alpaca", "llama3"])
@pytest.mark.parametrize("name", ["gemma", "llama3"])
def test_an_eos_that_ordinary_text_holds(tmp_path, name, template):
    """As llmpipe itself once published it."""
    eos = "\n" if name == "gemma" else "."
    config = {**FAMILIES[name].config, "eos_token": eos}
    model = folder(tmp_path / "m", name, config=config)
    with pytest.raises(UserError, match=r"would end every generation, and ordinary text holds it"):
        choose(model, template, {})


def test_configs_that_stop_at_ordinary_text(tmp_path):
    model = folder(tmp_path / "m", "gemma", stops=("<end_of_turn>", "\n", "\n\n"))
    choice = choose(model, "auto", {})
    assert choice.stop_tokens == ["<end_of_turn>", "<eos>"]
    assert [note for note in choice.notes if "generation will not stop there" in note]


@pytest.mark.parametrize("eos", [None, [], -1, 1 << 40, 10**6, True, "2", [None, -5], 1.5])
def test_configs_with_an_odd_eos(tmp_path, eos):
    model = folder(tmp_path / "m")
    model.joinpath("generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert set(choose(model, "auto", {}).stop_tokens) >= {"<|im_end|>"}


# --- the files of a folder ------------------------------------------------------------------------


def listed(*tokens: str, first: int, **flags) -> dict:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, **flags}
    return {str(first + i): {"content": text, **flags} for i, text in enumerate(tokens)}


def test_tokens_that_only_the_config_lists(tmp_path):
    """As slow tokenizers were extended: `add_tokens`, and tokenizer.json was not written anew."""
    model = folder(tmp_path / "m", "gpt2", template=QWEN)
    first = Tokenizer(model).backend.get_vocab_size()
    tokens = listed("<|im_start|>", "<|im_end|>", first=first, special=True)
    config = {**FAMILIES["gpt2"].config, "added_tokens_decoder": tokens}
    model.joinpath("tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = ids(model)
    assert ours == theirs and {first, first + 1} <= set(ours)
    choice = choose(model, "auto", {})
    assert choice.ends == ["<|im_end|>"] and choice.added_tokens == []
    choice.tokenizer.save(tmp_path / "saved", choice.template)
    assert ids(tmp_path / "saved") == (ours, theirs)

    config["added_tokens_decoder"] = listed("<|im_end|>", first=first + 7, special=True)
    model.joinpath("tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"is token {first + 7} of its config") as error:
        Tokenizer(model)
    assert "save_pretrained" in error.value.hint


def test_tokens_of_added_tokens_json(tmp_path):
    model = folder(tmp_path / "m", "gpt2")
    first = Tokenizer(model).backend.get_vocab_size()
    added = {"<|im_end|>": first + 1, "<|im_start|>": first}
    model.joinpath("added_tokens.json").write_text(json.dumps(added))
    ours, theirs = ids(model)
    assert ours == theirs and {first, first + 1} <= set(ours)


@pytest.mark.parametrize("wrong", [[1], {"a": 1}, {"x": {"content": "y"}}, {"1": {"text": "y"}}])
def test_added_tokens_that_cannot_be_read(tmp_path, wrong):
    model = folder(tmp_path / "m", config={"added_tokens_decoder": wrong})
    with pytest.raises(UserError, match="added tokens of the model's tokenizer cannot be") as error:
        Tokenizer(model)
    assert error.value.message.startswith(f"{model}: ")


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": "<|im_end|>"},
        {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "normalized": True}},
        {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|im_end|>"]},
        {"eos_token": "<|endoftext|>", "extra_special_tokens": {"turn_token": "<|im_end|>"}},
    ],
)
def test_a_token_is_special_by_its_name(tmp_path, config):
    """Flagged in tokenizer.json or not; and whoever loads what is saved sees it so, too."""
    special, plain = ("<|endoftext|>",), ("<|im_end|>",)
    model = folder(tmp_path / "m", special=special, plain=plain, config=config, stops=())
    choice = choose(model, "auto", {})
    assert choice.ends == ["<|im_end|>"]
    choice.tokenizer.save(tmp_path / "saved", choice.template)
    ours, theirs = ids(tmp_path / "saved")
    assert ours == theirs
    assert saved_tokenizer(tmp_path / "saved").decode(ours).count("<|im_end|>") == 0


def saved_tokenizer(path: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))


def test_an_unmarked_token_of_a_shipped_template_becomes_special(tmp_path):
    """It has a number, and gets no other: nothing is added."""
    plain = ("<|im_end|>", "<|im_start|>")
    config = {"eos_token": "<|endoftext|>"}
    model = folder(tmp_path / "m", special=("<|endoftext|>",), plain=plain, config=config, stops=())
    with pytest.raises(UserError, match=r"only '<\|im_end\|>.n', which is no special token"):
        choose(model, "auto", {})
    choice = choose(model, "chatml", {})
    assert choice.ends == ["<|im_end|>"] and choice.added_tokens == []
    before = Tokenizer(model).backend.get_vocab()
    assert choice.tokenizer.backend.get_vocab() == before


def test_an_eos_that_is_a_piece_of_the_vocabulary(tmp_path):
    """transformers makes a token of it, so that text which holds it has other ids."""
    model = folder(tmp_path / "m", "gpt2")
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    number = content["added_tokens"].pop()["id"]
    content["model"]["vocab"]["<|endoftext|>"] = number
    file.write_text(json.dumps(content))
    ours, theirs = ids(model, "Hello<|endoftext|>Hello")
    assert ours == theirs and number in ours


def test_a_token_that_tokenizer_json_lacks_is_said(tmp_path):
    config = {**FAMILIES["gpt2"].config, "pad_token": "[PAD]"}
    choice = choose(folder(tmp_path / "m", "gpt2", config=config), "chatml", {})
    assert "pad_token [PAD] is not used: tokenizer.json has no such token" in choice.notes
    assert choice.tokenizer.special["pad_token"] == "<|im_end|>"


def test_numbers_with_holes(tmp_path):
    model = folder(tmp_path / "m", "gpt2")
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    size = len(vocabulary)
    content["added_tokens"][0]["id"] = size - 2
    moved = [name for name, number in vocabulary.items() if number >= size - 3]
    vocabulary.update({name: size + i for i, name in enumerate(moved)})
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="its numbers have holes"):
        choose(model, "chatml", {})
    assert choose(model, "alpaca", {}).ends == ["<|endoftext|>"]


def test_numbers_with_holes_that_are_filled(tmp_path):
    """As GPT-4o's: whoever reads the file gives new tokens the free numbers, and so do we."""
    from transformers import AutoTokenizer

    from llmpipe.models.pretrained import rows_of

    model = folder(tmp_path / "m", "gpt2")
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    size = len(content["model"]["vocab"])
    content["model"]["vocab"]["<|endofprompt|>"] = size + 18
    special = {**content["added_tokens"][0], "content": "<|endofprompt|>", "id": size + 18}
    content["added_tokens"].append(special)
    file.write_text(json.dumps(content))
    choice = choose(model, "chatml", {})
    choice.tokenizer.save(tmp_path / "saved", choice.template)
    assert choice.tokenizer.raw == (tmp_path / "saved" / "tokenizer.json").read_text()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.get_vocab() == choice.tokenizer.backend.get_vocab()
    assert rows_of(theirs) == size + 19 > len(theirs)
    ours, others = ids(tmp_path / "saved")
    assert ours == others and theirs.convert_tokens_to_ids("<|im_end|>") in ours


@pytest.mark.parametrize("names", [["tokenizer.model"], ["merges.txt", "vocab.json"], []])
def test_no_tokenizer_json(tmp_path, names):
    for name in names:
        tmp_path.joinpath(name).write_text("x")
    with pytest.raises(UserError, match=r"no tokenizer\.json") as error:
        Tokenizer(tmp_path)
    assert error.value.message.startswith(f"{tmp_path}: ")
    assert error.value.code == 3
    if names:
        assert names[-1] in str(error.value) and "save_pretrained" in error.value.hint


def test_tokens_are_added_beside_all_that_is_there(tmp_path):
    """The post-processor, truncation and padding are as they were for whoever loads the folder."""
    model = folder(tmp_path / "m", "gemma")
    backend = saved_tokenizer(model)
    backend.enable_truncation(77)
    backend.enable_padding(pad_token="<pad>", pad_id=0)
    backend.save(str(model / "tokenizer.json"))
    choice = choose(model, "chatml", {})
    choice.tokenizer.save(tmp_path / "saved", choice.template)
    after = saved_tokenizer(tmp_path / "saved")
    assert after.truncation == backend.truncation and after.padding == backend.padding
    assert after.encode("Hello").ids == backend.encode("Hello").ids
    assert after.token_to_id("<|im_end|>") == backend.get_vocab_size()


@pytest.mark.parametrize(("asked", "does"), [(True, False), (False, True)])
def test_the_first_token_is_written_as_the_config_says(tmp_path, asked, does):
    from transformers import AutoTokenizer

    config = {"bos_token": "<BOS>", "eos_token": "<|END_TURN|>", "add_bos_token": asked}
    model = folder(tmp_path / "m", "cohere", config=config, begins="<BOS>" if does else None)
    ours = Tokenizer(model)
    assert (ours.bos is not None) == asked
    ours.save(tmp_path / "saved", None)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs("Hello")["input_ids"] == [ours.bos] * asked + ours.ids("Hello")


# --- a large vocabulary ---------------------------------------------------------------------------


def test_a_vocabulary_of_200_000_pieces(tmp_path, monkeypatch):
    """Its file takes longer to read than a template may render, and more memory."""
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(sandbox, "MAX_BYTES", 8 << 20)
    digits = "0123456789abcdef"
    pieces = [
        "".join(letters)
        for size in range(1, 6)
        for letters in islice(product(digits, repeat=size), 150_000)
    ]
    merges = [(piece[:-1], piece[-1]) for piece in pieces if len(piece) > 1]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    assert len(pieces) > 200_000
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.add_tokens(["\n", "\n\n"])
    tokenizer.save(str(tmp_path / "tokenizer.json"), pretty=False)
    tmp_path.joinpath("tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    ends = {"chatml": "<|im_end|>", "alpaca": "<eos>", "llama3": "<|eot_id|>"}
    for name, end in ends.items():
        assert choose(tmp_path, name, {}).stop_tokens == list(dict.fromkeys([end, "<eos>"]))
