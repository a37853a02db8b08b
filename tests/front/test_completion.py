"""A shell completes the words of a command, and help has no word cut off."""

import os
import subprocess
import sys

import pytest

from tests import life

ASK = """
eval "$(llmpipe completion bash)"
COMP_WORDS=(llmpipe {words}); COMP_CWORD={last}
_llmpipe_completion llmpipe
echo "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def bash(tmp_path):
    """What bash would put in the place of the last of some words."""
    command = tmp_path / "llmpipe"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m llmpipe "$@"\n')
    command.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(life.ROOT)}

    def complete(words):
        script = ASK.format(words=words, last=len(words.split(" ")))
        done = subprocess.run(
            ["bash", "-c", script], env=environment, capture_output=True, text=True, cwd=life.ROOT
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout.split()

    return complete


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("rew", ["reward"]),
        ("schema q", ["qlora"]),
        ("sft --f", ["--fresh"]),
    ],
)
def test_bash_completes_commands_options_and_stages(bash, words, completed):
    assert bash(words) == completed


def test_other_shells(llmpipe):
    for shell, sign in (("zsh", "#compdef llmpipe"), ("fish", "complete --command llmpipe")):
        code, out, _ = llmpipe("completion", shell)
        assert code == 0 and sign in out and "_LLMPIPE_COMPLETE" in out
    code, _, err = llmpipe("completion", "bsh")
    assert code == 2 and "did you mean 'bash'?" in err


def test_help_is_whole_and_has_a_short_form(llmpipe, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = llmpipe("-h")
    assert code == 0 and "..." not in out.partition("Commands:")[2] and "--version" in out
    code, out, _ = llmpipe("sft", "-h")
    assert code == 0 and "[RECIPE]\n" in out and "[[" not in out
    assert llmpipe("--version")[1].startswith("llmpipe ")
