"""Lines of a training fit a terminal, and what goes on in between is not kept."""

import pytest

from llmpipe.run.progress import Progress, fitting

LINE = {
    "step": 11_900,
    "loss": 2.34567,
    "learning_rate": 1.9e-5,
    "grad_norm": 12.345,
    "tokens_per_second": 45_300.2,
    "memory_gb": 45.43,
    "seconds": 1.0,
}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "loss 2.3457  lr 1.90e-05  grad 12.35  45,300 tok/s"),
        ({"share_of_peak": 0.5}, "loss 2.3457  lr 1.90e-05  grad 12.35  45,300 tok/s"),
        ({"objective/scores": 0.71, "objective/kl": 0.05}, "score 0.710  KL 0.05  loss 2.3457"),
    ],
)
def test_a_line_fits_80_columns_and_keeps_what_matters(more, said):
    lines = []
    progress = Progress(lines.append)
    progress.begin(11_000, 120_000)
    progress.at(11_900, ["loss 2.3"])
    progress.show(LINE | more)
    progress.close()
    [line] = lines
    assert len(line) < 80 and line.startswith("step 11900/120000") and said in line
    assert "ETA" in line


def test_a_short_line_has_all_of_it():
    parts = [("step 1/9", 0), ("lr 1", 1), ("50% of peak", 3), ("1.0 GB", 4)]
    assert fitting(parts) == "step 1/9  lr 1  50% of peak  1.0 GB"
    parts[0] = ("x" * 70, 0)
    assert fitting(parts) == f"{'x' * 70}  lr 1"


def test_a_measurement_in_between_is_a_line():
    lines = []
    Progress(lines.append).show({"step": 20, "eval_loss": 1.23456})
    assert lines == ["step 20  held-out loss 1.2346"]
