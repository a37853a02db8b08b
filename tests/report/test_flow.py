"""Rows in and out: no row is lost between two columns, and bars are as high as rows are many."""

from __future__ import annotations

import re
from itertools import pairwise

from llmpipe.report.flow import HEIGHT, flows
from llmpipe.report.parts import Run, parts_of
from tests.report.written import add_sft


def test_the_rows_of_a_run(tmp_path):
    add_sft(tmp_path / "run")
    (flow,) = flows(Run("run", "", parts_of(tmp_path / "run")))
    assert [[(n.title, n.rows, n.is_lost) for n in nodes] for nodes in flow.columns] == [
        [("./rows.jsonl", 72, False)],
        [("kept", 70, False), ("rejected", 2, True)],
        [("to train on", 63, False), ("held out", 7, False)],
    ]
    assert flow.columns[1][1].detail == "2 empty"
    assert flow.columns[2][0].detail == "2,000 tokens, 25 % learned"
    assert flow.said == ("rows: 72 ./rows.jsonl → 70 kept, 2 rejected → 63 to train on, 7 held out")
    assert flow.rejected_title == "20 of 25 rejected rows" and len(flow.rejected) == 20
    assert {fact.name for fact in flow.facts} == {
        "tokens of a row",
        "sequences",
        "cut to the longest length",
        "equal to another row",
    }


def test_bars_are_in_the_scale_of_what_was_read_and_bands_join_them(tmp_path):
    add_sft(tmp_path / "run")
    (flow,) = flows(Run("run", "", parts_of(tmp_path / "run")))
    read, kept, used = flow.columns
    assert read[0].height == HEIGHT
    assert abs(kept[0].height - HEIGHT * 70 / 72) < 0.1
    for nodes in flow.columns:  # texts do not touch
        tops = [node.top for node in nodes]
        assert all(b - a >= 60 for a, b in pairwise(tops))
        assert all(node.top + node.height <= flow.height for node in nodes)
    path = flow.bands[1][0].path
    numbers = [float(value) for value in re.findall(r"[\d.]+", path)]
    assert numbers[1] == kept[0].top  # begins where the bar does
    assert abs(used[0].top + used[0].height - numbers[8]) < 0.2  # and ends where the other ends
    assert [band.is_lost for band in flow.bands[0]] == [False, True]


def test_stages_that_took_the_same_rows_share_a_flow(tmp_path):
    add_sft(tmp_path / "run")
    (tmp_path / "run" / "sft").rename(tmp_path / "run" / "one")
    add_sft(tmp_path / "run")
    (flow,) = flows(Run("run", "", parts_of(tmp_path / "run")))
    assert flow.name == "one and sft"
