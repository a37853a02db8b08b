"""benchmarks/gpu.py, which measures one card: what it computes of what it sees, and a walk through
it on a CPU."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmpipe.models.flops import flops_per_token

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def measuring():
    """The script and the modules beside it, as it imports them."""
    sys.path.insert(0, str(SCRIPT.parent))
    names = "assets bench commands parts reads shapes table whole".split()
    yield SimpleNamespace(
        gpu=import_module("gpu"), **{name: import_module(f"onecard.{name}") for name in names}
    )
    sys.path.remove(str(SCRIPT.parent))


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


def test_the_plan_needs_neither_a_card_nor_torch(tmp_path, measuring):
    (tmp_path / "torch.py").write_text("raise RuntimeError('a plan is made without torch')")
    done = run("--plan", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.split("\n\n")[0].splitlines()]
    assert listed == [part.name for part in measuring.gpu.PARTS]
    assert listed[:3] == ["sft", "pretrain", "ppo"]  # a run that is cut has the most important


def test_the_tests_that_a_card_runs_are_there(measuring):
    assert [name for name in measuring.whole.TESTS if not (ROOT / name).is_file()] == []


def test_a_part_that_is_not_there_is_named():
    done = run("sftt")
    assert done.returncode == 2 and "no part sftt" in done.stderr


@pytest.mark.parametrize("scale, name", [("FULL", "large"), ("FULL", "small"), ("TINY", "large")])
def test_a_shape_counts_weights_and_operations_as_its_model_does(measuring, scale, name):
    shape = getattr(measuring.shapes, scale).shapes[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape.config()))
    assert shape.weights == model.num_parameters()
    assert shape.flops_per_token(2_048) == flops_per_token(model, 2_048)


def test_speed_is_that_of_the_steps_that_count(measuring):
    """A first step that compiles is left out, and a long step weighs as long as it took."""
    ends, rates = [60.0, 62.0, 63.0, 66.0], [10.0, 100.0, 400.0, 50.0]
    lines = [
        {"seconds": end, "tokens_per_second": rate, "memory_gb": 1.5, "share_of_peak": rate / 1e3}
        for end, rate in zip(ends, rates, strict=True)
    ]
    seen = measuring.commands.Seen(lines, first_step=75.0)
    assert seen.tokens_per_second(warm_up=2) == pytest.approx((400 + 3 * 50) / 4)
    assert seen.steps_per_second(warm_up=2) == pytest.approx(2 / 4)
    assert seen.share_of_peak(warm_up=2) == pytest.approx((400 + 3 * 50) / 4 / 1e3)
    assert seen.gib == 1.5


def test_the_peers_speed_leaves_its_first_steps_out(measuring, monkeypatch, tmp_path):
    told = {}

    def script(name, values, *first):
        told.update(values)
        return {"ends": [30.0, 31.0, 33.0, 35.0], "counted": [8, 16, 24, 36], "gib": 2.0}

    monkeypatch.setattr(measuring.commands, "script", script)
    bench = measuring.bench.Bench(tmp_path, measuring.shapes.TINY, None, False, None)
    seen = bench.peer("sft", "model", "rows", batch=8)
    assert (seen["speed"], seen["steps_per_second"]) == (5.0, 0.5)
    assert told["batch"] == 8 and told["steps"] == 4


def test_a_row_says_what_it_knows(measuring):
    Row = measuring.table.Row
    row = Row("sft", "tok/s", own=43_012.4, mfu=0.4712, gib=27.21)
    assert row.ratio is None and "x" not in str(row) and "peer" not in row.record()
    beside = replace(row, peer=14_250.0, peer_gib=57.4)
    assert str(beside).split() == "sft tok/s 43,012 14,250 x 3.02 47.1 % 27.2 57.4".split()
    assert beside.record()["ratio"] == pytest.approx(3.0184, abs=1e-4)
    assert "FAILED: out of memory" in str(Row("dpo", note="out of memory", failed=True))


def test_a_part_that_fails_costs_no_other_its_turn(measuring, capsys):
    def breaks(bench):
        yield measuring.table.Row("breaks", own=1.0)
        raise error

    part = measuring.parts.Part("breaks", "nothing", 1, breaks)
    for error in (measuring.commands.Failed("no memory"), KeyError("seconds")):
        known, failed = measuring.gpu.measure(part, None)
        assert known.own == 1.0 and failed.failed and str(error) in failed.note
    assert "KeyError" in capsys.readouterr().err  # a bug is shown whole


def test_a_record_is_whole_after_each_row_and_adds_to_its_like(measuring, tmp_path):
    Record, Row = measuring.gpu.Record, measuring.table.Row
    path = tmp_path / "card.json"
    here = {"commit": "1234", "card": "H100", "versions": {"torch": "2.11"}}
    first = Record(path, here)
    for name in ("sft", "ppo"):
        first.add(Row(name, own=1.0))
        assert name in json.loads(path.read_text())["rows"]
    again = Record(path, here)
    again.add(Row("sft", own=2.0))
    rows = json.loads(path.read_text())["rows"]
    assert (rows["sft"]["own"], rows["ppo"]["own"]) == (2.0, 1.0)
    for other in ({"commit": "5678"}, {"card": "L4"}, {"commit": None}):
        Record(path, here).add(Row("sft", own=1.0))
        Record(path, here | other).add(Row("dpo", own=1.0))
        assert list(json.loads(path.read_text())["rows"]) == ["dpo"], other


def test_waits_for_the_card_are_counted_between_lines(measuring, monkeypatch, tmp_path):
    """With a double of a card: every `item` is a wait, said as torch says it."""
    item = torch.Tensor.item

    def waiting(tensor):
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=2)
        return item(tensor)

    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(os, "_exit", sys.exit)
    out = tmp_path / "reads.json"
    with warnings.catch_warnings(), pytest.raises(SystemExit):
        warnings.simplefilter("ignore")
        monkeypatch.setattr(torch.Tensor, "item", waiting)
        reads = measuring.reads.Reads(lines=3, out=out)
        for waits in (5, 2, 0, 1):
            for _ in range(waits):
                torch.ones(()).item()
            reads.line()
    told = json.loads(out.read_text())
    assert modes == ["warn"] and told["reads"] == [2, 0, 1]  # from the first line on
    assert list(told["places"].values()) == [3]
    assert "tests/test_benchmarks.py" in next(iter(told["places"]))


def test_rows_are_as_long_as_rows_are(measuring, tmp_path):
    """Lognormal with the mean that was asked for, cut at both ends; and each time the same."""
    measuring.assets.write_rows(tmp_path, 400, 50)
    texts = {name: (tmp_path / f"{name}.jsonl").read_text() for name in ("rows", "pairs", "texts")}
    rows = [json.loads(line)["messages"] for line in texts["rows"].splitlines()]
    lengths = [sum(len(turn["content"].split()) for turn in row) for row in rows]
    assert 45 < sum(lengths) / len(lengths) < 55
    assert min(lengths) < 25 and max(lengths) > 150 and max(lengths) <= 300
    assert len(set(texts["rows"].splitlines())) == 400
    measuring.assets.write_rows(tmp_path, 400, 50)
    assert (tmp_path / "rows.jsonl").read_text() == texts["rows"]
    tokenizer = measuring.assets.tokenizer(tmp_path, 12_000)
    assert len(tokenizer) == 12_000
    ids = tokenizer.apply_chat_template(rows[0], return_dict=False)
    assert len(ids) < 1.5 * lengths[0] + 16
    assert tokenizer.decode(ids).startswith("<|im_start|>user\n" + rows[0][0]["content"])


def test_published_bytes_are_compared(measuring, tmp_path):
    for name in ("one", "other", "empty"):
        (tmp_path / name / "model").mkdir(parents=True)
    for name in ("one", "other"):
        (tmp_path / name / "model" / "weights").write_bytes(b"1234")
    one, other = tmp_path / "one", tmp_path / "other"
    assert measuring.whole.equal(one, other)
    assert not measuring.whole.equal(one, tmp_path / "empty")
    assert not measuring.whole.equal(tmp_path / "empty", tmp_path / "empty")
    (other / "model" / "weights").write_bytes(b"1235")
    assert not measuring.whole.equal(one, other)


@pytest.mark.faults
def test_without_a_card_nothing_is_measured_unless_in_tiny(tmp_path):
    done = run("sft", "--json", str(tmp_path / "card.json"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "--tiny" in done.stdout, done.stderr
    assert not (tmp_path / "card.json").exists()


@pytest.mark.faults
def test_a_walk_through_the_parts(tmp_path):
    """In tiny, on a CPU: llmpipe's commands and bare TRL, whole stages, resume to the byte."""
    path = tmp_path / "card.json"
    parts = ["sft", "ppo", "stages", "checkpoints"]
    told = ("--tiny", "--json", str(path), "--home", str(tmp_path / "home"), "--limit", "3000")
    done = run(*parts, *told, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(path.read_text())
    rows = record["rows"]
    assert record["card"] == "cpu" and record["versions"]["torch"]
    assert all(rows[name]["own"] > 0 and rows[name]["ratio"] > 0 for name in ("sft", "start"))
    assert rows["ppo"]["own"] > 0 and rows["ppo: draw"]["own"] > 0
    assert (rows["stages"]["own"], rows["resume"]["own"]) == (5, 2)
    assert rows["saved beside"]["own"] > 0 and rows["saved at once"]["own"] > 0
    for name, row in rows.items():
        assert f"\n{name} " in done.stdout.split("\n\n")[1], row
