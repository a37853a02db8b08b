"""What `show` and `report` say of an export: each format, who read it back and how far it is."""

from __future__ import annotations

import math

from llmpipe.report.page import write_report
from llmpipe.report.terminal import show_run
from llmpipe.run.exports import EXPORTS, Export, Measured, write_exports
from llmpipe.run.probe import Agreement
from tests.report.written import HOSTILE, add_sft, publish

SAME = Agreement(
    log_prob_difference=0.1, mean_log_prob_difference=0.01, equal_answers=15, answers=16
)
FAR = Measured(rows=3, tokens=40, mean_kl=0.0025, perplexity=2.02, perplexity_of_source=2.0)


def add_export(run, **changes) -> None:
    folder = run / "export"
    folder.mkdir(parents=True)
    values = {
        "format": "gguf-q8_0",
        "lossless": False,
        "size": 1_500_000,
        "tensors": 20,
        "reader": "llama.cpp (0.3.36)",
        "agreement": SAME,
        "measured": FAR,
        "tokens_per_second": 1234.5,
        "notes": ["a note"],
    }
    write_exports(folder, [Export(**(values | changes))])
    manifest = {"kind": "export", "stage": "export", "asked": {}, "parents": [], "models": {}}
    publish(folder, manifest | {"final": {}}, "stage: export\n")


def test_a_terminal_and_a_page_show_every_format(tmp_path):
    add_sft(tmp_path)
    add_export(tmp_path)
    told = "1.5 MB, 20 tensors; llama.cpp (0.3.36): KL 0.0025, perplexity x 1.0100, "
    told += "15 of 16 answers equal, 1,234 tok/s"
    assert told in " ".join(show_run(tmp_path).split())
    page = write_report([tmp_path]).read_text()
    assert told + "; a note" in page and "For other engines" in page


def test_what_a_file_says_is_not_trusted(tmp_path):
    add_sft(tmp_path)
    zero = Measured(rows=0, tokens=0, mean_kl=math.inf, perplexity=1.0, perplexity_of_source=0.0)
    add_export(tmp_path, reader=HOSTILE, measured=zero)
    assert "perplexity x inf" in " ".join(show_run(tmp_path).split())
    assert HOSTILE not in write_report([tmp_path]).read_text()
    (tmp_path / "export" / EXPORTS).write_text("{}\n[")
    assert "line 1 cannot be read" in " ".join(show_run(tmp_path).split())
    assert "line 1 cannot be read" in write_report([tmp_path]).read_text()
