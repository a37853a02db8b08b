"""benchmarks/sharding.py, at the size of a test: no process ever holds a whole model."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import life

SMALL = ["--width", "512", "--layers", "16", "--vocabulary", "2000"]


@pytest.mark.faults
def test_two_processes_hold_one_model_while_they_load_and_publish_it(tmp_path):
    """Of 46 million weights a layer is a seventeenth; larger models have less beside themselves."""
    script = life.ROOT / "benchmarks" / "sharding.py"
    options = [*SMALL, "--file-bytes", "45000000", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(script), *options],
        env=os.environ | {"PYTHONPATH": str(life.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = [line.split() for line in done.stdout.splitlines() if " models, " in line]
    models = {words[0]: float(words[1]) for words in told}
    assert 1 < models["load:"] < 1.15, done.stdout
    assert 1 < models["publish:"] < 1.5, done.stdout
