from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from llmpipe.data import write as writing
from llmpipe.data.kinds.blocks import BLOCKS
from llmpipe.data.kinds.pairs import PAIRS
from llmpipe.data.kinds.prompts import PROMPTS
from llmpipe.data.kinds.rows import ROWS
from llmpipe.data.pack import best_fit
from llmpipe.data.prepare import key_of, prepare
from llmpipe.errors import UserError
from llmpipe.recipe.sections import Data, Pairs, Preparation, Prompts

from .conftest import learned, load, make, make_model, saved, talk, write

ALPACA = [
    {"instruction": f"Say {i}", "input": "", "output": f"{i} " * (i % 23 + 1)} for i in range(300)
]


def documents(rows: list[dict]) -> Counter:
    """The documents of packed rows, as (ids, labels) -> how often."""
    found: Counter = Counter()
    for row in rows:
        at = 0
        for length in row.get("seq_lengths", [len(row["input_ids"])]):
            part = slice(at, at + length)
            found[(tuple(row["input_ids"][part]), tuple(row["labels"][part]))] += 1
            at += length
        assert at == len(row["input_ids"]) == len(row["labels"])
    return found


def test_packing_is_exact(here, base):
    write(Path("d.jsonl"), ALPACA)
    one, rows, _ = make(base, "d.jsonl", template="chatml", packing=False, max_length=256)
    packed, sequences, _ = make(base, "d.jsonl", template="chatml", packing=True, max_length=256)
    assert documents(rows) == documents(sequences)  # every document whole, once
    assert max(len(row["input_ids"]) for row in sequences) <= 256
    assert one["tokens"] == packed["tokens"]
    fewest = packed["tokens"]["train"] / 256
    assert packed["sequences"]["train"] == len(sequences) < 1.1 * fewest + 1
    assert one["sequences"]["train"] == len(rows) == 300


def test_best_fit_prefers_the_fullest_bin():
    assert best_fit([5, 6, 4, 3, 2], 10) == [[1, 2], [0, 3, 4]]
    assert best_fit([], 10) == []
    assert sorted(i for bin in best_fit([10] * 5, 10) for i in bin) == list(range(5))


def test_loads_with_datasets_and_equals_trl(here, base):
    import datasets
    from trl import pack_dataset

    write(Path("d.jsonl"), ALPACA)
    _, rows, _ = make(base, "d.jsonl", template="chatml", packing=False, max_length=256)
    record, sequences, _ = make(base, "d.jsonl", template="chatml", max_length=256)
    ours = datasets.Dataset.from_file(str(Path("cache", record["key"], "train.arrow")))
    assert ours.column_names == ["input_ids", "labels", "seq_lengths"] and ours[3] == sequences[3]
    theirs = pack_dataset(datasets.Dataset.from_list(rows), 256, "bfd")
    assert (
        len(theirs) <= len(ours) <= 1.03 * len(theirs)
    )  # the price of not sorting short rows by length
    assert ours.features["seq_lengths"].feature.dtype == "int32"
    assert documents(theirs.to_list()) == documents(sequences)


def files(folder: Path) -> dict[str, bytes]:
    found = {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    record = json.loads(found["prepared.json"])
    found["prepared.json"] = json.dumps({**record, "processes": 0, "seconds": 0}).encode()
    del found["sums.json"]  # it knows the other bytes of prepared.json
    return found


def test_same_bytes_for_any_number_of_processes(here, base):
    rows = [*ALPACA, {"instruction": "x", "output": 7}] * 4
    write(Path("d.jsonl"), rows)
    results = []
    for processes in (1, 2):
        make(
            base,
            "d.jsonl",
            template="chatml",
            cache=Path(f"c{processes}"),
            processes=processes,
            seed=5,
            eval={"holdout": 0.1},
        )
        folders = [p for p in Path(f"c{processes}").iterdir() if p.name[0] != "."]
        assert len(folders) == 1
        results.append((folders[0].name, files(folders[0])))
    assert results[0] == results[1]


def test_cache_is_reused_and_follows_content(here, base):
    write(Path("a/d.jsonl"), ALPACA[:5])
    data = Data.model_validate({"train": [{"path": "./a/d.jsonl"}], "template": "chatml"})
    said: list[str] = []
    ready = prepare(data, ROWS, base, Path("cache"), seed=0, say=said.append)
    first = ready.folder(Path("cache"))
    stamp = first.joinpath("prepared.json").stat().st_mtime_ns
    assert prepare(data, ROWS, base, Path("cache"), seed=0, say=said.append) == ready
    assert said[-1] == "data: 5 rows ready (cached)"
    assert first.joinpath("prepared.json").stat().st_mtime_ns == stamp
    assert sorted(p.name for p in Path("cache").iterdir()) == [first.name]
    assert sorted(p.name for p in first.iterdir()) == [
        "prepared.json",
        "rejected.jsonl",
        "seen.safetensors",
        "sums.json",
        "tokenizer",
        "train.arrow",
    ]
    assert (
        key_of(data, ROWS, base, 0)[0]
        == first.name
        == json.loads((first / "prepared.json").read_text())["key"]
    )

    def key(model=base, seed=0, **fields) -> str:
        return key_of(Data.model_validate({**data.model_dump(), **fields}), ROWS, model, seed)[0]

    write(Path("b/d.jsonl"), ALPACA[:5])
    assert key(train=[{"path": "./b/d.jsonl"}]) == first.name  # not where it lies
    assert key(processes=3) == first.name
    write(Path("b/d.jsonl"), [*ALPACA[:4], ALPACA[6]])
    other_model = make_model(here / "m", bos="<|start|>")
    changed = [
        key(train=[{"path": "./b/d.jsonl"}]),
        key(train=[{"path": "./a/d.jsonl", "limit": 2}]),
        key(model=other_model),
        key(seed=1),
        key(max_length=64),
        key(packing=False),
        key(template="alpaca"),
        key(loss="all"),
        key(eval={"holdout": 0.5}),
    ]
    assert len({*changed, first.name}) == len(changed) + 1


def test_what_was_not_finished_is_removed_or_refused(here, base):
    """What a killed process leaves has a name of its own; nothing without a table has a key's."""
    write(Path("d.jsonl"), ALPACA[:5])
    data = Data.model_validate({"train": [{"path": "d.jsonl"}], "template": "chatml"})
    key = key_of(data, ROWS, base, 0)[0]
    Path("cache", key).mkdir(parents=True)
    Path("cache", key, "train.arrow").write_text("half")
    with pytest.raises(UserError, match=r"sums\.json: missing\n  remove cache/") as refused:
        prepare(data, ROWS, base, Path("cache"), seed=0, say=lambda line: None)
    assert refused.value.code == 3
    shutil.rmtree(Path("cache", key))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for process in (gone.pid, os.getpid(), os.getppid()):
        Path("cache", f".{key}.{process}").mkdir()
    cache = Path("cache")
    folder = prepare(data, ROWS, base, cache, seed=0, say=lambda line: None).folder(cache)
    assert (
        folder.joinpath("prepared.json").exists()
        and folder.joinpath("train.arrow").stat().st_size > 100
    )
    assert {p.name for p in Path("cache").iterdir()} == {
        key,
        f".{key}.{os.getppid()}",
    }  # which still runs


def test_holdout_is_exact_and_disjoint(here, base):
    write(Path("d.jsonl"), ALPACA)
    record, train, held = make(
        base, "d.jsonl", template="chatml", packing=False, eval={"holdout": 0.1}
    )
    assert (len(train), len(held)) == (270, 30) == (record["rows"]["train"], record["rows"]["eval"])
    assert not set(documents(train)) & set(documents(held))
    _, _, other = make(
        base, "d.jsonl", template="chatml", packing=False, eval={"holdout": 0.1}, seed=1
    )
    assert documents(other) != documents(held)
    order = [
        tuple(row["input_ids"])
        for row in make(base, "d.jsonl", template="chatml", packing=False)[1]
    ]
    kept = [tuple(row["input_ids"]) for row in train]
    assert kept == [row for row in order if row in set(kept)]  # the order of the source


def test_equal_rows_fall_on_one_side(here, base):
    write(Path("d.jsonl"), [row for row in ALPACA[:30] for _ in range(3)])
    record, train, held = make(
        base, "d.jsonl", template="chatml", packing=False, eval={"holdout": 0.2}
    )
    assert record["rows"]["duplicates"] == 60
    assert len(held) == 18 and not set(documents(train)) & set(documents(held))
    write(Path("two.jsonl"), ALPACA[:2])
    assert (
        make(base, "two.jsonl", template="chatml", eval={"holdout": 0.001})[0]["rows"]["eval"] == 1
    )


def test_eval_sources_and_overlap(here, base):
    write(Path("d.jsonl"), ALPACA[:20])
    write(Path("e.jsonl"), ALPACA[15:25])
    own = {"sources": [{"path": "e.jsonl"}]}
    record, train, held = make(base, "d.jsonl", template="chatml", packing=False, eval=own)
    assert (len(train), len(held), record["rows"]["overlap"]) == (20, 10, 5)
    assert record["rows"]["read"] == record["rows"]["kept"] == 30


def test_weights_and_limits(here, base):
    write(Path("a.jsonl"), ALPACA[:100])
    write(Path("b.jsonl"), ALPACA[100:300])
    record, train, _ = make(
        base,
        {"path": "a.jsonl", "weight": 2.0, "limit": 10},
        {"path": "b.jsonl", "weight": 0.5},
        template="chatml",
        packing=False,
    )
    assert [source["read"] for source in record["sources"]] == [10, 200]
    counts = Counter(documents(train).values())
    assert counts[2] == 10 and 70 < counts[1] < 130
    assert record["rows"]["unseen"] == 200 - counts[1]
    assert record["rows"]["train"] == len(train) == 20 + counts[1]
    record, train, _ = make(
        base, {"path": "b.jsonl", "weight": 1.5}, template="chatml", packing=False
    )
    assert 270 < len(train) < 330 and len(documents(train)) == 200


def test_text_is_split_and_ends_with_eos(here):
    model = make_model(here / "m", bos="<|start|>")
    write(Path("d.jsonl"), [{"text": "Hello"}, {"text": "word " * 300}])
    record, train, _ = make(model, "d.jsonl", max_length=64, packing=False)
    tokenizer = saved()
    eos, bos = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|start|>")
    assert [train[0]["input_ids"][0], train[0]["input_ids"][-1]] == [bos, eos]
    assert all(row["labels"] == row["input_ids"] for row in train)
    joined = [token for row in train[1:] for token in row["input_ids"]]
    assert joined == [bos, *tokenizer.encode("word " * 300, add_special_tokens=False).ids, eos]
    assert record["rows"]["split"] == 1 and record["rows"]["pieces"] == len(train) - 2
    assert record["template"] is None and record["stop_tokens"] == ["<|endoftext|>"]


def test_overlong_conversation_is_cut_after_a_whole_turn(here, smol):
    write(Path("d.jsonl"), [talk(*["Hello there", "Hi you"] * 30)])
    record, train, _ = make(smol, "d.jsonl", max_length=128, packing=False)
    assert record["rows"]["truncated"] == 1 and record["rows"]["kept"] == 1
    assert len(train[0]["input_ids"]) <= 128
    assert train[0]["labels"][-1] == saved().token_to_id("<|im_end|>")


def test_prompt_completion_as_trl_does(here, base):
    from transformers import AutoTokenizer

    rows = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "Hel", "completion": "lo"}]
    Path("d.csv").write_text("prompt,completion\n2 + 2 =, 4\nHel,lo\n")
    said: list[str] = []
    record, train, _ = make(base, "d.csv", packing=False, said=said)
    assert any("format prompt-completion (prompt, completion)" in line for line in said)
    tokenizer = AutoTokenizer.from_pretrained(Path("cache", record["key"], "tokenizer"))
    for row, got in zip(rows, train, strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        shared = next(
            (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt)
        )
        assert got["input_ids"] == whole
        assert got["labels"] == [-100] * shared + whole[shared:]
    assert make(base, "d.csv", loss="all", packing=False)[1][0]["labels"] == train[0]["input_ids"]


def test_prompt_completion_of_messages_learns_the_completion_only(here, smol):
    chat = talk("a", "first", "b", "second")["messages"]
    write(Path("d.jsonl"), [{"prompt": chat[:3], "completion": chat[3:]}])
    _, train, _ = make(smol, "d.jsonl", packing=False)
    assert learned(saved(), train[0]) == ["second<|im_end|>"]


def test_turn_of_weight_zero_is_not_learned(here, smol, base):
    chat = talk("a", "first", "b", "second")
    chat["messages"][1]["weight"] = 0
    write(Path("d.jsonl"), [chat])
    row = make(smol, "d.jsonl", packing=False)[1][0]
    assert learned(saved(), row) == ["second<|im_end|>"]
    marked = make(base, "d.jsonl", packing=False, template="chatml", cache="marked")[1][0]
    assert learned(saved("marked"), marked) == ["second<|im_end|>"]


def test_preference_is_refused_in_one_line(here, smol):
    write(Path("d.jsonl"), [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(
        UserError, match="format preference is for reward and dpo, not for this stage"
    ):
        make(smol, "d.jsonl")


def test_every_kind_of_file_gives_the_same_rows(here, base):
    import pyarrow.parquet as pq

    rows = [{"instruction": f"Tell {i}\u2028ü", "output": f'a "{i}",\nb'} for i in range(700)]
    Path("f").mkdir()
    write(Path("f/d.jsonl"), rows)
    Path("d.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    Path("lines.json").write_text("\n".join(json.dumps(row) for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), "d.parquet")
    import csv

    for name, delimiter in (("d.csv", ","), ("d.tsv", "\t")):
        with open(name, "w", newline="") as file:
            writer = csv.DictWriter(file, ["instruction", "output"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    digests = set()
    for path in (
        "./f/d.jsonl",
        "./f",
        "f/*.jsonl",
        "d.json",
        "lines.json",
        "d.parquet",
        "d.csv",
        "d.tsv",
    ):
        record, _, _ = make(base, path if path != "./f" else "./f/", template="chatml")
        digests.add(record["content_digest"])
        assert record["rows"]["read"] == record["rows"]["kept"] == 700, path
        assert record["sources"][0]["files"][0]["name"] in ("d.jsonl", path)
    assert len(digests) == 1


def test_txt_is_one_document_in_passages(here, base):
    text = "".join(f"line {i}\u2028 of this text\n" for i in range(4000))
    Path("d.txt").write_text(text, encoding="utf-8")
    record, train, _ = make(base, "d.txt", packing=False, max_length=100_000)
    tokenizer = saved()
    assert 1 < record["rows"]["read"] == len(train) < 10
    whole = "\n".join(tokenizer.decode(row["input_ids"]) for row in train)
    assert whole == text.strip("\n")


def test_unicode_line_separators_stay_inside_a_row(here, base):
    write(Path("d.jsonl"), [{"text": "a\u2028b\u2029c\x85d\x0be"}, {"text": "next"}])
    record, train, _ = make(base, "d.jsonl", packing=False)
    assert record["rows"]["read"] == 2
    assert saved().decode(train[0]["input_ids"]) == "a\u2028b\u2029c\x85d\x0be"


def test_blocks_keep_their_documents_where_a_window_ends(here, monkeypatch):
    import numpy as np

    made = []
    for window in (2, 8192):
        monkeypatch.setattr(writing, "WINDOW_ROWS", window)
        out = writing.Writer(here / "x.arrow", BLOCKS, Preparation(8, packing=True))
        for n in (3, 2, 1, 4, 8, 1, 1, 2, 5):
            out.add((np.arange(n, dtype=np.int32), np.arange(n, dtype=np.int32)))
        out.close()
        with pa.memory_map("x.arrow") as file, pa.ipc.open_stream(file) as reader:
            made.append(reader.read_all().to_pydict())
    assert made[0] == made[1]
    assert made[0]["seq_lengths"] == [[3, 2, 1, 2], [2, 6], [2, 1, 1, 2, 2], [3]]


def test_hub_without_network_is_quick(here, base, monkeypatch):
    started = time.monotonic()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        make(base, "tatsu-lab/alpaca")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    with pytest.raises(UserError, match="cannot be reached"):
        make(base, "tatsu-lab/alpaca")
    Path("folder").mkdir()
    with pytest.raises(UserError) as error:
        make(base, "folder")
    assert "./folder" in error.value.hint and error.value.code == 2
    assert time.monotonic() - started < 4


def test_one_source_as_pairs_and_as_prompts_are_two_preparations(here, base):
    """A dpo and a ppo of one run may ask the same of the same rows."""
    write(Path("d.jsonl"), [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}])
    settings = {"train": [{"path": "d.jsonl"}], "max_length": 64}
    columns = {}
    for kind, data in ((PAIRS, Pairs(**settings)), (PROMPTS, Prompts(**settings))):
        ready = prepare(data, kind, base, Path("cache"), seed=0, say=lambda line: None)
        _, (row,), _ = load(ready.folder(Path("cache")))
        columns[kind.name] = sorted(row)
    assert columns == {
        "pairs": [
            *("chosen_context", "chosen_ids", "margin"),
            *("prompt_ids", "rejected_context", "rejected_ids"),
        ],
        "prompts": ["prompt_ids", "row"],
    }


def test_records_hold_no_absolute_path(here, base):
    write(here / "d.jsonl", [*ALPACA[:3], {"instruction": "x", "output": None}])
    make(base, str(here / "d.jsonl"), template="chatml")
    for path in Path("cache").rglob("*"):
        if path.is_file():
            assert str(here).encode() not in path.read_bytes(), path


def test_no_heavy_import():
    code = (
        "import sys, llmpipe.data.prepare\n"
        "heavy = {'torch', 'transformers', 'datasets', 'trl', 'pandas', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"


def test_workers_die_with_an_interrupted_parent(here, base):
    write(Path("d.jsonl"), ALPACA * 200)
    code = (
        "import sys; from pathlib import Path\n"
        "from llmpipe.data.kinds.rows import ROWS; from llmpipe.data.prepare import prepare\n"
        "from llmpipe.recipe.sections import Data\n"
        "if __name__ == '__main__':\n"
        # a job in the background ignores the signal
        " import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        " values = {'train': [{'path': 'd.jsonl'}], 'template': 'chatml', 'processes': 2}\n"
        " data = Data.model_validate(values)\n"
        " say = lambda line: print(line, flush=True)\n"
        " prepare(data, ROWS, Path(sys.argv[1]), Path('cache'), seed=0, say=say)\n"
    )
    Path("go.py").write_text(code)
    root = str(Path(__file__).parents[2])
    child = subprocess.Popen(
        [sys.executable, "go.py", str(base)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        start_new_session=True,
    )
    with child:
        for line in child.stdout:
            if "format alpaca" in line:
                break
        workers: set[str] = set()
        end = time.monotonic() + 20
        while len(workers) < 2 and time.monotonic() < end:
            found = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
            workers = {w for w in found if b"spawn_main" in Path(f"/proc/{w}/cmdline").read_bytes()}
            time.sleep(0.01)
        assert len(workers) == 2
        os.killpg(child.pid, 2)  # as a terminal does
        child.stdout.read()
        errors = child.stderr.read()
    assert child.returncode not in (0, None) and "KeyboardInterrupt" in errors
    time.sleep(0.2)
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    assert not [p for p in Path("cache").iterdir() if not p.name.startswith(".") or p.is_dir()]


def test_hub_rows(here, base, monkeypatch):
    """`datasets` reads a local folder as it reads a Hub id; only the revision is pretended."""
    from llmpipe.data import sources

    monkeypatch.setattr(sources, "hub_revision", lambda source: "c0ffee")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", here / "hf")
    write(Path("hub/train.jsonl"), [*ALPACA[:9], {"instruction": "x", "input": "", "output": ""}])
    record, train, _ = make(base, {"path": "hub", "limit": 10}, template="chatml", packing=False)
    assert len(train) == 9 and record["sources"][0]["revision"] == "c0ffee"
    assert record["rows"]["rejected_by_reason"] == {"empty text": 1}
    line = json.loads(next(Path("cache").glob("*/rejected.jsonl")).read_text())
    assert (line["file"], line["row"]) == ("hub", 10)
    with pytest.raises(UserError, match="hub: "):
        make(base, {"path": "hub", "split": "nothing"}, template="chatml")


def test_prompts_keep_what_rewards_read(tmp_path):
    """Text and messages, the answer beside them and every other column; what asks nothing is
    refused."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from tests.life import TINY

    rows = [
        {"prompt": "What is 2 + 2?", "answer": 4, "level": "easy"},
        {"prompt": "What is 2 + 3? " * 80, "answer": 5, "level": "long"},
        {
            "prompt": [{"role": "user", "content": "Is grass green?"}],
            "answer": None,
            "level": "hard",
        },
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "train": [{"path": str(tmp_path / "rows.jsonl")}],
        "max_length": 64,
        "max_rejected": 0.5,
    }
    ready = prepare(
        Prompts(**settings), PROMPTS, TINY / "model", tmp_path / "cache", seed=0, say=lambda _: None
    )
    folder = ready.folder(tmp_path / "cache")
    made = Dataset.from_file(str(folder / "train.arrow")).to_list()
    kept = [json.loads(row["row"]) for row in made]
    assert sorted(row["columns"]["level"] for row in kept) == ["easy", "hard"]
    easy = next(i for i, row in enumerate(kept) if row["columns"]["level"] == "easy")
    assert kept[easy] == {
        "prompt": "What is 2 + 2?",
        "tools": None,
        "reference": None,
        "columns": {"answer": 4, "level": "easy"},
    }
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    assert made[easy]["prompt_ids"] == tokenizer("What is 2 + 2?")["input_ids"]
    asked = tokenizer.apply_chat_template(
        rows[2]["prompt"], add_generation_prompt=True, return_dict=False
    )
    assert made[1 - easy]["prompt_ids"] == asked
    (rejected,) = [
        json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()
    ]
    assert (rejected["row"], rejected["reason"]) == (2, "too long")
    (tmp_path / "text.jsonl").write_text('{"text": "It asks nothing."}\n')
    with pytest.raises(UserError, match="format text is for pretrain and sft"):
        prepare(
            Prompts(train=[{"path": str(tmp_path / "text.jsonl")}]),
            PROMPTS,
            TINY / "model",
            tmp_path / "cache",
            seed=0,
            say=lambda _: None,
        )
