"""What several workers say is kept line by line, whole, and without what is not for others."""

import subprocess
import sys

from llmpipe.front.launcher_log import LONGEST, Said
from llmpipe.run.artifact import Artifact


def say(artifact, code):
    with Said(artifact) as said:
        process = subprocess.Popen([sys.executable, "-c", code], stderr=said)
        said.begin()
        assert process.wait() == 0
    return said


def test_lines_are_kept_without_paths_and_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-8f3a91")
    artifact = Artifact(tmp_path / "run" / "sft")
    artifact.path.mkdir(parents=True)
    (artifact.path / "log.txt").write_text("before\n")
    code = f"import sys, os; print('{artifact.path}/a', os.environ['HF_TOKEN'], file=sys.stderr)"
    kept = ".../run/sft/a [redacted]\n"
    assert say(artifact, code).text == kept
    assert (artifact.path / "log.txt").read_text() == f"before\n{kept}"


def test_a_log_that_cannot_be_written_holds_nobody_up(tmp_path):
    artifact = Artifact(tmp_path / "run" / "sft")
    (artifact.path / "log.txt").mkdir(parents=True)
    said = say(artifact, f"import sys; sys.stderr.write('x' * {LONGEST} * 8)")
    assert len(said.text) == 8 * LONGEST
