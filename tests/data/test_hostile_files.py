"""Files of rows that would take memory without end, lead out of themselves, or are no files."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import resource
import struct
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from llmpipe.data import readers
from llmpipe.data.fields import Rejected
from llmpipe.data.readers import File, parse, read
from llmpipe.data.readers.row import MAX_LINE
from llmpipe.errors import UserError
from tests import life

from .conftest import make, talk
from .test_malformed import rejected

GOOD = json.dumps({"text": "Hello"}).encode()


def rows_of(path: Path) -> list:
    """Every row, or why it is none."""
    file = File(path.name, str(path), path, path.stat().st_size, "")
    rows = []
    for row, _ in read(file):
        try:
            rows.append(parse(row.payload))
        except Rejected as error:
            rows.append(error.reason)
    return rows


def bomb(name: str, pack) -> Path:
    """A file of a few kB that holds one line of 200 MB among others."""
    with pack(name, "wb") as stream:
        stream.write(GOOD + b"\n")
        for _ in range(200):
            stream.write(b"x" * (1 << 20))
        stream.write(b"\n" + GOOD + b"\n")
    return Path(name)


@pytest.mark.faults
@pytest.mark.parametrize("pack", [gzip.open, bz2.open, lzma.open])
@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("jsonl", [{"text": "Hello"}, "line too long", {"text": "Hello"}]),
        ("txt", [{"text": GOOD.decode()}, "line too long", {"text": GOOD.decode()}]),
    ],
)
def test_a_line_without_end_costs_itself_alone(here, kind, rows, pack):
    path = bomb(f"d.{kind}.{pack.__module__.replace('lzma', 'xz').replace('gzip', 'gz')}", pack)
    assert path.stat().st_size < 1 << 20
    assert rows_of(path) == rows


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["csv", "tsv", "json"])
def test_a_table_of_one_line_without_end_is_none(here, kind):
    path = bomb(f"d.{kind}.gz", gzip.open)
    if kind == "json":
        with gzip.open(path, "wb") as stream:
            stream.write(b'[{"text": "')
            for _ in range(200):
                stream.write(b"x" * (1 << 20))
    with pytest.raises(UserError, match=r"a line of more than 64 MB|not valid JSON"):
        rows_of(path)


def test_lines_of_a_text(monkeypatch):
    monkeypatch.setattr(readers.row, "MAX_LINE", 8)
    text = io.StringIO("1234567\n" + "x" * 8 + "\n" + "x" * 90 + "\n\n12", newline="")
    assert list(readers.row.lines_of(text)) == ["1234567\n", None, None, "\n", "12"]
    assert list(readers.row.lines_of(io.StringIO("x" * 90))) == [None]


@pytest.mark.faults
def test_memory_is_bounded_by_a_line(tmp_path):
    """Of 640 MB in one line no more is held at once than a line may have."""
    with gzip.open(tmp_path / "d.txt.gz", "wb", compresslevel=1) as stream:
        for _ in range(160):
            stream.write(b"x" * (1 << 22))
    process = life.forked(_read_in_little, str(tmp_path / "d.txt.gz"))
    process.join(60)
    assert process.exitcode == 0


def _read_in_little(path: str) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 6 * MAX_LINE, size + 6 * MAX_LINE))
    assert rows_of(Path(path)) == ["line too long"]


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.parquet", "d.arrow", "d.txt.gz"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "linked device", "broken link"])
def test_what_is_no_file_is_not_read(here, base, kind, name):
    if kind == "pipe":
        os.mkfifo(name)
    elif kind == "folder":
        Path(name).mkdir()
    elif kind == "linked device":
        Path(name).symlink_to("/dev/zero")
    elif kind == "broken link":
        Path(name).symlink_to("nowhere")
    path = "/dev/zero" if kind == "device" else f"./{name}"
    with pytest.raises(UserError) as refused:
        make(base, path, template="chatml")
    assert refused.value.code == 2 and Path(path).name in str(refused.value)


def test_a_name_that_is_no_text_is_refused(here, base):
    Path("rows").mkdir()
    Path("rows/d\udcff.jsonl").write_bytes(GOOD + b"\n")
    Path("rows/e.jsonl").write_bytes(GOOD + b"\n")
    with pytest.raises(UserError, match=r"d\\udcff\.jsonl': its name is not UTF-8 text") as refused:
        make(base, "./rows")
    assert refused.value.code == 2


def wide(columns: int) -> list[str]:
    return [f"column {i}" for i in range(columns)]


@pytest.mark.parametrize("kind", ["csv", *map(life.by_the_dozen, ("tsv", "jsonl", "parquet"))])
def test_100_000_columns_are_named_in_a_line(here, base, kind):
    names = wide(20_000 if kind == "parquet" else 100_000)
    path = Path(f"d.{kind}")
    if kind == "parquet":
        pa.parquet.write_table(pa.table({name: ["x"] for name in names}), path)
    elif kind == "jsonl":
        path.write_text(json.dumps(dict.fromkeys(names, "x")))
    else:
        comma = "," if kind == "csv" else "\t"
        path.write_text(f"{comma.join(names)}\n{comma.join('x' for _ in names)}\n")
    begun = time.process_time()
    with pytest.raises(UserError, match="no format fits") as refused:
        make(base, f"./{path}")
    assert time.process_time() - begun < 10 and len(str(refused.value)) < 3000
    assert f"and {len(names) - 40:,} more" in str(refused.value)


def test_two_of_100_000_columns_are_called_alike(here, base):
    Path("d.csv").write_text(",".join([*wide(100_000), "column 7"]) + "\n" + "x," * 100_000 + "x\n")
    with pytest.raises(UserError, match="'column 7', number 8 and 100001"):
        make(base, "./d.csv")


# --- tables ---------------------------------------------------------------------------------------


def broken_texts(*texts: bytes) -> pa.Array:
    values = pa.array(texts, pa.binary())
    return pa.StringArray.from_buffers(len(texts), *values.buffers()[1:])


def save(table: pa.Table, name: str) -> Path:
    path = Path(name)
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
        return path
    kind = pa.ipc.new_stream if path.stem == "stream" else pa.ipc.new_file
    with pa.OSFile(name, "wb") as sink, kind(sink, table.schema) as writer:
        writer.write_table(table)
    return path


TABLES = ["d.parquet", "d.arrow", "stream.arrow", "d.feather"]


def test_a_length_that_no_such_file_can_hold_is_no_want_of_memory(here, base):
    """Arrow allocates what a compressed column says that it will be."""
    text = "Well, it is so. " * 1000
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile("d.arrow", "wb") as sink:
        table = pa.table({"text": [text]})
        with pa.ipc.new_file(sink, table.schema, options=options) as writer:
            writer.write_table(table)
    data = Path("d.arrow").read_bytes()
    at = data.rindex(len(text).to_bytes(8, "little"))  # behind where the text begins and ends
    Path("d.arrow").write_bytes(data[:at] + (1 << 50).to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(
        UserError, match=r"d\.arrow:1: cannot be read as Arrow: a length of 1,12"
    ) as it:
        make(base, "./d.arrow")
    assert it.value.code == 2


@pytest.mark.parametrize("name", TABLES)
def test_a_text_that_is_not_utf_8_costs_its_row_alone(here, base, name):
    texts = broken_texts(b"Hello", b"sch\xf6n", b"there")
    save(pa.table({"text": texts}), name)
    record, train, _ = make(base, f"./{name}", packing=False)
    assert (record["rows"]["kept"], rejected()) == (2, [(2, "not UTF-8")]) and len(train) == 2


@pytest.mark.parametrize("name", TABLES)
def test_a_text_within_lists_that_is_not_utf_8_costs_its_row_alone(here, smol, name):
    turns = talk("Hello", "Hi")["messages"]
    good = pa.array([turns] * 3)
    contents = broken_texts(b"Hello", b"Hi", b"Hello", b"sch\xf6n", b"Hello", b"Hi")
    structs = pa.StructArray.from_arrays(
        [contents, good.flatten().field("role")], ["content", "role"]
    )
    save(pa.table({"messages": pa.ListArray.from_arrays([0, 2, 4, 6], structs)}), name)
    record, *_ = make(smol, f"./{name}")
    assert (record["rows"]["kept"], rejected()) == (2, [(2, "not UTF-8")])


@pytest.mark.parametrize("name", TABLES[1:])
@pytest.mark.parametrize("also", [[b"Hello", b"there"], [b"sch\xf6n", b"there"]])
def test_a_table_that_leads_out_of_itself_is_not_followed(here, base, name, also):
    """The second text ends far behind the file's last byte."""
    path = save(pa.table({"other": broken_texts(*also), "text": ["xyz", "xyzxyzx"]}), name)
    data = path.read_bytes()
    ends = struct.pack("<3i", 0, 3, 10)
    assert data.count(ends) == 1
    path.write_bytes(data.replace(ends, struct.pack("<3i", 0, 3, 1 << 30)))
    with pytest.raises(UserError, match="cannot be read as Arrow") as refused:
        make(base, f"./{name}")
    assert refused.value.code == 2


@pytest.mark.parametrize("name", TABLES[1:])
def test_an_entry_that_a_dictionary_does_not_have(here, base, name):
    words = pa.array(["Hello"])
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 7], pa.int32()), words, safe=False)
    save(pa.table({"text": texts}), name)
    with pytest.raises(UserError, match="cannot be read as Arrow"):
        make(base, f"./{name}")


@pytest.mark.parametrize("name", TABLES)
def test_a_value_that_python_has_not_costs_its_row_alone(here, base, name):
    days = pa.array([0, 2**31 - 1], pa.int32()).cast(pa.date32())
    save(pa.table({"text": ["Hello", "there"], "day": days}), name)
    record, *_ = make(base, f"./{name}")
    assert (record["rows"]["kept"], rejected()) == (1, [(2, "unreadable value")])


@pytest.mark.parametrize("kept", [4, 40, 200, 400, -9, -1])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_is_cut_off(here, base, name, kept):
    path = save(pa.table({"text": ["Hello there"] * 50}), name)
    path.write_bytes(path.read_bytes()[:kept])
    if name == "stream.arrow" and kept == -1:
        return  # the mark behind the last batch, which some writers leave out
    with pytest.raises(UserError) as refused:
        make(base, f"./{name}")
    assert refused.value.code == 2 and f"./{name}" in str(refused.value)


@pytest.mark.parametrize("codec", ["gz", "bz2", "xz", "zst", "lz4"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_a_compressed_file_that_is_cut_off(here, base, kind, codec):
    rows = [{"text": os.urandom(40).hex()} for _ in range(2000)]
    plain = "\n".join(map(json.dumps, rows))
    if kind == "json":
        plain = json.dumps(rows)
    elif kind == "csv":
        plain = "\n".join(["text", *(row["text"] for row in rows)])
    out = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    if codec in out:
        data = out[codec](plain.encode())
    else:
        stream = io.BytesIO()
        with pa.CompressedOutputStream(stream, {"zst": "zstd"}.get(codec, codec)) as packed:
            packed.write(plain.encode())
            packed.flush()
            data = stream.getvalue()
    Path(f"d.{kind}.{codec}").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cannot be read|cut off") as refused:
        make(base, f"./d.{kind}.{codec}")
    assert refused.value.code == 2


# --- values ---------------------------------------------------------------------------------------

DEEP = "[" * 900 + "]" * 900
VALUES = {
    "9" * 5000: "bad JSON",
    "1e999": None,  # a number nobody reads
    "[" * 5000 + "]" * 5000: "bad JSON",
    '{"a":' * 5000 + "1" + "}" * 5000: "bad JSON",
    '"\\ud800"': None,
    '"a\\u0000b"': None,
}


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:9])
def test_a_value_without_end(here, base, kind, value):
    lines = ['{"text": "Hello"}', f'{{"text": "there", "other": {value}}}', '{"text": "Hello"}']
    Path(f"d.{kind}").write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]")
    reason = VALUES[value]
    if kind == "json" and reason:
        with pytest.raises(UserError, match=r"d\.json:2: row 2 \(line 1\) is not valid JSON"):
            make(base, f"./d.{kind}")
        return
    make(base, f"./d.{kind}")
    assert rejected() == ([(2, reason)] if reason else [])


@pytest.mark.parametrize("answer", ["9" * 5000, "\u00b2", "\u0662", "-1", "1.0", "", "0" * 400])
def test_an_answer_that_is_no_choice(answer):
    from llmpipe.data.formats.choice import FORMAT

    values = {"prompt": "a or b?", "choices": ["a", "b"], "answer": answer}
    with pytest.raises(Rejected):
        FORMAT.example_of(values)
