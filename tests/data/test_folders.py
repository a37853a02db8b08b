"""Which files of a folder are read, which are named, and which split is trained on."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from llmpipe.data.folders import select
from llmpipe.data.readers.compressed import text_bytes
from llmpipe.data.sources import identity_of
from llmpipe.errors import UserError
from llmpipe.files.tables import stamp, table
from llmpipe.recipe.sections import Rows, Source, is_local
from tests import life

from .conftest import make, write

ROWS = [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(3)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def touch(*names: str) -> None:
    for name in names:
        write(Path(name), ROWS)


def names(source: Rows) -> list[str]:
    return [file.name for file in select(source).files]


def notes(path: str, **fields) -> str:
    return "\n".join(select(Source(path=path, **fields)).notes)


# --- kinds of files ---

PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    "GZ": gzip.compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_are_read(here, base, suffix):
    bad = b'{"prompt": "no end\n'
    Path("d.jsonl").write_bytes(TEXT + bad)
    plain, rows, _ = make(base, "d.jsonl", template="chatml")
    Path("d.jsonl").unlink()
    Path(f"d.jsonl.{suffix}").write_bytes(PACKERS[suffix](TEXT) + PACKERS[suffix](bad))
    packed, same, _ = make(base, f"d.jsonl.{suffix}", template="chatml")  # without ./
    assert same == rows and packed["content_digest"] == plain["content_digest"]
    for rejected in Path("cache").glob("*/rejected.jsonl"):
        assert json.loads(rejected.read_text())["row"] == 4  # the line of the text


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("kind", ["json", "csv", "tsv", "txt", "ndjson"])
def test_every_kind_of_text_may_be_compressed(here, base, kind, suffix):
    text = {
        "json": json.dumps(ROWS),
        "csv": "prompt,completion\na,b\n",
        "tsv": "prompt\tcompletion\na\tb\n",
        "txt": "A document.",
        "ndjson": TEXT.decode(),
    }[kind]
    Path(f"d.{kind}.{suffix}").write_bytes(PACKERS[suffix](text.encode()))
    record, _, _ = make(base, f"./d.{kind}.{suffix}", template="chatml")
    assert record["rows"]["kept"] == (3 if "json" in kind else 1)


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_file_that_is_cut_off_is_refused(here, base, suffix):
    data = os.urandom(1 << 12).hex().encode()
    lines = b"".join(b'{"text": "%b"}\n' % data for _ in range(50))
    Path(f"d.jsonl.{suffix}").write_bytes(PACKERS[suffix](lines)[:-40])
    with pytest.raises(UserError, match=rf"d\.jsonl\.{suffix}: cannot be read") as error:
        make(base, f"./d.jsonl.{suffix}")
    assert error.value.code == 2
    Path(f"e.jsonl.{suffix}").write_bytes(b"nothing of the kind" * 9)
    with pytest.raises(UserError, match=rf"e\.jsonl\.{suffix}: cannot be read"):
        make(base, f"./e.jsonl.{suffix}")


def test_arrow_and_feather_are_read(here, base):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile("s.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    pa.feather.write_feather(table, "f.feather")
    pa.parquet.write_table(table, "p.parquet")
    digests = {
        make(base, f"./{name}", template="chatml")[0]["content_digest"]
        for name in ("s.arrow", "f.feather", "p.parquet")
    }
    assert len(digests) == 1
    Path("c.arrow").write_bytes(Path("s.arrow").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"c\.arrow:1: cannot be read as Arrow"):
        make(base, "./c.arrow", template="chatml")


def test_columns_of_one_name_are_refused(here, base):
    table = pa.table([["a"], ["b"], ["c"]], names=["prompt", "completion", "completion"])
    with pa.OSFile("s.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    pa.parquet.write_table(table, "p.parquet")
    for name in ("s.arrow", "p.parquet"):
        with pytest.raises(UserError, match="two columns are called 'completion', number 2 and 3"):
            make(base, f"./{name}", template="chatml")


def test_the_size_of_a_compressed_text_is_about_known(here):
    text = "".join(f"{i} {i**3}\n" for i in range(100_000)).encode()
    for suffix, pack in PACKERS.items():
        path = Path(f"d.txt.{suffix}")
        path.write_bytes(pack(text))
        size = text_bytes(path, path.stat().st_size)
        assert len(text) / 2 < size < len(text) * 2
        path.write_bytes(pack(text[:1000]))
        assert text_bytes(path, path.stat().st_size) == 1000


def test_what_is_not_read_is_named(here):
    touch("d/a.jsonl", "d/sub/b.ndjson", "d/C.JSONL")
    for name in ("x.xlsx", "y.zip", "part-00000", "rows.jsonl.bak", "odd.parquet.gz"):
        Path("d", name).write_text("?")
    for name in ("README.md", "LICENSE", ".gitattributes", "load.py", "cat.png", "_SUCCESS"):
        Path("d", name).write_text("?")
    for name in ("README.txt", "requirements.txt", "dataset_infos.json"):
        Path("d", name).write_text("?")
    assert names(Source(path="./d")) == ["C.JSONL", "a.jsonl", "sub/b.ndjson"]
    every = "README.txt, odd.parquet.gz, part-00000, requirements.txt, rows.jsonl.bak and 2 more"
    assert notes("./d") == f"not read: {every}"
    for name in ("a.jsonl", "C.JSONL", "sub/b.ndjson"):
        Path("d", name).unlink()
    with pytest.raises(UserError, match=r"no data files in this folder; there is README\.txt"):
        select(Source(path="./d"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.xlsx", b"?", "not a known kind"),
        ("d.tar.gz", b"?", "not a known kind"),
        ("d.gz", b"?", "not a known kind"),
        ("d.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("d.txt", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("d.csv.gz", gzip.compress("a".encode("utf-16"), mtime=0), "UTF-16"),
        ("d.csv.gz", gzip.compress(b"", mtime=0), "the file is empty"),
    ],
)
def test_a_file_is_refused(here, name, content, said):
    Path(name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        select(Source(path=f"./{name}"))


@pytest.mark.parametrize("name", ["d.jsonl.gz", "D.JSONL", "d.ndjson", "d.csv.zst", "d.arrow"])
def test_local_suffixes(name):
    assert is_local(name) and not is_local(f"someone/{name.partition('.')[0]}")


def test_only_the_kind_of_a_file_counts_beside_its_content():
    one, other = (
        identity_of(Source(path=path), [(path, "0" * 64)], None)
        for path in ("./a.jsonl.gz", "./b.JSONL.gz")
    )
    assert one == other and one["files"] == [[".jsonl.gz", "0" * 64]]
    asked = identity_of(Source(path="./a.jsonl", split="train"), [("a.jsonl", "0" * 64)], None)
    assert asked == identity_of(Source(path="./a.jsonl"), [("a.jsonl", "0" * 64)], None)


# --- links, and the same file twice ---


def test_links_are_followed_and_nothing_is_read_twice(here):
    touch("elsewhere/x.jsonl", "d/a.jsonl", "d/in/b.jsonl", "blob")
    Path("d/out").symlink_to("../elsewhere")
    Path("d/c.jsonl").symlink_to("../blob")  # as the Hub's cache does
    Path("d/latest.jsonl").symlink_to("a.jsonl")
    Path("d/again").symlink_to("in")
    Path("d/loop").symlink_to("../d")
    Path("d/up").symlink_to("..")
    touch("d/.git/c.jsonl", "d/.old.jsonl", "d/._a.jsonl")
    read = names(Source(path="./d"))
    assert read == ["a.jsonl", "c.jsonl", "in/b.jsonl", "out/x.jsonl"]
    said = notes("./d")
    assert "latest.jsonl (the same file as a.jsonl)" in said and ".old.jsonl (hidden)" in said
    assert "c.jsonl (" not in said and "._a.jsonl" not in said
    assert "again/ (the same folder as in/)" in said and "loop/ (the same folder" in said
    assert "up/ (a link to a folder that holds this one)" in said


def test_a_link_to_nothing_is_refused_where_rows_are_missing(here):
    touch("d/a.jsonl")
    Path("d/b.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(UserError, match=r"d/b\.jsonl: is a link to gone\.jsonl"):
        select(Source(path="./d"))
    Path("d/b.jsonl").unlink()
    Path("d/other").symlink_to("gone")
    assert notes("./d") == "not read: other (a link to what is not there)"


def test_a_compressed_copy_is_read_once(here, base):
    touch("d/a.jsonl")
    Path("d/a.jsonl.gz").write_bytes(gzip.compress(TEXT))
    assert names(Source(path="./d")) == ["a.jsonl"]
    assert notes("./d") == "not read: a.jsonl.gz (the same rows as a.jsonl)"
    Path("d/a.jsonl.gz").write_bytes(gzip.compress(TEXT * 2))
    assert names(Source(path="./d")) == ["a.jsonl", "a.jsonl.gz"]
    assert make(base, "./d", template="chatml")[0]["rows"]["kept"] == 9


def test_a_folder_that_cannot_be_listed_is_refused(here, monkeypatch):
    touch("d/a.jsonl", "d/closed/b.jsonl")
    listed = os.listdir

    def closed(path) -> list[str]:  # root may list every folder, so a mode would not do
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "listdir", closed)
    with pytest.raises(UserError, match="d/closed: cannot be read: Permission denied"):
        select(Source(path="./d"))


def test_the_hubs_cache_is_named(here):
    touch("d/blobs/0a1b", "d/refs/main", "d/snapshots/c0ffee/a.jsonl")
    with pytest.raises(UserError, match="of the Hub's cache") as error:
        select(Source(path="./d"))
    assert "d/snapshots/c0ffee" in error.value.hint
    assert names(Source(path="./d/snapshots/c0ffee")) == ["a.jsonl"]


def test_what_a_model_is_made_of_is_no_data(here):
    """Though it is JSON and text."""
    for path in (life.TINY / "model").iterdir():
        touch(f"m/{path.name}")
    touch("m/special_tokens_map.json", "m/merges.txt", "m/model.safetensors.index.json")
    with pytest.raises(UserError, match=r"m: no data files in this folder; there is .*config"):
        select(Source(path="./m"))
    touch("m/rows.jsonl")
    assert names(Source(path="./m")) == ["rows.jsonl"]
    assert "generation_config.json, merges.txt" in notes("./m")


# --- splits by names ---

TRAIN = {
    ("train.jsonl", "test.jsonl"): ["train.jsonl"],
    ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"): [
        "data/train-00000-of-00001.jsonl"
    ],
    ("train/a.jsonl", "test/a.jsonl", "val/a.jsonl"): ["train/a.jsonl"],
    ("a.jsonl", "b.jsonl", "dev.jsonl"): ["a.jsonl", "b.jsonl"],
    ("a.jsonl", "eval/b.jsonl"): ["a.jsonl"],
    ("my_train_v2.jsonl", "my-test.v2.jsonl"): ["my_train_v2.jsonl"],
    ("Training.jsonl", "TEST2.jsonl"): ["Training.jsonl"],
    ("trainSet.jsonl", "TestData.jsonl", "valset.jsonl"): ["trainSet.jsonl"],
    ("rows.jsonl", "held_out.jsonl", "holdout-1.jsonl"): ["rows.jsonl"],
    ("train/train.jsonl", "test/train.jsonl", "train/eval.jsonl"): ["train/train.jsonl"],
    ("train.jsonl", "more.jsonl"): ["more.jsonl", "train.jsonl"],
    ("contest.jsonl", "latest.jsonl", "strain.jsonl", "devices.jsonl", "interval.jsonl"): [
        *("contest.jsonl", "devices.jsonl", "interval.jsonl", "latest.jsonl", "strain.jsonl")
    ],
    ("a-00000-of-00002.jsonl", "b-00001-of-00002.jsonl"): [
        *("a-00000-of-00002.jsonl", "b-00001-of-00002.jsonl")
    ],
    ("train_sft-00000-of-00001.jsonl", "test_sft-00000-of-00001.jsonl"): [
        "train_sft-00000-of-00001.jsonl"
    ],
}


@pytest.mark.parametrize("files", TRAIN)
def test_a_test_split_is_never_trained_on(here, files):
    touch(*(f"d/{name}" for name in files))
    assert names(Source(path="./d")) == TRAIN[files]
    left = [name for name in files if name not in TRAIN[files]]
    said = notes("./d")
    assert all(name in said for name in left) and bool(said) == bool(left)
    assert not left or "data.eval.sources takes them, as {path: ./d, split: " in said
    if all(name.count("/") == files[0].count("/") for name in files):
        depth = "*/*" if "/" in files[0] else "*"
        assert names(Source(path=f"./d/{depth}.jsonl")) == [
            name.removeprefix("data/") for name in TRAIN[files]
        ]


def test_where_no_split_is_to_be_trained_on_or_several_are_it_has_to_be_said(here):
    touch("d/test.jsonl", "d/dev.jsonl")
    with pytest.raises(UserError, match=r"no file to train on: .*dev \(dev\.jsonl\).*test\.jsonl"):
        select(Source(path="./d"))
    assert names(Source(path="./d", split="test")) == ["test.jsonl"]
    assert names(Source(path="./d", split="validation")) == ["dev.jsonl"]
    touch("e/train_a-00000-of-00001.jsonl", "e/train_b-00000-of-00001.jsonl")
    with pytest.raises(UserError, match="holds several splits"):
        select(Source(path="./e"))
    assert len(names(Source(path="./e", split="train_b"))) == 1


def test_files_of_no_split_beside_others_are_not_passed_over(here):
    touch("d/training.jsonl", "d/evaluation.jsonl", "d/setup.jsonl")  # chapters of a book
    with pytest.raises(UserError, match=r"not all files name a split: .*setup\.jsonl") as error:
        select(Source(path="./d"))
    assert "split: train" in error.value.hint
    assert names(Source(path="./d", split="train")) == ["training.jsonl"]
    touch(
        "e/train-00000-of-00001.jsonl", "e/test-00000-of-00001.jsonl", "e/raw-00000-of-00001.jsonl"
    )
    assert names(Source(path="./e")) == ["train-00000-of-00001.jsonl"]
    assert "raw-00000-of-00001.jsonl" in notes("./e")


def test_rows_to_evaluate_on_need_their_split_said(here):
    touch("d/train.jsonl", "d/test.jsonl", "e/test.jsonl", "f/a.jsonl", "f/b.jsonl")
    with pytest.raises(UserError, match="holds several splits") as error:
        select(Rows(path="./d"))
    assert "split: test" in error.value.hint
    with pytest.raises(UserError, match="holds several splits"):
        select(Rows(path="./d/*.jsonl"))
    assert names(Rows(path="./d", split="test")) == ["test.jsonl"]
    assert names(Rows(path="./d", split="train")) == ["train.jsonl"]
    assert names(Rows(path="./e")) == ["test.jsonl"]
    assert names(Rows(path="./f")) == names(Rows(path="./f", split="train"))
    with pytest.raises(UserError, match=r"has no split 'tset'; train \(train\.jsonl\), test"):
        select(Rows(path="./d", split="tset"))
    with pytest.raises(UserError, match="has no split 'test'"):
        select(Rows(path="./f", split="test"))


def test_what_is_named_by_itself_is_taken_as_it_is(here):
    touch("d/train.jsonl", "d/test.jsonl", "d/test-2.jsonl", "d/rows.jsonl")
    assert names(Source(path="./d/test.jsonl")) == ["test.jsonl"]
    assert names(Source(path="./d/test*.jsonl")) == ["test-2.jsonl", "test.jsonl"]
    said = "is of split test by its name, and trained on since the recipe names it"
    assert notes("./d/test.jsonl") == notes("./d/test*.jsonl") == said
    assert not notes("./d/train.jsonl") and not notes("./d/test.jsonl", split="test")
    assert not select(Rows(path="./d/test.jsonl")).notes
    with pytest.raises(UserError, match="is of split train by its name, not test"):
        select(Source(path="./d/train.jsonl", split="test"))
    said = select(Source(path="./d/rows.jsonl", split="test")).notes
    assert said == ["split is of no use: a file is read whole"]


def test_the_note_is_said_and_the_rest_evaluates(here, base):
    touch("d/train.jsonl")
    write(Path("d/test.jsonl"), [{"prompt": "Only here?", "completion": "Yes."}])
    said: list[str] = []
    own = {"sources": [{"path": "./d", "split": "test"}]}
    record = make(base, "./d", template="chatml", eval=own, said=said)[0]
    assert (record["rows"]["train"], record["rows"]["eval"]) == (3, 1)
    assert any("trains on train.jsonl; not read, as of other splits: test.jsonl" in s for s in said)


# --- cards ---


def card(text: str, folder: str = "d") -> None:
    Path(folder, "README.md").write_text(f"---\n{text}\n---\n# A data set\n")


CARDS = {
    "a list": "configs:\n- config_name: default\n  data_files:\n"
    "  - {split: train, path: b.jsonl}\n  - {split: test, path: a.jsonl}",
    "lists of paths": "configs:\n- config_name: x\n  data_files:\n"
    "  - split: train\n    path: [./b.jsonl]\n  - split: test\n    path: ['a*.jsonl', 'sub/**']",
    "a mapping": "configs:\n- config_name: x\n  data_files: {train: 'b*', test: [a.jsonl]}",
    "train alone": "configs:\n- config_name: x\n  data_files: b.jsonl",
    "overlapping": "configs:\n- config_name: x\n  data_files: {train: '*.jsonl', test: a.jsonl}",
    "the default of two": "configs:\n- config_name: x\n  data_files: a.jsonl\n"
    "- config_name: y\n  default: true\n  data_files: b.jsonl",
}


@pytest.mark.parametrize("kind", CARDS)
def test_a_card_says_what_is_of_which_split(here, kind):
    touch("d/a.jsonl", "d/b.jsonl", "d/sub/c.jsonl")
    card(CARDS[kind])
    assert names(Source(path="./d")) == ["b.jsonl"]
    said = notes("./d")
    assert "a.jsonl" in said and "sub/c.jsonl" in said
    if kind == "a list":
        assert names(Rows(path="./d", split="test")) == ["a.jsonl"]
        assert names(Source(path="./d/*.jsonl")) == ["b.jsonl"]


def test_subsets_of_a_card(here):
    touch("d/en/train.jsonl", "d/en/test.jsonl", "d/de/train.jsonl", "d/de/test.jsonl")
    card("configs:\n- config_name: en\n  data_dir: en\n- config_name: de\n  data_dir: de")
    with pytest.raises(UserError, match=r"names the subsets en, de") as error:
        select(Source(path="./d"))
    assert "subset: en" in error.value.hint
    assert names(Source(path="./d", subset="de")) == ["de/train.jsonl"]
    with pytest.raises(UserError, match="has no subset 'fr'"):
        select(Source(path="./d", subset="fr"))
    Path("d/README.md").unlink()
    with pytest.raises(UserError, match="has no subset 'de'"):
        select(Source(path="./d", subset="de"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("configs:\n- config_name: x\n  data_files: {train: gone-*.jsonl}", "'gone-\\*.jsonl'"),
        ("configs:\n- config_name: x\n  data_files: {train: 'https://x/y.jsonl'}", "https://x"),
        ("configs:\n- config_name: x\n  data_files: {en: a.jsonl, de: b.jsonl}", "several splits"),
        ("configs:\n- config_name: x\n  data_files: {test: a.jsonl}", "no file to train on"),
        ("configs: [data_files, 3", "cannot be read"),
        ("configs:\n- config_name: x\n  data_files: [{path: a.jsonl}]", "cannot be read"),
        ("configs:\n- config_name: x\n  data_files: '[z-a].jsonl'", "cannot be read"),
    ],
)
def test_a_card_that_is_of_no_help_is_refused(here, text, said):
    touch("d/a.jsonl", "d/b.jsonl")
    card(text)
    with pytest.raises(UserError, match=said):
        select(Source(path="./d"))


def test_the_card_of_the_folder_above_is_heeded(here):
    touch("d/data/a.jsonl", "d/data/b.jsonl")
    card("configs:\n- config_name: x\n  data_files: {train: data/b.jsonl, test: 'data/a*'}")
    assert names(Source(path="./d/data")) == names(Source(path="./d/data/*")) == ["b.jsonl"]
    assert names(Source(path="./d/data/a.jsonl")) == ["a.jsonl"]


def test_a_card_without_files_says_nothing(here):
    touch("d/a.jsonl")
    for text in ("configs:\n- config_name: default", "note: see data_files", "# data_files\nx: 1"):
        card(f"license: mit\n{text}")
        assert names(Source(path="./d")) == ["a.jsonl"]
    Path("d/README.md").write_bytes(b"---\nno: end \xff")
    assert names(Source(path="./d")) == ["a.jsonl"]


# --- data sets that datasets saved ---


def saved(folder: Path, rows: list[dict], split: str | None = None, **state) -> None:
    """As `Dataset.save_to_disk` writes it; see `test_what_datasets_saves_is_read`."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    name = "data-00000-of-00001.arrow"
    with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    files = [{"filename": name}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": split, **state}))
    (folder / "dataset_info.json").write_text("{}")


def test_what_datasets_saves_is_read(here, base):
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    datasets.disable_progress_bars()
    try:
        rows.save_to_disk("one")
        datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk("two")
    finally:
        datasets.enable_progress_bars()
    touch("d.jsonl")
    expected = make(base, "d.jsonl", template="chatml")[0]["content_digest"]
    for path in ("./one", "./two", "./two/train"):
        assert make(base, path, template="chatml")[0]["content_digest"] == expected
    assert "test/data-00000-of-00001.arrow" in notes("./two")
    assert names(Rows(path="./two", split="test")) == ["test/data-00000-of-00001.arrow"]
    with pytest.raises(UserError, match="holds several splits"):
        select(Rows(path="./two"))


def test_records_of_a_saved_data_set_are_heeded(here):
    saved(Path("d"), ROWS)
    Path("d/cache-0123456789abcdef.arrow").write_bytes(b"?")
    assert names(Source(path="./d")) == ["data-00000-of-00001.arrow"]
    assert "cache-0123456789abcdef.arrow (not of the data set" in notes("./d")
    assert names(Source(path="./d", split="train")) == ["data-00000-of-00001.arrow"]

    saved(Path("t"), ROWS, split="test")
    with pytest.raises(UserError, match=r"no file to train on: test \(data-00000"):
        select(Source(path="./t"))
    assert len(names(Source(path="./t", split="test"))) == 1

    saved(Path("i"), ROWS, _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(UserError, match="chosen by indices") as error:
        select(Source(path="./i"))
    assert "flatten_indices" in error.value.hint

    Path("s").mkdir()
    Path("s/state.json").write_text(json.dumps(ROWS))  # of a country
    assert names(Source(path="./s")) == ["state.json"]

    Path("d/data-00000-of-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow: is not there"):
        select(Source(path="./d"))
    Path("d/state.json").write_text("{")
    with pytest.raises(UserError, match=r"d/state\.json: cannot be read"):
        select(Source(path="./d"))


def test_saved_data_sets_side_by_side_are_told_by_their_folders(here):
    saved(Path("d/train"), ROWS)
    saved(Path("d/test"), ROWS)
    assert names(Source(path="./d")) == ["train/data-00000-of-00001.arrow"]
    Path("e").mkdir()
    Path("e/dataset_dict.json").write_text('{"splits": ["gold", "silver"]}')
    saved(Path("e/gold"), ROWS)
    with pytest.raises(UserError, match=r"e/silver: is not there"):
        select(Source(path="./e"))
    saved(Path("e/silver"), ROWS)
    with pytest.raises(UserError, match="holds several splits"):
        select(Source(path="./e"))
    assert names(Source(path="./e", split="gold")) == ["gold/data-00000-of-00001.arrow"]


@pytest.fixture
def deep(here):
    """A file below more folders than Python may call functions."""
    for _ in range(1_500):
        os.mkdir("d")
        os.chdir("d")
    touch("rows.jsonl")
    os.chdir(here)
    yield here
    subprocess.run(["rm", "-rf", "d"], cwd=here, check=True)


@pytest.mark.parametrize("path", ["d", "**/*.jsonl"])
def test_folders_that_lie_too_deep_are_refused(deep, path):
    with pytest.raises(UserError, match="folders lie too deep in one another"):
        select(Source(path=f"./{path}"))


def test_a_table_has_what_lies_deep(deep):
    before = stamp(deep)
    assert [Path(name).name for name in table(deep)] == ["rows.jsonl"]
    Path("d/d/d/more.jsonl").touch()
    assert len(table(deep)) == 2 and stamp(deep) != before
