"""`llmpipe ARGS` as a user types it, in the test's own process."""

import sys

import pytest

from llmpipe.front import cli, launch
from tests import life


@pytest.fixture
def llmpipe(monkeypatch, capsys):
    """`llmpipe ARGS` in this process: (exit code, standard output, standard error)."""
    monkeypatch.setattr(launch, "start", life.start_here)
    monkeypatch.setattr(launch, "begun_early", life.nobody_early)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["llmpipe", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return call
