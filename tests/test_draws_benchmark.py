"""benchmarks/draw.py runs, on every side there is."""

import runpy
import sys

import pytest

from llmpipe.models.drawing import replay
from tests import life


@pytest.mark.parametrize("devices", [{"cuda"}, {"cuda", "cpu"}])
@pytest.mark.parametrize("how", ["--top-p 0.9", "--greedy"])
def test_answers_are_drawn_beside_generate(monkeypatch, capsys, devices, how):
    monkeypatch.setattr(replay, "DEVICES", devices)
    arguments = f"--tokens 3 --answers 5 --pairs 1 --lora {how}"
    monkeypatch.setattr(
        sys, "argv", ["draw.py", "--model", str(life.TINY / "model"), *arguments.split()]
    )
    runpy.run_path(str(life.TINY.parents[1] / "benchmarks" / "draw.py"), run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    sides = [line.split()[0] for line in said if "ms a token step" in line]
    expected = ["generate", "replayed", "draw"] if "cpu" in devices else ["generate", "draw"]
    assert sides[: len(expected)] == expected
    same = sum("5 of 5 answers are those of generate" in line for line in said)
    assert same == (len(expected) if how == "--greedy" else 0)
