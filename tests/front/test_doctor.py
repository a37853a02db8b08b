"""`llmpipe doctor`: what is known is said at once, and a PyTorch that hangs hangs nobody."""

import sys

import pytest

from llmpipe.front import doctor
from llmpipe.models import probe

SAYS = "print('PyTorch\\t9.9', flush=True); print('auto\\toptim.precision: fp32', flush=True)"


@pytest.fixture
def pytorch(monkeypatch):
    """Let a line of Python stand for the process that imports PyTorch."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lambda code: monkeypatch.setattr(doctor, "PROBE", [sys.executable, "-c", code])


def test_every_part_is_said_in_80_columns(llmpipe, pytorch, monkeypatch):
    pytorch(SAYS)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, out, err = llmpipe("doctor")
    assert code == 0, out + err
    titles = "llmpipe processor memory GPU libraries optional disk Hub PyTorch auto".split()
    assert [line.split()[0] for line in out.splitlines() if line[0] != " "] == titles
    assert max(map(len, out.splitlines())) < 80
    assert "a token is there (HF_TOKEN)" in out and "hf_secret" not in out + err


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (f"{SAYS}; import time; time.sleep(60)", "WRONG said no more within 0.5 s"),
        (f"{SAYS}; raise OSError('libcudart is missing')", "OSError: libcudart is missing"),
        ("print('!CUDA\\tPyTorch can use none', flush=True)", "WRONG PyTorch can use none"),
    ],
)
def test_a_broken_pytorch_is_said_and_ends_with_5(llmpipe, pytorch, monkeypatch, code, said):
    pytorch(code)
    monkeypatch.setattr(doctor, "LIMIT", 0.5 if "sleep" in code else 60)
    status, out, err = llmpipe("doctor")
    assert status == 5 and said in " ".join(out.split()) and "1 of these things is wrong" in err


def test_a_version_that_was_not_tried_is_named_with_the_command(llmpipe, pytorch, monkeypatch):
    pytorch(SAYS)
    needed = [("trl", "<1.17,>=1.16"), ("gone", ">=1")]
    monkeypatch.setattr(doctor, "_requirements", lambda: iter(needed))
    monkeypatch.setattr(doctor, "installed", {"trl": "1.17.0rc1"}.get)
    code, out, _ = llmpipe("doctor")
    assert code == 5
    out = " ".join(out.split())
    assert "WRONG trl 1.17.0rc1 is not <1.17,>=1.16: pip install 'trl<1.17,>=1.16'" in out
    assert "WRONG gone is missing: pip install 'gone>=1'" in out


@pytest.mark.parametrize(
    ("version", "within"),
    [("1.16", True), ("1.16.3+cpu", True), ("1.15.9", False), ("1.17", False), ("2", False)],
)
def test_bounds(version, within):
    assert doctor._lies_in(version, "<1.17,>=1.16") is within


def test_what_pytorch_says_here(capsys):
    probe.main()
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    said = {title: [text for other, text in lines if other == title] for title, _ in lines}
    assert set(said) == {"PyTorch", "CUDA", "kernels", "auto"}
    assert said["kernels"] == [
        "attention of packed rows on cpu, float32: forward and backward are right"
    ]
    assert "launch.processes: 1 (no GPU)" in said["auto"] and len(said["auto"]) == 7
