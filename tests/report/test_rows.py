"""`llmpipe prepare --show-rows`: what is printed is what lies in the file, marks and all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from llmpipe.data.kinds.labels import LABELS
from llmpipe.data.kinds.pairs import PAIRS
from llmpipe.data.kinds.prompts import PROMPTS
from llmpipe.data.kinds.rows import ROWS
from llmpipe.data.prepare import prepare
from llmpipe.errors import UserError
from llmpipe.recipe.sections import Data, Pairs, Prompts
from llmpipe.report.rows import GREEN, PLAIN, Example, marked, show_rows
from tests.data.conftest import make_model

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"prompt": "What colour is grass?", "completion": "Green."},
    {"prompt": "草是什么颜色的？", "completion": "草是绿色的。"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "chat"
    return make_model(folder, special=("<|im_end|>", "<|im_start|>"), template=CHATML)


def written(path: Path, rows: list[dict]) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def turns(prompt: str, completion: str) -> dict:
    asked = {"role": "user", "content": prompt}
    return {"messages": [asked, {"role": "assistant", "content": completion}]}


def shown(section, kind, model: Path, rows: list[dict], folder: Path, **fields) -> str:
    path = written(folder / "rows.jsonl", rows)
    data = section.model_validate({"train": [{"path": str(path)}], **fields})
    ready = prepare(data, kind, model, folder / "cache", seed=0, say=lambda line: None)
    return "\n".join(show_rows(ready, folder / "cache", len(rows), colour=False))


@pytest.mark.parametrize("packing", [True, False])
def test_english_and_chinese_rows_are_shown_with_what_is_learned(model, tmp_path, packing):
    text = shown(Data, ROWS, model, [turns(**row) for row in TALK], tmp_path, packing=packing)
    assert text.startswith("2 of 2 rows")
    for row in TALK:
        asked = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n"
        assert f"{asked}<|im_start|>assistant\n[[{row['completion']}<|im_end|>]]\n" in text


def test_a_character_torn_between_stretches_stands_whole_in_the_second(model):
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode("草花").ids
    assert len(ids) == 6  # bytes
    assert marked(tokenizer, Example("", ids, [False] * 2 + [True] * 4)) == "[[草花]]"
    assert marked(tokenizer, Example("", ids, [True] * 4 + [False] * 2)) == "[[草]]花"


def test_every_answer_of_a_pair_is_shown_behind_its_prompt(model, tmp_path):
    pair = {"prompt": "Is snow hot?", "chosen": "No.", "rejected": "Yes."}
    for kind in (PAIRS, LABELS):
        folder = tmp_path / kind.name
        folder.mkdir()
        text = shown(Pairs, kind, model, [pair], folder)
        assert "Is snow hot?[[No.<|im_end|>]]" in text
    text = shown(Pairs, PAIRS, model, [pair], tmp_path)
    assert "row 1, rejected: " in text
    assert "Is snow hot?[[Yes.<|im_end|>]]" in text


def test_a_prompt_has_nothing_learned(model, tmp_path):
    text = shown(Prompts, PROMPTS, model, [turns(**TALK[0])], tmp_path)
    assert text.endswith(
        "0 learned\n<|im_start|>user\n" + TALK[0]["prompt"] + "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_rows_are_taken_evenly_and_counted(model, tmp_path):
    path = written(tmp_path / "rows.jsonl", [{"text": f"row number {n}"} for n in range(10)])
    data = Data.model_validate({"train": [{"path": str(path)}], "packing": False})
    ready = prepare(data, ROWS, model, tmp_path / "cache", seed=0, say=lambda line: None)
    lines = list(show_rows(ready, tmp_path / "cache", 2, colour=True))
    assert lines[0].startswith("2 of 10 rows")
    assert [line for line in lines if line.startswith("row")] == [
        "row 1: 12 tokens, 12 learned",
        "row 6: 12 tokens, 12 learned",
    ]
    assert lines[3] == f"[[{GREEN}row number 0<|im_end|>{PLAIN}]]"
    assert lines[6] == f"[[{GREEN}row number 5<|im_end|>{PLAIN}]]"


def test_a_folder_without_rows_is_said(model, tmp_path):
    path = written(tmp_path / "rows.jsonl", [{"text": "a row"}])
    data = Data.model_validate({"train": [{"path": str(path)}]})
    ready = prepare(data, ROWS, model, tmp_path / "cache", seed=0, say=lambda line: None)
    with pytest.raises(UserError, match="no rows are kept here"):
        next(show_rows(ready, tmp_path / "elsewhere", 1, colour=False))
